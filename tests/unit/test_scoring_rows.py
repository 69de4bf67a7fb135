"""Rows of each generative task, in its public format and in LLM-Adapters' packaging -> question and gold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polar.errors import UserError
from polar_eval.problems import READERS, read_problems
from tests.shared_data import read_jsonl, shared_data

CHOICES = "Answer Choices: (A) 21 (B) 21.5 (C) 22 (D) 22.5 (E) 23"
# Made here in the format of the data set's card or of LLM-Adapters' files.
ROWS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "GSM8K": ("gsm8k", {"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}, "2 + 3?", "5"),
    "GSM8K, packaged": (
        "gsm8k",
        {"instruction": "2 + 3?", "input": "", "output": "The answer is 6.", "answer": "5.0"},
        "2 + 3?",
        "5",
    ),
    "MATH": (
        "math",
        {"problem": "Add.", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        "Add.",
        "\\frac{1}{2}",
    ),
    "MATH-500": (
        "math",
        {"problem": "Add.", "solution": "$\\boxed{7}$", "answer": "7", "subject": "Algebra", "unique_id": "a/1"},
        "Add.",
        "7",
    ),
    "MATH, MetaMath's file": (
        "math",
        {"instruction": "Add.", "output": "So $\\boxed{3}$", "type": "Algebra"},
        "Add.",
        "3",
    ),
    "SVAMP": (
        "svamp",
        {
            "Body": "Ann has 3 pens and 8 cups",
            "Question": "How many more cups?",
            "Answer": "5.0",
            "Type": "Subtraction",
        },
        "Ann has 3 pens and 8 cups. How many more cups?",
        "5",
    ),
    "SVAMP, packaged": (
        "svamp",
        {"instruction": "How many?", "input": "", "answer": [22.0], "output": "The answer is 20."},
        "How many?",
        "22",
    ),
    "MAWPS": (
        "mawps",
        {"id": "mawps__1", "question": "How many?", "chain": "<gadget>", "result": "9", "result_float": 9.0},
        "How many?",
        "9",
    ),
    "MAWPS, packaged": ("mawps", {"instruction": "How many?", "output": "9", "answer": "9.0"}, "How many?", "9"),
    "AQuA": (
        "aqua",
        {
            "question": "Speed?",
            "options": ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"],
            "rationale": "Let it be.",
            "correct": "E",
        },
        f"Speed? {CHOICES}",
        "E",
    ),
    "AQuA, packaged": (
        "aqua",
        {"instruction": f"Speed? {CHOICES}", "input": "", "answer": ["C"], "output": "The answer is (B)."},
        f"Speed? {CHOICES}",
        "C",
    ),
}
BAD: dict[str, tuple[str, Any, str]] = {
    "no number": ("gsm8k", {"question": "a?", "answer": "none"}, "row 1: no number in the reference solution"),
    "no box": ("math", {"problem": "a", "solution": "It is 5."}, r"row 1: no \\boxed"),
    "open box": ("math", {"problem": "a", "solution": "It is \\boxed{5."}, r"row 1: no \\boxed"),
    "gold is no number": ("svamp", {"Body": "a", "Question": "b", "Answer": "many"}, "row 1: Answer is 'many'"),
    "empty list": ("svamp", {"instruction": "a", "answer": []}, r"row 1: the answer is \[\]"),
    "no body": ("mawps", {"result": "5"}, "row 1: no text in the field question"),
    "letter out of range": ("aqua", {"instruction": "a", "answer": "F"}, "row 1: the answer is 'F'; it must be one"),
    "not an object": ("aqua", 5, "row 1: is int, not an object"),
    "other fields": ("math", {"text": "a"}, "row 1: has the fields text; rename them to .*problem and solution"),
}


def write(tmp_path: Path, row: Any) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("name", ROWS)
def test_row_becomes_a_prompt_in_the_training_template(tmp_path: Path, name: str) -> None:
    task, row, question, gold = ROWS[name]
    (doc,) = read_problems(task, "question_answer", write(tmp_path, row))
    assert (doc["prompt"], doc["gold"], doc["row"]) == (f"Question: {question}\nAnswer:", gold, 1)


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named(tmp_path: Path, name: str) -> None:
    task, row, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        read_problems(task, "plain", write(tmp_path, row))
    assert "\n" not in str(caught.value)


def test_every_reader_has_a_row_here() -> None:
    assert {task for task, *_ in ROWS.values()} == set(READERS)


def test_real_math_rows_have_their_subject() -> None:
    file = shared_data("math") / "test.jsonl"
    docs = read_problems("math", "alpaca", str(file))
    rows = read_jsonl(file)
    assert [doc["group"] for doc in docs] == [row["type"] for row in rows]
    assert len({doc["group"] for doc in docs}) == 7
    assert all(row["problem"].strip() in doc["prompt"] for doc, row in zip(docs, rows, strict=True))
