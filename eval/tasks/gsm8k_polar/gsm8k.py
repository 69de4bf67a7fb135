"""The functions behind gsm8k_polar.yaml; lm-eval loads this file by its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_eval.answers import NO_ANSWER, is_same_number, last_number, marked_number
from polar_eval.problems import read_problems

HUB_DATA = "openai/gsm8k:main"


def load(template: str = "alpaca", data: str = HUB_DATA, **_: Any) -> dict[str, Any]:
    """Read the problems and write each one's prompt with the training template; see `read_problems`."""
    import datasets

    return {"test": datasets.Dataset.from_list(read_problems("gsm8k", template, data))}


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
