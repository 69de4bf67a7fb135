"""Published numbers (published.yaml) that belong beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Source:
    """Where numbers come from: short name, title, address, and what to know before comparing."""

    label: str
    title: str
    url: str
    note: str


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        model: as we print it.
        method: e.g. PoLAR.
        r: adapter rank; None where the source gives none.
        scores: task -> per cent.
        average: as printed there.
        trainable: share of trainable parameters, as printed; None where the source gives none.
        stable_rank: median or range of medians, as stated; None where there is none.
        sources: keys of `sources()`, that of the scores first.
    """

    model: str
    method: str
    r: int | None
    scores: dict[str, float]
    average: float
    trainable: str | None
    stable_rank: str | None
    sources: tuple[str, ...]


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return content


def sources() -> dict[str, Source]:
    """Return all sources by key."""
    return {key: Source(**value) for key, value in _content()["sources"].items()}


def published_for(base: str) -> list[Published]:
    """Return what was published for a base model.

    Args:
        base: hub id or folder; its last part decides.
    """
    name = base.rstrip("/").rpartition("/")[2].lower()
    return [
        _row(model, entry)
        for model, about in _content()["models"].items()
        for entry in about["results"]
        if name in about["names"]
    ]


def _row(model: str, entry: dict[str, Any]) -> Published:
    stable = entry.get("stable_rank")
    return Published(
        model=model,
        method=entry["method"],
        r=entry["r"],
        scores=entry["scores"],
        average=entry["average"],
        trainable=entry.get("trainable"),
        stable_rank=stable and stable["text"],
        sources=(entry["source"], *((stable["source"],) if stable else ())),
    )
