"""What happened to the rows: counts per kind of problem, with the places of the first few, and token statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXAMPLES = 5  # places named per kind
MEANING = {
    "not_a_mapping": "not a JSON object",
    "missing_field": "lacks the prompt or the response field",
    "not_of_the_task": "not a row of the task, or without a label",
    "not_text": "prompt or response is not text",
    "empty_prompt": "empty prompt",
    "empty_response": "empty response",
    "special_token_in_text": "BOS or EOS inside the text",
    "prompt_too_long": "prompt alone reaches max_length",
    "too_long": "longer than max_length",
    "wrong_number_of_columns": "other number of columns than the header",
    "missing_column": "lacks a text or the label",
    "empty_text": "empty text",
    "no_label": "without a label",
    "unknown_label": "unknown label",
}


@dataclass
class Counts:
    """Counts of one source while it is read.

    Args:
        source: file or hub name.
        unit: "line" or "row": what a place means.
    """

    source: str
    unit: str
    rows: int = 0
    kept: int = 0
    spans_border: int = 0
    problems: dict[str, dict[str, Any]] = field(default_factory=dict)
    truncated: dict[str, Any] = field(default_factory=lambda: {"rows": 0, "examples": []})

    def drop(self, kind: str, place: int) -> None:
        """Count a row that is left out."""
        _count(self.problems.setdefault(kind, {"rows": 0, "examples": []}), place)

    def truncate(self, place: int) -> None:
        """Count a row whose response is cut."""
        _count(self.truncated, place)

    def report(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "source": self.source,
            "place": self.unit,
            "rows_read": self.rows,
            "rows_kept": self.kept,
            "dropped": self.problems,
            "truncated": self.truncated,
            "token_spans_prompt_and_response": self.spans_border,
        }

    def nothing_left(self) -> str:
        """Say in one line why no row can be used."""
        if not self.rows:
            return f"{self.source}: the file holds no rows"
        return f"{self.source}: none of the {self.rows:,} rows can be used: {problems_text(self.problems, self.unit)}"


def _count(entry: dict[str, Any], place: int) -> None:
    entry["rows"] += 1
    if len(entry["examples"]) < EXAMPLES:
        entry["examples"].append(place)


def problems_text(problems: dict[str, dict[str, Any]], unit: str) -> str:
    """Return "3 empty response (lines 4, 9, 11); ..."."""
    texts = []
    for kind, entry in sorted(problems.items()):
        places = ", ".join(map(str, entry["examples"])) + (", ..." if entry["rows"] > len(entry["examples"]) else "")
        texts.append(f"{entry['rows']:,} {MEANING.get(kind, kind)} ({unit}{'s' * (entry['rows'] > 1)} {places})")
    return "; ".join(texts)


def many_left_out(report: dict[str, Any] | None) -> list[str]:
    """Return a note if more than a twentieth of the rows was left out, with the fix if length is the reason."""
    if report is None or "rows_read" not in report:
        return []
    out = report["rows_read"] - report["rows_kept"]
    if out * 20 <= report["rows_read"]:
        return []
    too_long = sum(report["dropped"].get(kind, {"rows": 0})["rows"] for kind in ("too_long", "prompt_too_long"))
    fix = ": raise max_length, or set on_too_long to truncate" if too_long * 2 > out else ""
    return [f"{out / report['rows_read']:.0%} of the rows of {report['source']} are left out{fix}"]


def statistics(table: Any, rows: np.ndarray) -> dict[str, Any]:
    """Count tokens of some rows.

    Args:
        table: dataset with the columns `length`, `loss_tokens` and `prompt_hash`, without an indices mapping.
        rows: (n,) indices into it, n >= 1.

    Returns:
        rows, tokens (padding excluded), loss_tokens (response and EOS), their share, length quantiles in tokens.
    """
    lengths = table.data.column("length").to_numpy()[rows].astype(np.int64)
    loss_tokens = int(table.data.column("loss_tokens").to_numpy()[rows].sum(dtype=np.int64))
    tokens = int(lengths.sum())
    half, most = np.percentile(lengths, [50, 95]).tolist()
    return {
        "rows": len(rows),
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "loss_token_share": round(loss_tokens / tokens, 4),
        "length_tokens": {"median": half, "p95": most, "longest": int(lengths.max())},
        "rows_with_a_repeated_prompt": len(rows) - len(np.unique(table.data.column("prompt_hash").to_numpy()[rows])),
    }


def summary_line(name: str, report: dict[str, Any]) -> str:
    """Return one line about one part of the data; nothing that was left out or cut is missing in it."""
    lengths = report["length_tokens"]
    text = (
        f"{name}: {report['rows']:,} rows of {report['source']}, {report['tokens']:,} tokens "
        f"({report['loss_token_share']:.0%} with loss), longest {lengths['longest']:,}"
    )
    if report.get("held_out"):
        text += f"; {report['held_out']:,} held out for validation"
    if report["dropped"]:
        text += f"; left out: {problems_text(report['dropped'], report['place'])}"
    if report["truncated"] and report["truncated"]["rows"]:
        text += f"; response cut: {problems_text({'truncated': report['truncated']}, report['place'])}"
    if report.get("prompts_also_in_train"):
        text += f"; {report['prompts_also_in_train']:,} of these prompts are also in the training data"
    return text
