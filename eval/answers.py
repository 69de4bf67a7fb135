"""Final answers of word problems: find the number, or the letter, in a text; compare numbers, not strings."""

from __future__ import annotations

import re
from fractions import Fraction

NO_ANSWER = "[no answer]"

# A sign counts only where no digit, letter or bracket stands before it: "12-5" holds 12 and 5. Commas must
# separate groups of three: "1,234" is one number, "1,2" are two.
_NUMBER = r"(?:(?<![\w.)\]])[-\u2212])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?:/\d+)?%?"
_ANY_NUMBER = re.compile(_NUMBER)
# GSM8K's own ending, and MetaMathQA's. Between the mark and the number only symbols may stand, no words.
_MARKED_NUMBER = re.compile(
    rf"(?:####|\bthe answer is:?)(?:[ \t*_$({{\[\\]|\\boxed\{{|\\text\{{)*?({_NUMBER})", re.IGNORECASE
)

# AQuA: the letter of a choice, behind the mark, with or without brackets.
_MARKED_LETTER = re.compile(
    r"(?:####|\b[Tt]he (?:correct )?answer is:?|\b[Oo]ption)(?:[ \t*_$({\[\\]|\\boxed\{|\\text\{)*([A-E])\b"
)
_ANY_LETTER = re.compile("[A-E]")


def marked_number(text: str) -> str | None:
    """Return the first number that follows "####" or "The answer is:", in canonical form; None without one."""
    match = _MARKED_NUMBER.search(text)
    return canonical(match.group(1)) if match else None


def last_number(text: str) -> str | None:
    """Return the last number in the text, in canonical form; None without one."""
    numbers = _ANY_NUMBER.findall(text)
    return canonical(numbers[-1]) if numbers else None


def marked_letter(text: str) -> str | None:
    """Return the letter A to E that follows "The answer is" (or "####", "option"); None without one."""
    match = _MARKED_LETTER.search(text)
    return match[1] if match else None


def first_letter(text: str) -> str | None:
    """Return the first capital A to E in the text: LLM-Adapters' rule, which also reads the A of "A train goes ..."."""
    match = _ANY_LETTER.search(text)
    return match[0] if match else None


def to_number(text: str) -> Fraction | None:
    """Read a number as people write it: "$1,234.50", "-5", "50%", "5.0", "18.", "1/2"; None if it is none.

    Currency and per cent signs are dropped, not applied: a problem asks for one unit.
    """
    plain = text.strip().replace("\u2212", "-").replace("$", "").replace(",", "").rstrip("%. ")
    if not plain:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def canonical(text: str) -> str | None:
    """Return one spelling per number ("5.0" and "5" are "5"), or None if `text` is no number."""
    number = to_number(text)
    return None if number is None else str(number)


def is_same_number(answer: str, gold: str) -> bool:
    """Tell whether two texts are the same number; False where either is none."""
    number = to_number(answer)
    return number is not None and number == to_number(gold)
