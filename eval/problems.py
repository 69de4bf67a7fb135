"""Problems of the generative tasks: rows of the hub or of local files -> prompt in the training template, gold answer.

Each task reads its own public format and, where LLM-Adapters packages it, that one too: `instruction`, `answer`,
`output`. There the gold is `answer`; their `output` is generated text and often wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polar.errors import UserError
from polar.rows import FORMATS, is_file_name, open_source, recognise
from polar.templates import load_template
from polar_eval.answers import canonical, last_number, marked_number
from polar_eval.math_answers import boxed

MATH_SUBJECTS = {
    "algebra": "Algebra",
    "counting_and_probability": "Counting & Probability",
    "geometry": "Geometry",
    "intermediate_algebra": "Intermediate Algebra",
    "number_theory": "Number Theory",
    "prealgebra": "Prealgebra",
    "precalculus": "Precalculus",
}
HENDRYCKS_MATH = "EleutherAI/hendrycks_math"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        question: goes into the template's {instruction}.
        gold: the answer that counts, in the form that the task's grader compares.
        solution: the reference text; empty where there is none.
        input: extra context for the template's {input}.
        group: a part of the task with a score of its own (MATH's subject); empty for none.
    """

    question: str
    gold: str
    solution: str = ""
    input: str = ""
    group: str = ""


class BadRow(ValueError):
    """A row that cannot be read; the message ends the sentence "--data FILE, row 7: ..."."""


def read_problems(task: str, template: str, data: str, split: str = "test") -> list[dict[str, Any]]:
    """Return one row per problem, with the columns of `Problem` and `prompt`, `row` (its place in the data).

    Args:
        task: a key of `READERS`.
        template: name or path of a prompt template.
        data: a .jsonl, .json or .parquet file, or `name:config` on the hub.
        split: of a hub data set.

    Raises:
        UserError: unreadable data, no known columns, or a row without a gold answer; naming the row.
    """
    prompts, read = load_template(template), READERS[task]
    docs = []
    for place, row in _rows(data, split):
        if not isinstance(row, Mapping):
            raise UserError(f"--data {data}, row {place}: is {type(row).__name__}, not an object with fields")
        try:
            problem = read(row)
        except BadRow as error:
            raise UserError(f"--data {data}, row {place}: {error}") from None
        fields = {"instruction": problem.question, "input": problem.input}
        docs.append({"prompt": prompts.prompt(fields), "row": place, **vars(problem)})
    if not docs:
        raise UserError(f"--data {data}: no rows in it")
    return docs


def _rows(data: str, split: str) -> Iterator[tuple[Any, Any]]:
    """Yield the rows of a source; of all seven subjects where MATH is named on the hub without one."""
    sources = [data]
    if data == HENDRYCKS_MATH and not is_file_name(data):
        sources = [f"{HENDRYCKS_MATH}:{subject}" for subject in MATH_SUBJECTS]
    for source in sources:
        yield from open_source(source, split=split, key="--data").rows


def read_gsm8k(row: Mapping[str, Any]) -> Problem:
    """Any row with a question and a solution that ends in its number."""
    if "answer" in row and "instruction" in row:
        return _packaged_number(row)
    question, extra, solution = _question_and_solution(row)
    number = marked_number(solution) or last_number(solution)
    if number is None:
        raise BadRow("no number in the reference solution; mend or delete the row")
    return Problem(question, number, solution, extra)


def read_math(row: Mapping[str, Any]) -> Problem:
    r"""Any row with a problem and a solution whose answer stands in \boxed{...}; MATH-500 has it in `answer` too."""
    question, extra, solution = _question_and_solution(row)
    gold = boxed(solution)
    if gold is None:
        raise BadRow("no \\boxed{...} in the reference solution; mend or delete the row")
    return Problem(question, gold, solution, extra, str(row.get("type") or row.get("subject") or ""))


def read_svamp(row: Mapping[str, Any]) -> Problem:
    """SVAMP's own rows (Body, Question, Answer), or LLM-Adapters'."""
    if "Body" not in row:
        return _packaged_number(row)
    body = _text(row, "Body").strip()
    stop = "" if body.endswith((".", "?", "!", ",")) else "."
    return Problem(f"{body}{stop} {_text(row, 'Question').strip()}", _number(row, "Answer"))


def read_mawps(row: Mapping[str, Any]) -> Problem:
    """Calc-MAWPS (question, result), or LLM-Adapters' rows."""
    if "result" not in row:
        return _packaged_number(row)
    return Problem(_text(row, "question"), _number(row, "result"), str(row.get("chain") or ""))


def read_aqua(row: Mapping[str, Any]) -> Problem:
    """AQuA-RAT (question, options, correct), put into LLM-Adapters' wording, or LLM-Adapters' rows."""
    if "options" in row:
        options = [re.sub(r"^\s*([A-E])\s*\)\s*", r"(\1) ", str(option)) for option in row["options"]]
        question = f"{_text(row, 'question').strip()} Answer Choices: {' '.join(options)}"
        letter, solution = _text(row, "correct").strip(), str(row.get("rationale") or "")
    else:
        question, letter = _text(row, "instruction"), str(_last(row.get("answer"))).strip()
        solution = str(row.get("output") or "")
    if not re.fullmatch("[A-E]", letter):
        raise BadRow(f"the answer is {letter!r}; it must be one of A, B, C, D, E")
    return Problem(question, letter, solution)


READERS: dict[str, Callable[[Mapping[str, Any]], Problem]] = {
    "gsm8k": read_gsm8k,
    "math": read_math,
    "svamp": read_svamp,
    "mawps": read_mawps,
    "aqua": read_aqua,
}


def _packaged_number(row: Mapping[str, Any]) -> Problem:
    """LLM-Adapters' row: `answer` is a number, its text, or a list whose last entry is that."""
    number = canonical(str(_last(row.get("answer"))))
    if number is None:
        raise BadRow(f"the answer is {row.get('answer')!r}, not a number; mend or delete the row")
    return Problem(_text(row, "instruction"), number, str(row.get("output") or ""), str(row.get("input") or ""))


def _question_and_solution(row: Mapping[str, Any]) -> tuple[str, str, str]:
    names = {name for name, value in row.items() if value is not None}
    try:
        columns = recognise(names - {"answer"} if "solution" in names else names, "")[1]  # MATH-500 has both
    except UserError:
        known = " or ".join(f"{columns.prompt} and {columns.response}" for columns in FORMATS.values())
        raise BadRow(f"has the fields {', '.join(sorted(row)) or 'none'}; rename them to {known}") from None
    extra = row.get(columns.input) if columns.input else None
    return str(row[columns.prompt]), str(extra or ""), str(row[columns.response])


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str) or not row[field].strip():
        raise BadRow(f"no text in the field {field}; it has {', '.join(sorted(row)) or 'none'}")
    return str(row[field])


def _number(row: Mapping[str, Any], field: str) -> str:
    number = canonical(str(row.get(field)).replace("_", ""))
    if number is None:
        raise BadRow(f"{field} is {row.get(field)!r}, not a number; mend or delete the row")
    return number


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value
