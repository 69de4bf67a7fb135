"""A row -> the text of its prompt and of its response, by columns and template or as a commonsense task reads it.

No tokens here: `polar.data` turns texts into tokens, and counts the rows that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from polar.commonsense import read_row
from polar.errors import UserError
from polar.rows import FORMATS, Columns, recognise
from polar.templates import Template

if TYPE_CHECKING:
    from polar.run_config import DataArguments

Problem = str
"""What is wrong with a row: a key of `polar.data_report.MEANING`."""


@dataclass(frozen=True)
class RowTexts:
    """How rows of one source become texts.

    Attributes:
        read: row -> (prompt, response) or the problem of a row that has none.
        report: what data_report.json says about it: format and columns.
    """

    read: Callable[[Mapping[str, Any]], tuple[str, str] | Problem]
    report: dict[str, Any]


def task_texts(task: str) -> RowTexts:
    """Read rows of a commonsense task: the prompt and the right choice, as lm-eval scores them."""

    def read(row: Mapping[str, Any]) -> tuple[str, str] | Problem:
        try:
            prompt, response = read_row(task, row).training_texts()
        except UserError:
            return "not_of_the_task"
        if not prompt.strip():
            return "empty_prompt"
        return (prompt, response) if response.strip() else "empty_response"

    return RowTexts(read, {"format": f"task {task}", "columns": None})


def column_texts(
    data: DataArguments, template: Template, names: set[str], clean: Callable[[str], str], source: str
) -> RowTexts:
    """Read rows by their columns and put them into a template.

    Args:
        data: names columns or a format, or leaves both to the names found.
        template: of prompt and response.
        names: columns of the first rows.
        clean: applied to each response.
        source: what messages call the data.

    Raises:
        UserError: columns that are not there, or of no or several known formats.
    """
    format_name, columns = _columns(data, source, names)

    def read(row: Mapping[str, Any]) -> tuple[str, str] | Problem:
        prompt, response = row.get(columns.prompt), row.get(columns.response)
        extra = row.get(columns.input) if columns.input else None
        if prompt is None or response is None:
            return "missing_field"
        if not (isinstance(prompt, str) and isinstance(response, str) and isinstance(extra, str | None)):
            return "not_text"
        if not prompt.strip():
            return "empty_prompt"
        if not (response := clean(response)).strip():
            return "empty_response"
        fields = {"instruction": prompt, "input": extra or ""}
        return template.prompt(fields), template.full_response(fields, response)

    return RowTexts(read, {"format": format_name, "columns": asdict(columns)})


def _columns(data: DataArguments, source: str, names: set[str]) -> tuple[str, Columns]:
    """Decide which columns hold what, from the settings and the names found in the first rows."""
    told_all = {"prompt": data.prompt_column, "response": data.response_column, "input": data.input_column}
    told = {part: name for part, name in told_all.items() if name}
    for part, name in told.items():
        if names and name not in names:
            raise UserError(f"{part}_column {name!r}: {source} has the columns {', '.join(sorted(names))}")
    if data.dataset_format != "auto":
        return data.dataset_format, replace(FORMATS[data.dataset_format], **told)
    if "prompt" in told and "response" in told:
        return "columns", Columns(**told)
    if not names:
        return "unknown", FORMATS["prompt_completion"]  # no row is a mapping: each is counted, then it is an error
    format_name, columns = recognise(names, source)
    return format_name, replace(columns, **told)
