"""Graders: single cases, and the law that real reference solutions grade as correct and other problems' do not."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from polar_eval.answers import canonical, is_same_number, last_number, marked_number, to_number
from tests.shared_data import read_jsonl, shared_data


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18", "18"),
        ("... so the total is 18.\nThe answer is: 18", "18", "18"),
        ("the answer is 18.", "18", "18"),
        ("#### $1,234.50", "2469/2", "2469/2"),
        ("#### 1,450,000", "1450000", "1450000"),
        ("#### -5", "-5", "-5"),
        ("#### \u22125", "-5", "-5"),
        ("#### -$5", "-5", "-5"),
        ("#### 50%", "50", "50"),
        ("#### 5.0", "5", "5"),
        ("#### .5", "1/2", "1/2"),
        ("The answer is: $\\boxed{42}$", "42", "42"),
        ("The answer is: **42**", "42", "42"),
        ("The answer is: \\frac12? No: 7", None, "7"),
        ("The answer is: 1/2", "1/2", "1/2"),
        ("#### 18 eggs, 3 of them bad", "18", "3"),
        ("#### 18\n\nJohn has 7 more.\n#### 25", "18", "25"),
        ("The answer is: about 18", None, "18"),
        ("The answer is the sum of the two.\n#### 12", "12", "12"),
        ("We get 12-5=7 and 7 - 2 = 5", None, "5"),
        ("It is 12-5", None, "5"),
        ("(3)-5", None, "5"),
        ("1,2 and 3,45", None, "45"),
        ("It costs $20.", None, "20"),
        ("", None, None),
        ("no number here", None, None),
        ("####", None, None),
        ("#### none", None, None),
        ("#### 1/0", None, None),
    ],
)
def test_extraction(text: str, strict: str | None, flexible: str | None) -> None:
    assert marked_number(text) == strict
    assert last_number(text) == flexible


@pytest.mark.parametrize(
    ("text", "value"), [("5.0", 5), ("$1,000", 1000), ("18.", 18), ("-0.50", Fraction(-1, 2)), ("7 %", 7)]
)
def test_numbers_as_people_write_them(text: str, value: Fraction) -> None:
    assert to_number(text) == value


@pytest.mark.parametrize("text", ["", "abc", "[no answer]", "1/0", "$", "."])
def test_what_is_no_number_is_never_right(text: str) -> None:
    assert canonical(text) is None
    assert not is_same_number(text, "5") and not is_same_number(text, text)


def test_real_solutions_grade_as_correct_and_shuffled_ones_do_not() -> None:
    """All 8,133 rows. The gold number is read here by its own rule: what stands behind the last "####", no commas."""
    folder = shared_data("gsm8k")
    solutions = [row["answer"] for name in ("train", "test") for row in read_jsonl(folder / f"{name}.jsonl")]
    golds = [Fraction(solution.split("####")[-1].replace(",", "").strip()) for solution in solutions]
    assert len(solutions) > 8000
    others = solutions[:]
    random.Random(0).shuffle(others)
    for extract in (marked_number, last_number):
        right = sum(Fraction(extract(text) or "-999") == gold for text, gold in zip(solutions, golds, strict=True))
        chance = sum(Fraction(extract(text) or "-999") == gold for text, gold in zip(others, golds, strict=True))
        assert right / len(solutions) >= 0.995, extract.__name__
        assert chance / len(solutions) <= 0.03, extract.__name__


def test_metamath_style_endings_grade_like_gsm8k_endings() -> None:
    solutions = [row["answer"] for row in read_jsonl(shared_data("gsm8k") / "test.jsonl")]
    for solution in solutions:
        rewritten = solution.replace("####", "The answer is:")
        assert marked_number(rewritten) == marked_number(solution) is not None


def test_wrong_answers_close_to_the_right_one_are_wrong() -> None:
    for row in read_jsonl(shared_data("gsm8k") / "test.jsonl"):
        gold = marked_number(row["answer"])
        assert gold is not None
        wrong = Fraction(gold) + 1
        for text in (
            f"#### {wrong}",
            f"The answer is: {wrong}.0",
            f"#### {gold}0",
            f"#### -{gold}" if gold != "0" else "####",
        ):
            assert not is_same_number(marked_number(text) or "", gold), text
