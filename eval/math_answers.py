"""Final answers of MATH: where they stand in a text, and when two of them are the same.

Two rules. The *string* rule is the paper's: the PoLAR scripts score with Hendrycks' `is_equiv` on what follows "the
answer is:". The *symbolic* rule asks math_verify as well, which knows that 1/2 is 0.5 and that {1, 2} is {2, 1}.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from polar.errors import UserError

MAX_SYMBOLIC_LENGTH = 300  # characters; a longer "answer" is a derivation, and sympy's time grows without bound
TIMEOUT_S = 3  # of each of math_verify's two steps; it uses SIGALRM, so only on the main thread
_MARK = re.compile(r"the answer is:\s*(.*)", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \fbox{...}, braces balanced; None without a whole one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box")[2].removeprefix("ed")
    if not rest.startswith("{"):  # \boxed 5, as TeX reads a single token; the data set's own code reads up to the "$"
        return rest.split("$")[0].strip() or None
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position]
    return None


def paper_answer(text: str) -> str:
    """Return what the paper's scoring compares: the rest of the line behind the first mark, else the whole text."""
    match = _MARK.search(text)
    return match[1].strip() if match else text.strip()


def final_answer(text: str) -> str | None:
    r"""Return the answer behind the first "the answer is:", else that of the last \boxed; None without either.

    Dollar signs, a full stop and a \boxed around it are left out.
    """
    match = _MARK.search(text)
    if match is None:
        return boxed(text)
    line = match[1].strip()
    answer = boxed(line) or line.rstrip(". ").strip("$").strip()
    return answer or None


def is_same_string(answer: str, gold: str) -> bool:
    """Tell whether two answers agree by Hendrycks' string rule (MATH, 2021), which the paper's scoring uses."""
    try:
        return string_form(answer) == string_form(gold)
    except (IndexError, ValueError):
        return answer == gold  # his code compares the raw texts wherever a step fails


def is_same(answer: str, gold: str) -> bool:
    """Tell whether two answers agree by the string rule or, where that says no, by math_verify.

    Raises:
        UserError: math_verify is not installed.
    """
    if is_same_string(answer, gold):
        return True
    if max(len(answer), len(gold)) > MAX_SYMBOLIC_LENGTH:
        return False
    _, verify = _math_verify()
    return bool(verify(list(_parse(gold)), list(_parse(answer)), timeout_seconds=TIMEOUT_S))


def string_form(latex: str) -> str:
    r"""Return the normal form of Hendrycks' string rule, step by step in his order, since the steps do not commute.

    Raises:
        IndexError, ValueError: a step does not apply, e.g. a \frac without arguments or "x/2".
    """
    text = latex.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for dropped in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(dropped, "")
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:  # "x = 5"
        text = right
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    """Cut a unit on the right: "5\\text{ cm}" -> "5"."""
    value, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    return value


def _braced_roots(text: str) -> str:
    head, *parts = text.split("\\sqrt")
    return head + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in parts)


def _braced_fractions(text: str) -> str:
    """Write \\frac12 and \\frac1{72} with both pairs of braces."""
    head, *parts = text.split("\\frac")
    for part in parts:
        if part[0] != "{":
            if len(part) < 2:
                return text
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        head += "\\frac" + part
    return head


def _fraction(text: str) -> str:
    """Write "1/2" as \\frac{1}{2}."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    numerator, denominator = int(parts[0]), int(parts[1])
    return f"\\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text


@lru_cache(maxsize=8192)  # the gold answers of a task are few, and a model repeats itself
def _parse(latex: str) -> tuple[Any, ...]:
    parse, _ = _math_verify()
    return tuple(parse(f"${latex}$", parsing_timeout=TIMEOUT_S))


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    """Return math_verify's `parse` and `verify`."""
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise UserError(f"MATH needs {error.name}; install it: pip install 'polar[eval]'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # a stack trace for each answer that is no mathematics
    return parse, verify
