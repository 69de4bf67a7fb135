"""From spectral measures to adapter ranks: score, selection, mapping, parameter budget. Numbers only, no weights.

Source: Adaptive Rank LoRA, UdiBhaskar/Adaptive-Rank-LoRA, paper; the budget and the multiples are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from polar.errors import UserError

Selection = Literal["paper", "upstream_code"]
Mapping = Literal["linear", "log", "sqrt"]
Method = Literal["polar", "lora", "dora"]

EPS = 1e-8
MAPPINGS: dict[str, Callable[[float], float]] = {"linear": lambda x: x, "log": math.log1p, "sqrt": math.sqrt}


@dataclass(frozen=True)
class LayerSize:
    """A linear layer: W is (d_out, d_in)."""

    name: str
    d_out: int
    d_in: int

    @property
    def full_rank(self) -> int:
        """No adapter of this layer can have a higher rank."""
        return min(self.d_out, self.d_in)

    @property
    def longer(self) -> int:
        """N, the larger side."""
        return max(self.d_out, self.d_in)


def composite_scores(
    alphas: Sequence[float], spikes: Sequence[int], w_hill: float = 0.7, w_spikes: float = 0.3
) -> list[float]:
    """Return RA = w_hill alpha_norm + w_spikes s_norm of every layer: high where the spectrum looks like noise.

    alpha_norm = (alpha - min) / (max - min + eps) and s_norm = 1 - (N_s - min) / (max - min + eps), over all layers.

    Args:
        alphas: alpha_hill by layer, finite.
        spikes: N_s by layer.
        w_hill: weight of alpha_norm, not negative.
        w_spikes: weight of s_norm, not negative.
    """
    return [
        w_hill * alpha + w_spikes * (1 - spike) for alpha, spike in zip(_scaled(alphas), _scaled(spikes), strict=True)
    ]


def select_layers(scores: Sequence[float], fraction: float = 0.5, selection: Selection = "paper") -> list[int]:
    """Return the indices, ascending, of the layers that get an adapter: floor(fraction * layers), at least one.

    "paper" takes the highest scores: layers with less structure need more adaptation. "upstream_code" takes the lowest,
    as the published code does (`nsmallest`), against its paper and README. Among the selected layers both give
    the higher rank to the higher score, so with fraction 1 they agree. Ties go to the earlier layer.
    """
    sign = -1 if selection == "paper" else 1
    order = sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))
    return sorted(order[: max(1, int(len(scores) * fraction))])


def rank_positions(scores: Sequence[float], mapping: Mapping = "linear") -> list[float]:
    """Return (f(RA) - f(RA_min)) / (f(RA_max) - f(RA_min) + eps) in [0, 1): where between R_min and R_max R lies."""
    return _scaled([MAPPINGS[mapping](score) for score in scores])


def num_parameters(r: int, size: LayerSize, method: Method = "polar") -> int:
    """Trainable parameters of an adapter of rank r: PoLAR with a full Theta, LoRA (also QLoRA, rsLoRA) or DoRA."""
    outer = r * (size.d_in + size.d_out)
    return outer + {"polar": r * r, "lora": 0, "dora": size.d_out}[method]


@dataclass(frozen=True)
class RankBounds:
    """What every rank must respect.

    Attributes:
        r_min: smallest rank; a layer whose full rank is lower gets the largest multiple below that.
        r_max: largest rank.
        multiple_of: every rank divides by it; bounds that do not are moved inwards.
    """

    r_min: int = 4
    r_max: int = 64
    multiple_of: int = 1

    def of(self, size: LayerSize) -> tuple[int, int]:
        """Return the smallest and the largest rank of a layer, both multiples.

        Raises:
            UserError: there is none.
        """
        unit = self.multiple_of
        low, high = math.ceil(self.r_min / unit) * unit, self.r_max // unit * unit
        if low > high:
            raise UserError(
                f"r_min {self.r_min} and r_max {self.r_max}: no multiple of {unit} between them; use --r_max {low}"
            )
        cap = min(high, size.full_rank // unit * unit)
        if cap < 1:
            raise UserError(
                f"{size.name} has rank {size.full_rank}, below multiple_of {unit};"
                f" leave it out with --exclude, or use --multiple_of 1"
            )
        return min(low, cap), cap


def ranks_by_formula(positions: Sequence[float], sizes: Sequence[LayerSize], bounds: RankBounds) -> list[int]:
    """Return R = r_min + (r_max - r_min) position, rounded to the nearest multiple within each layer's bounds."""
    ranks = []
    for position, size in zip(positions, sizes, strict=True):
        low, high = bounds.of(size)
        wanted = bounds.r_min + (bounds.r_max - bounds.r_min) * position
        ranks.append(min(max(round(wanted / bounds.multiple_of) * bounds.multiple_of, low), high))
    return ranks


