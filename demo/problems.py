"""Grade-school word problems with worked solutions, in GSM8K's format, from a seed.

A row is `{"question": ..., "answer": ...}`; the answer works the problem out line by line with GSM8K's calculator
notes (`3*4=<<3*4=12>>12`) and ends in `#### N`. The problems come in kinds. The demo's base model was trained on
`SEEN_KINDS` only; fine-tuning teaches it a `NEW_KINDS` problem, which needs the same arithmetic in an unseen plan.

    python -m demo.problems --kinds new --count 1000 --seed 0 --out train.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from polar.errors import UserError
from polar.files import write_text

NAMES = ("Ana", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Noah", "Omar", "Rosa", "Sam", "Tess")
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "kites",
    "marbles",
    "pens",
    "shells",
    "stickers",
    "toys",
    "tulips",
)
BOXES = ("bags", "baskets", "boxes", "jars", "rows")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        kind: the name of the generator.
        question: the text of the problem.
        answer: the worked solution, its last line `#### N`.
    """

    kind: str
    question: str
    answer: str

    def row(self) -> dict[str, str]:
        """The problem as a GSM8K row."""
        return {"question": self.question, "answer": self.answer}


def _note(left: int, operator: str, right: int) -> tuple[str, int]:
    """One calculation with GSM8K's calculator note, e.g. `3*4=<<3*4=12>>12`, and its result."""
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"{left}{operator}{right}=<<{left}{operator}{right}={result}>>{result}", result


def _worked(kind: str, question: str, lines: Iterable[str], result: int) -> Problem:
    return Problem(kind, question, "\n".join([*lines, f"#### {result}"]))


def _buy_more(rng: random.Random) -> Problem:
    name, things, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 40), rng.randint(2, 40)
    note, result = _note(a, "+", b)
    question = f"{name} has {a} {things}. {name} buys {b} more {things}. How many {things} does {name} have now?"
    return _worked("buy_more", question, [f"{name} has {note} {things}."], result)


def _give_away(rng: random.Random) -> Problem:
    name, things, a = rng.choice(NAMES), rng.choice(THINGS), rng.randint(4, 80)
    b = rng.randint(2, a - 1)
    note, result = _note(a, "-", b)
    question = f"{name} has {a} {things}. {name} gives away {b} {things}. How many {things} are left?"
    return _worked("give_away", question, [f"{name} has {note} {things} left."], result)


def _together(rng: random.Random) -> Problem:
    (first, second), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    note, result = _note(a, "+", b)
    question = (
        f"{first} has {a} {things} and {second} has {b} {things}. "
        f"How many {things} do {first} and {second} have in total?"
    )
    return _worked("together", question, [f"In total they have {note} {things}."], result)


def _groups(rng: random.Random) -> Problem:
    name, things, boxes = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    note, result = _note(a, "*", b)
    question = f"{name} has {a} {boxes}. There are {b} {things} in each. How many {things} does {name} have in total?"
    return _worked("groups", question, [f"The {boxes} hold {note} {things}."], result)


def _price(rng: random.Random) -> Problem:
    name, things, a, p = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 6), rng.randint(2, 6)
    note, result = _note(a, "*", p)
    question = f"{name} buys {a} {things} for {p} dollars each. How many dollars does {name} pay?"
    return _worked("price", question, [f"The {things} cost {note} dollars."], result)


def _two_bills(rng: random.Random) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    note, result = _note(a, "+", b)
    question = (
        f"{name} pays {a} dollars for {first} and {b} dollars for {second}. How many dollars does {name} pay in total?"
    )
    return _worked("two_bills", question, [f"In total {name} pays {note} dollars."], result)


def _buy_then_give(rng: random.Random) -> Problem:
    name, things, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 40), rng.randint(2, 40)
    more, now = _note(a, "+", b)
    c = rng.randint(2, now - 1)
    less, result = _note(now, "-", c)
    question = (
        f"{name} has {a} {things}. {name} buys {b} more {things} and then gives away {c} {things}. "
        f"How many {things} are left?"
    )
    lines = [f"{name} has {more} {things}.", f"{name} has {less} {things} left."]
    return _worked("buy_then_give", question, lines, result)


def _groups_then_give(rng: random.Random) -> Problem:
    name, things, boxes = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    a, b = rng.randint(2, 6), rng.randint(2, 6)
    product, now = _note(a, "*", b)
    c = rng.randint(2, now - 1)
    less, result = _note(now, "-", c)
    question = (
        f"{name} has {a} {boxes}. There are {b} {things} in each. {name} gives away {c} {things}. "
        f"How many {things} are left?"
    )
    lines = [f"The {boxes} hold {product} {things}.", f"{name} has {less} {things} left."]
    return _worked("groups_then_give", question, lines, result)


