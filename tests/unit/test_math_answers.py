"""MATH's graders: single cases, equality with lm-eval's own copy of the string rule, and the law on all real rows."""

from __future__ import annotations

import importlib.util
import random
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import lm_eval
import pytest

from polar_eval.math_answers import boxed, final_answer, is_same, is_same_string, paper_answer
from tests.shared_data import read_jsonl, shared_data


@lru_cache(maxsize=1)
def real_solutions() -> list[str]:
    """All 4,002 reference solutions."""
    return [row["solution"] for name in ("test", "train") for row in read_jsonl(shared_data("math") / f"{name}.jsonl")]


def as_metamathqa(solution: str) -> str:
    """Return a solution with the ending that MetaMathQA gives it; the gold is read here by its own rule."""
    return f"{solution}\nThe answer is: {gold_of(solution)}"


def gold_of(solution: str) -> str:
    """The text between the braces of the last \\boxed, by counting braces from the right end of the match."""
    start = solution.rindex("\\boxed")
    rest = solution[start + len("\\boxed") :]
    if rest[0] != "{":
        return rest.split("$")[0].strip()
    end = next(i for i in range(1, len(rest) + 1) if rest[:i].count("{") == rest[:i].count("}"))
    return rest[1 : end - 1]


@pytest.mark.parametrize(
    ("text", "paper", "final"),
    [
        ("So $x = \\boxed{5}$.", "So $x = \\boxed{5}$.", "5"),
        ("Work.\nThe answer is: 5", "5", "5"),
        ("Work.\nThe answer is: 5.", "5.", "5"),
        ("the ANSWER is: $\\frac{1}{2}$\nmore", "$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("The answer is: $\\boxed{\\frac{a}{b}}$", "$\\boxed{\\frac{a}{b}}$", "\\frac{a}{b}"),
        ("First \\boxed{1}, then \\boxed{2^{3}}", "First \\boxed{1}, then \\boxed{2^{3}}", "2^{3}"),
        ("The answer is: 1\nThe answer is: 2", "1", "1"),
        ("The answer is: 2, 3 and 5", "2, 3 and 5", "2, 3 and 5"),
        ("It is \\boxed 7$ here", "It is \\boxed 7$ here", "7"),
        ("cut off at \\boxed{\\frac{1}{", "cut off at \\boxed{\\frac{1}{", None),
        ("no mark", "no mark", None),
        ("The answer is:", "", None),
        ("", "", None),
    ],
)
def test_extraction(text: str, paper: str, final: str | None) -> None:
    assert paper_answer(text) == paper
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("answer", "gold", "string", "symbolic"),
    [
        ("\\frac12", "\\frac{1}{2}", True, True),
        ("0.5", "\\frac{1}{2}", True, True),
        ("1/2", "\\frac{1}{2}", True, True),
        ("x = 5", "5", True, True),
        ("5\\text{ cm}", "5", True, True),
        ("90^\\circ", "90", True, True),
        ("\\dfrac{3}{4}", "\\tfrac34", True, True),
        ("0.75", "\\frac{3}{4}", False, True),
        ("2\\sqrt{3}", "\\sqrt{12}", False, True),
        ("\\{2, 1\\}", "\\{1, 2\\}", False, True),
        ("(2, 1)", "(1, 2)", False, False),
        ("1, 2, 3", "1, 2", False, False),
        ("6", "5", False, False),
        ("-5", "5", False, False),
        ("", "5", False, False),
        ("\\text{Evelyn}", "\\text{Eve}", False, False),
        ("x/2", "\\frac{x}{2}", False, True),
        ("\\sqrt", "2", False, False),
        ("5 " * 400, "5", False, False),
    ],
)
def test_equality(answer: str, gold: str, string: bool, symbolic: bool) -> None:
    assert is_same_string(answer, gold) is string
    assert is_same(answer, gold) is symbolic


def lm_evals_rule() -> ModuleType:
    """lm-eval's module of hendrycks_math, which has the same rule by other code."""
    path = Path(lm_eval.__file__).parent / "tasks" / "hendrycks_math" / "utils.py"
    spec = importlib.util.spec_from_file_location("hendrycks_math_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_string_rule_and_box_are_those_of_lm_evals_hendrycks_math() -> None:
    """On real answers and on what bad writing makes of them."""
    theirs, draw = lm_evals_rule(), random.Random(0)
    solutions = draw.sample(real_solutions(), 250)
    golds = [gold_of(solution) for solution in solutions]
    for solution, gold in zip(solutions, golds, strict=True):
        assert boxed(solution) == theirs.remove_boxed(theirs.last_boxed_only_string(solution)) == gold
        written = [gold, gold.replace("frac", "dfrac"), gold.replace(" ", ""), gold.replace("{", "").replace("}", "")]
        written += [f"{gold}\\text{{ cm}}", f"x={gold}", f"ab={gold}", f"abc={gold}", gold[1:], gold[:-1], f"{gold}%"]
        written += [draw.choice(golds), gold + "\\sqrt", gold + "\\frac", gold.replace("\\frac", "/")]
        for answer in written:
            assert is_same_string(answer, gold) == theirs.is_equiv(answer, gold), (answer, gold)


def test_all_real_solutions_grade_as_correct_and_shuffled_ones_do_not() -> None:
    """4,002 rows by the string rule, without a single exception; tests/integration/test_grading.py has math_verify."""
    solutions = real_solutions()
    assert len(solutions) == 4002
    golds = [gold_of(solution) for solution in solutions]
    assert [final_answer(solution) for solution in solutions] == golds
    for solution, gold in zip(solutions, golds, strict=True):
        assert is_same_string(paper_answer(as_metamathqa(solution)), gold), gold
    order = random.Random(0).sample(range(len(golds)), len(golds))
    others = zip(order, order[1:] + order[:1], strict=True)  # a derangement
    assert sum(is_same_string(golds[a], golds[b]) for a, b in others) / len(golds) <= 0.03
