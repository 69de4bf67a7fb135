"""The functions behind the YAML files of SVAMP, MAWPS and AQuA; lm-eval loads this file by its path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polar_eval.answers import (
    NO_ANSWER,
    first_letter,
    is_same_number,
    last_number,
    marked_letter,
    marked_number,
)
from polar_eval.problems import read_problems


def load(
    problems: str, template: str = "alpaca", data: str = "", hub_data: str = "", split: str = "test", **_: Any
) -> dict[str, Any]:
    """Read the problems of one task and write each one's prompt with the training template; see `read_problems`."""
    import datasets

    return {"test": datasets.Dataset.from_list(read_problems(problems, template, data or hub_data, split))}


def prompt(doc: dict[str, Any]) -> str:
    """Return the prompt as it is; a Jinja string in the YAML would strip a trailing newline."""
    return str(doc["prompt"])


def gold(doc: dict[str, Any]) -> str:
    """Return the number or letter that counts as correct."""
    return str(doc["gold"])


def _filter(extract: Callable[[str], str | None]) -> Callable[..., list[list[str]]]:
    def apply(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
        return [[extract(text) or NO_ANSWER for text in texts] for texts in responses]

    return apply


strict_number, flexible_number = _filter(marked_number), _filter(last_number)
strict_letter, flexible_letter = _filter(marked_letter), _filter(first_letter)


def same_number(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one filter's number."""
    return {"exact_match": float(is_same_number(results[0], doc["gold"]))}


def same_letter(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one filter's letter."""
    return {"exact_match": float(results[0] == doc["gold"])}