def uniform_budget(r: int, sizes: Sequence[LayerSize], method: Method) -> int:
    """Parameters of rank r on every layer, as far as its full rank allows."""
    return sum(num_parameters(min(r, size.full_rank), size, method) for size in sizes)


def ranks_by_budget(
    positions: Sequence[float], sizes: Sequence[LayerSize], bounds: RankBounds, budget: int, method: Method
) -> list[int]:
    """Return ranks whose parameters stay within `budget` and miss it by less than one unit of rank of any layer.

    R = r_min + t position with the largest t that fits: the paper's formula, with the budget in place of r_max, which
    stays a bound. Units that are left over go to the layers that were rounded down most, as long as one fits.

    Args:
        positions: in [0, 1] by layer.
        sizes: of the same layers.
        bounds: hard limits.
        budget: trainable parameters.
        method: whose parameters are counted.

    Raises:
        UserError: even r_min costs more, or even r_max leaves room for another unit of rank.
    """
    unit = bounds.multiple_of
    limits = [bounds.of(size) for size in sizes]

    def wanted(t: float) -> list[float]:
        pairs = zip(positions, limits, strict=True)
        return [min(max(bounds.r_min + t * position, low), high) for position, (low, high) in pairs]

    def floored(t: float) -> list[int]:
        return [math.floor(value / unit) * unit for value in wanted(t)]

    def cost(ranks: Sequence[int]) -> int:
        return sum(num_parameters(r, size, method) for r, size in zip(ranks, sizes, strict=True))

    smallest, largest = cost([low for low, _ in limits]), cost([high for _, high in limits])
    _check_reachable(budget, smallest, largest, sizes, limits, bounds, method)
    slopes = [position for position in positions if position > 0]
    low_t, high_t = 0.0, (bounds.r_max - bounds.r_min + unit) / min(slopes, default=1.0)
    if cost(floored(high_t)) <= budget:
        low_t = high_t
    for _ in range(200):  # floats are exhausted before
        middle = (low_t + high_t) / 2
        low_t, high_t = (middle, high_t) if cost(floored(middle)) <= budget else (low_t, middle)
    return _spend_rest(wanted(high_t), floored(low_t), [high for _, high in limits], unit, sizes, budget, method)


def _spend_rest(
    wanted: Sequence[float],
    ranks: list[int],
    caps: Sequence[int],
    unit: int,
    sizes: Sequence[LayerSize],
    budget: int,
    method: Method,
) -> list[int]:
    """Raise ranks by one unit each, largest shortfall first, until no unit fits into the budget."""
    left = budget - sum(num_parameters(r, size, method) for r, size in zip(ranks, sizes, strict=True))
    order = sorted(range(len(ranks)), key=lambda i: ranks[i] - wanted[i])
    spent = True
    while spent:
        spent = False
        for i in order:
            price = num_parameters(ranks[i] + unit, sizes[i], method) - num_parameters(ranks[i], sizes[i], method)
            if ranks[i] + unit <= caps[i] and price <= left:
                ranks[i] += unit
                left -= price
                spent = True
    return ranks


def _check_reachable(
    budget: int,
    smallest: int,
    largest: int,
    sizes: Sequence[LayerSize],
    limits: Sequence[tuple[int, int]],
    bounds: RankBounds,
    method: Method,
) -> None:
    if budget < smallest:
        raise UserError(
            f"budget {budget:,}: r_min {bounds.r_min} on {len(sizes)} layers already takes {smallest:,} parameters;"
            f" use a smaller --r_min or --fraction, or --budget {smallest}"
        )
    unit = bounds.multiple_of
    prices = (
        num_parameters(high + unit, size, method) - num_parameters(high, size, method)
        for size, (_, high) in zip(sizes, limits, strict=True)
    )
    if budget - largest >= min(prices):
        raise UserError(
            f"budget {budget:,}: r_max {bounds.r_max} on {len(sizes)} layers takes no more than {largest:,} parameters;"
            f" use a larger --r_max or --fraction, or --budget {largest}"
        )


def _scaled(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low + EPS) for value in values]
