"""The functions behind the YAML files of MATH; lm-eval loads this file by its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_eval.answers import NO_ANSWER
from polar_eval.math_answers import final_answer, is_same, is_same_string, paper_answer
from polar_eval.problems import read_problems

STRING, SYMBOLIC = "string:", "symbolic:"  # a filter's answer carries the rule that grades it


def load(template: str = "alpaca", data: str = "", hub_data: str = "", **_: Any) -> dict[str, Any]:
    """Read the problems and write each one's prompt with the training template; see `read_problems`."""
    import datasets

    return {"test": datasets.Dataset.from_list(read_problems("math", template, data or hub_data))}


def prompt(doc: dict[str, Any]) -> str:
    """Return the prompt as it is; a Jinja string in the YAML would strip a trailing newline."""
    return str(doc["prompt"])


def gold(doc: dict[str, Any]) -> str:
    """Return the answer that counts as correct."""
    return str(doc["gold"])


def string(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Extract as the paper does: the line behind "the answer is:", else the whole text."""
    return [[_marked(STRING, paper_answer(text)) for text in texts] for texts in responses]


def symbolic(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    r"""Extract the answer behind "the answer is:", else the last \boxed{...}."""
    return [[_marked(SYMBOLIC, final_answer(text)) for text in texts] for texts in responses]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one filter's answer by its rule."""
    for mark, same in ((STRING, is_same_string), (SYMBOLIC, is_same)):
        if results[0].startswith(mark):
            return {"exact_match": float(same(results[0].removeprefix(mark), doc["gold"]))}
    return {"exact_match": 0.0}


def _marked(mark: str, answer: str | None) -> str:
    return mark + answer if answer else NO_ANSWER
