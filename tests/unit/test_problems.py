"""The demo's word problems: the worked solutions are recomputed from their own text and from the question's numbers."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest

from demo.problems import NEW_KINDS, SEEN_KINDS, distinct_problems, main, problems, to_jsonl
from polar.errors import UserError

KINDS = SEEN_KINDS | NEW_KINDS
NOTE = re.compile(r"(\d+)([+*-])(\d+)=<<(\d+)([+*-])(\d+)=(\d+)>>(\d+)")

# What each kind asks for, on the numbers of the question in their order: written apart from the generators.
MEANING = {
    "buy_more": lambda a, b: a + b,
    "give_away": lambda a, b: a - b,
    "together": lambda a, b: a + b,
    "groups": lambda a, b: a * b,
    "price": lambda a, b: a * b,
    "two_bills": lambda a, b: a + b,
    "buy_then_give": lambda a, b, c: a + b - c,
    "groups_then_give": lambda a, b, c: a * b - c,
    "groups_then_buy": lambda a, b, c: a * b + c,
    "change": lambda money, a, b: money - a * b,
    "shopping": lambda a, b, c, d: a * b + c * d,
}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("kind", KINDS)
def test_worked_solution_is_right(kind: str) -> None:
    for problem in islice(problems({kind: KINDS[kind]}, seed=7), 500):
        *worked, last = problem.answer.split("\n")
        known = numbers(problem.question)
        for left, operator, right, *note, result in NOTE.findall("\n".join(worked)):
            assert note == [left, operator, right, result], problem
            a, b = int(left), int(right)
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[operator], problem
            assert a in known and b in known, f"{problem} uses a number that nothing gave"
            known.append(int(result))
        assert last == f"#### {result}"
        assert int(result) == MEANING[kind](*numbers(problem.question)) > 0


def test_new_kind_needs_an_unseen_plan() -> None:
    """Operators of the solutions, in order: no seen kind has the plan of a new kind."""

    def plans(kinds: dict) -> set[str]:
        return {"".join(m[1] for m in NOTE.findall(p.answer)) for p in islice(problems(kinds, seed=1), 400)}

    assert not set(SEEN_KINDS) & set(NEW_KINDS)
    assert not plans(SEEN_KINDS) & plans(NEW_KINDS)


def test_new_kind_uses_known_arithmetic_and_words() -> None:
    """What the adapter must teach is the plan: every word and every product occurs in the seen kinds."""
    seen = list(islice(problems(SEEN_KINDS, seed=2), 20_000))
    new = list(islice(problems(NEW_KINDS, seed=2), 500))

    def words(rows: list) -> set[str]:
        return {word for p in rows for word in re.findall(r"[A-Za-z]+", p.question + " " + p.answer)}

    def products(rows: list) -> set[tuple[str, str]]:
        return {(m[0], m[2]) for p in rows for m in NOTE.findall(p.answer) if m[1] == "*"}

    assert words(new) <= words(seen)
    assert products(new) <= products(seen)


def test_seed_fixes_the_stream() -> None:
    first, again, other = (list(islice(problems(SEEN_KINDS, seed), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_parts_share_no_question() -> None:
    train, validation, test = distinct_problems(NEW_KINDS, [300, 50, 50], seed=0)
    assert [len(train), len(validation), len(test)] == [300, 50, 50]
    assert len({p.question for p in train + validation + test}) == 400


def test_too_many_problems_asked_for() -> None:
    few = {"one": lambda rng: next(problems({"price": SEEN_KINDS["price"]}, seed=0))}
    with pytest.raises(UserError, match="fewer than 2 different"):
        distinct_problems(few, [2], seed=0)


def test_file_holds_gsm8k_rows(tmp_path) -> None:
    main(["--kinds", "new", "--count", "30", "--seed", "5", "--out", str(tmp_path / "new.jsonl")])
    text = (tmp_path / "new.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 30 and all(set(row) == {"question", "answer"} for row in rows)
    assert text == to_jsonl(distinct_problems(NEW_KINDS, [30], seed=5)[0])