def _groups_then_buy(rng: random.Random) -> Problem:
    name, things, boxes = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    a, b, c = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 40)
    product, now = _note(a, "*", b)
    more, result = _note(now, "+", c)
    question = (
        f"{name} has {a} {boxes}. There are {b} {things} in each. {name} buys {c} more {things}. "
        f"How many {things} does {name} have now?"
    )
    lines = [f"The {boxes} hold {product} {things}.", f"{name} has {more} {things}."]
    return _worked("groups_then_buy", question, lines, result)


def _change(rng: random.Random) -> Problem:
    name, things, a, p = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 6), rng.randint(2, 6)
    cost, bill = _note(a, "*", p)
    money = rng.randint(bill + 1, 80)
    less, result = _note(money, "-", bill)
    question = f"{name} has {money} dollars. {name} buys {a} {things} for {p} dollars each. How many dollars are left?"
    lines = [f"The {things} cost {cost} dollars.", f"{name} has {less} dollars left."]
    return _worked("change", question, lines, result)


def _shopping(rng: random.Random) -> Problem:
    name, (first, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    a, b, p, q = (rng.randint(2, 6) for _ in range(4))
    left, cost_left = _note(a, "*", p)
    right, cost_right = _note(b, "*", q)
    both, result = _note(cost_left, "+", cost_right)
    question = (
        f"{name} buys {a} {first} for {p} dollars each and {b} {second} for {q} dollars each. "
        f"How many dollars does {name} pay in total?"
    )
    # One line: the base has never written "The" or "In" at the start of a second line, where they are other tokens
    # than after a space, and an adapter cannot teach a frozen output layer a token.
    line = f"The {first} cost {left} dollars. The {second} cost {right} dollars. In total {name} pays {both} dollars."
    return _worked("shopping", question, [line], result)


Generator = Callable[[random.Random], Problem]
SEEN_KINDS: dict[str, Generator] = {
    "buy_more": _buy_more,
    "give_away": _give_away,
    "together": _together,
    "groups": _groups,
    "price": _price,
    "two_bills": _two_bills,
    "buy_then_give": _buy_then_give,
    "groups_then_give": _groups_then_give,
    "groups_then_buy": _groups_then_buy,
    "change": _change,
}
NEW_KINDS: dict[str, Generator] = {"shopping": _shopping}


def problems(kinds: dict[str, Generator], seed: int) -> Iterator[Problem]:
    """An endless stream of problems of these kinds, the kinds equally likely.

    Args:
        kinds: `SEEN_KINDS`, `NEW_KINDS` or a part of them.
        seed: the same seed gives the same stream.
    """
    rng = random.Random(seed)
    generators = list(kinds.values())
    while True:
        yield rng.choice(generators)(rng)


def distinct_problems(kinds: dict[str, Generator], counts: Iterable[int], seed: int) -> list[list[Problem]]:
    """Lists of the given lengths in which no question occurs twice, so that train, validation and test are disjoint.

    Raises:
        UserError: the kinds do not have so many different questions.
    """
    counts = list(counts)
    stream, wanted = problems(kinds, seed), sum(counts)
    found: dict[str, Problem] = {}
    for _ in range(20 * wanted + 100):
        if len(found) == wanted:
            break
        problem = next(stream)
        found.setdefault(problem.question, problem)
    else:
        raise UserError(f"{', '.join(kinds)}: fewer than {wanted} different questions; ask for less")
    ordered = iter(found.values())
    return [[next(ordered) for _ in range(count)] for count in counts]


def to_jsonl(rows: Iterable[Problem]) -> str:
    """The problems as JSON lines of GSM8K rows."""
    return "".join(json.dumps(problem.row(), ensure_ascii=False) + "\n" for problem in rows)


def main(argv: list[str] | None = None) -> None:
    """Write problems to a JSONL file."""
    parser = argparse.ArgumentParser(description="Write generated word problems as GSM8K rows.")
    parser.add_argument("--kinds", choices=("seen", "new"), default="new")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args(argv)
    kinds = SEEN_KINDS if arguments.kinds == "seen" else NEW_KINDS
    (rows,) = distinct_problems(kinds, [arguments.count], arguments.seed)
    write_text(arguments.out, to_jsonl(rows))


if __name__ == "__main__":
    main()
