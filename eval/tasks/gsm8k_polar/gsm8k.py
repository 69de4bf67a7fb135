"""The functions behind gsm8k_polar.yaml; lm-eval loads this file by its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar.errors import UserError
from polar.rows import FORMATS, open_source, recognise
from polar.templates import load_template
from polar_eval.answers import NO_ANSWER, is_same_number, last_number, marked_number

HUB_DATA = "openai/gsm8k:main"


def load(template: str = "alpaca", data: str = HUB_DATA, **_: Any) -> dict[str, Any]:
    """Read the problems and write each one's prompt with the training template.

    Args:
        template: name or path of a prompt template.
        data: a .jsonl, .json or .parquet file, or `name:config` on the hub (its test split).

    Returns:
        {"test": data set with the columns prompt, gold, question, solution, row}.

    Raises:
        UserError: unreadable data, no known columns, or a reference solution without a final number.
    """
    import datasets

    prompts = load_template(template)
    docs = []
    for place, row in open_source(data, split="test", key="--data").rows:
        if not isinstance(row, dict):
            raise UserError(f"--data {data}, row {place}: is {type(row).__name__}, not an object with fields")
        try:
            columns = recognise(set(row), "")[1]
        except UserError:
            names = " or ".join(f"{known.prompt} and {known.response}" for known in FORMATS.values())
            raise UserError(
                f"--data {data}, row {place}: has the fields {', '.join(sorted(row)) or 'none'}; rename them to {names}"
            ) from None
        solution = str(row[columns.response])
        number = marked_number(solution) or last_number(solution)
        if number is None:
            raise UserError(f"--data {data}, row {place}: no number in the reference solution; mend or delete the row")
        question = str(row[columns.prompt])
        docs.append(
            {"prompt": prompts.prompt(row), "gold": number, "question": question, "solution": solution, "row": place}
        )
    if not docs:
        raise UserError(f"--data {data}: no rows in it")
    return {"test": datasets.Dataset.from_list(docs)}


def prompt(doc: dict[str, Any]) -> str:
    """Return the prompt as it is; a Jinja string in the YAML would strip a trailing newline."""
    return str(doc["prompt"])


def gold(doc: dict[str, Any]) -> str:
    """Return the number that counts as correct."""
    return str(doc["gold"])


def strict(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Extract N from "#### N" or "The answer is: N"."""
    return [[marked_number(text) or NO_ANSWER for text in texts] for texts in responses]


def flexible(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Extract the last number, whatever stands around it."""
    return [[last_number(text) or NO_ANSWER for text in texts] for texts in responses]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one filter's answer."""
    return {"exact_match": float(is_same_number(results[0], doc["gold"]))}
