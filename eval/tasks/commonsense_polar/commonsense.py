"""The functions behind the YAML files of the eight commonsense tasks; lm-eval loads this file by its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar.commonsense import DELIMITER, find_task, read_row
from polar.errors import UserError
from polar.rows import open_source


def load(task: str, data: str = "", **_: Any) -> dict[str, Any]:
    """Read the rows of one task; no template: the texts are lm-eval's own, which training uses too.

    Args:
        task: a name in `polar.commonsense.TASKS`.
        data: a .jsonl, .json or .parquet file in the hub's format or LLM-Adapters', or `name:config` on the hub.

    Raises:
        UserError: unreadable data, or a row that is not of this task; naming the row.
    """
    import datasets

    entry = find_task(task)
    docs = []
    for place, row in open_source(data or entry.source, split=entry.scored_split, key="--data").rows:
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"is {type(row).__name__}, not an object with fields")
            choice = read_row(task, row)
        except UserError as error:
            raise UserError(f"--data {data or entry.source}, row {place}: {error}") from None
        docs.append({"prompt": choice.contexts[choice.gold], "row": place, **vars(choice)})
    if not docs:
        raise UserError(f"--data {data or entry.source}: no rows in it")
    return {"test": datasets.Dataset.from_list(docs)}


def prompt(doc: dict[str, Any]) -> str:
    """Return the prompt that all choices share."""
    return str(doc["contexts"][0])


def choices(doc: dict[str, Any]) -> list[str]:
    """Return the choices without the delimiter, which lm-eval adds and leaves out of acc_norm's lengths."""
    return [text.removeprefix(DELIMITER) for text in doc["continuations"]]


def gold(doc: dict[str, Any]) -> int:
    """Return the index of the right choice."""
    return int(doc["gold"])


def contexts(doc: dict[str, Any]) -> list[str]:
    """WinoGrande: the choices are the prompts."""
    return list(doc["contexts"])


def common_continuation(doc: dict[str, Any]) -> str:
    """WinoGrande: what is scored behind either prompt."""
    return str(doc["continuations"][0].removeprefix(DELIMITER))
