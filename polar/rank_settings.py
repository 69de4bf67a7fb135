"""How spectra become ranks: the settings of `polar ranks`, their checks and their options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from polar.base_weights import matches
from polar.errors import UserError
from polar.heavy_tails import FitName, tracy_widom_quantile
from polar.rank_allocation import Mapping, Method, Selection


@dataclass(frozen=True)
class RankSettings:
    """How spectra become ranks.

    Attributes:
        fit: how alpha_hill finds where the tail begins.
        tracy_widom: probability with which noise stays below the edge of the bulk; None: the asymptotic edge.
        w_hill: weight of alpha_hill in the score.
        w_spikes: weight of the spikes in the score.
        selection: "paper" adapts the layers with the highest scores, "upstream_code" those with the lowest.
        fraction: share of the layers that get an adapter.
        mapping: from scores to ranks: linear, log or sqrt.
        r_min: smallest rank.
        r_max: largest rank.
        multiple_of: every rank divides by it.
        alpha_factor: alpha = alpha_factor * r.
        budget: trainable parameters, never exceeded; "r=16" means as many as rank 16 on all selected layers; None: the
            formula's ranks, whatever they cost.
        method: whose parameters are counted: polar, lora (also QLoRA, rsLoRA) or dora.
        include: names, endings of names or regular expressions of the layers to score; empty: every linear layer.
        exclude: the same, of layers to leave alone, beside vision towers and the output layer.
    """

    fit: FitName = "median"
    tracy_widom: float | None = None
    w_hill: float = 0.7
    w_spikes: float = 0.3
    selection: Selection = "paper"
    fraction: float = 0.5
    mapping: Mapping = "linear"
    r_min: int = 4
    r_max: int = 64
    multiple_of: int = 1
    alpha_factor: float = 2.0
    budget: str | None = None
    method: Method = "polar"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, kind in (("fit", FitName), ("selection", Selection), ("mapping", Mapping), ("method", Method)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} {getattr(self, name)!r}: use one of {', '.join(get_args(kind))}")
        for name in ("r_min", "r_max", "multiple_of"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.r_min > self.r_max:
            raise UserError(f"r_min {self.r_min} is above r_max {self.r_max}; swap them")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction {self.fraction}: must be above 0 and at most 1")
        if not (self.w_hill >= 0 and self.w_spikes >= 0 and self.w_hill + self.w_spikes > 0):
            raise UserError(f"w_hill {self.w_hill}, w_spikes {self.w_spikes}: need weights >= 0, not both zero")
        if not 0 < self.alpha_factor < float("inf"):
            raise UserError(f"alpha_factor {self.alpha_factor}: must be positive; the paper uses 2")
        if self.tracy_widom is not None:
            tracy_widom_quantile(self.tracy_widom)
        for pattern in (*self.include, *self.exclude):
            matches(pattern, "")
        if self.budget is not None:
            parse_budget(self.budget)


def parse_budget(text: str) -> tuple[int, int]:
    """Return (r, 0) for "r=16" and (0, parameters) for a number.

    Raises:
        UserError: neither.
    """
    match = re.fullmatch(r"(r=)?([0-9][0-9_,]*)", text.strip())
    number = int(re.sub("[_,]", "", match[2])) if match else 0
    if match is None or number < 1:
        raise UserError(f"budget {text!r}: pass a number of parameters, or r=16 for as many as rank 16 takes")
    return (number, 0) if match[1] else (0, number)


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of RankSettings."""
    default = RankSettings()

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        value = getattr(default, name)
        shown = "" if value in (None, ()) else f" ({value})"
        group.add_argument(f"--{name}", default=value, help=text + shown, **options)

    layers = parser.add_argument_group("layers")
    names = "names, endings of names or regular expressions"
    add(layers, "include", f"layers to score: {names}", nargs="+", metavar="NAME")
    add(layers, "exclude", f"layers to leave alone: {names}", nargs="+", metavar="NAME")
    add(layers, "fraction", "share of the layers that gets an adapter", type=float)
    add(layers, "selection", "paper adapts the highest scores, upstream_code the lowest", choices=get_args(Selection))
    score = parser.add_argument_group("score")
    add(score, "fit", "how alpha_hill finds the tail of a spectrum", choices=get_args(FitName))
    text = "move the edge of the bulk so that noise stays below it with this probability"
    add(score, "tracy_widom", text, type=float, metavar="P")
    add(score, "w_hill", "weight of alpha_hill", type=float)
    add(score, "w_spikes", "weight of the Marchenko-Pastur spikes", type=float)
    ranks = parser.add_argument_group("ranks")
    add(ranks, "budget", "trainable parameters, or as many as rank R on every adapted layer takes", metavar="N|r=R")
    text = "whose parameters the budget counts; lora is also QLoRA and rsLoRA"
    add(ranks, "method", text, choices=get_args(Method))
    add(ranks, "mapping", "from scores to ranks", choices=get_args(Mapping))
    add(ranks, "r_min", "smallest rank", type=int)
    add(ranks, "r_max", "largest rank", type=int)
    add(ranks, "multiple_of", "every rank divides by this", type=int)
    add(ranks, "alpha_factor", "alpha = alpha_factor * r", type=float)
