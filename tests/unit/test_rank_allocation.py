"""Scores, selection and ranks against the formulas word for word; the budget against every other choice."""

from __future__ import annotations

import math
import random

import pytest

from polar.errors import UserError
from polar.rank_allocation import (
    LayerSize,
    RankBounds,
    composite_scores,
    num_parameters,
    rank_positions,
    ranks_by_budget,
    ranks_by_formula,
    select_layers,
    uniform_budget,
)

EPS = 1e-8
SIZES = [LayerSize("q", 64, 48), LayerSize("k", 16, 48), LayerSize("up", 200, 48), LayerSize("down", 48, 200)]


def test_score_is_the_papers_formula() -> None:
    alphas, spikes = [2.0, 5.0, 3.0], [10, 0, 5]
    expected = [
        0.7 * (a - 2) / (3 + EPS) + 0.3 * (1 - (s - 0) / (10 + EPS)) for a, s in zip(alphas, spikes, strict=True)
    ]
    assert composite_scores(alphas, spikes) == pytest.approx(expected, rel=1e-12)
    assert composite_scores([3.0, 3.0], [1, 1]) == pytest.approx([0.3, 0.3])  # nothing to tell them apart


def test_paper_takes_the_highest_and_the_code_the_lowest() -> None:
    scores = [0.1, 0.9, 0.5, 0.7, 0.3]
    assert select_layers(scores, 0.5, "paper") == [1, 3]
    assert select_layers(scores, 0.5, "upstream_code") == [0, 4]
    assert select_layers(scores, 1.0, "paper") == select_layers(scores, 1.0, "upstream_code") == [0, 1, 2, 3, 4]
    assert select_layers(scores, 0.01) == [1]


@pytest.mark.parametrize(("mapping", "f"), [("linear", float), ("log", math.log1p), ("sqrt", math.sqrt)])
def test_mapping_is_the_papers_formula(mapping: str, f) -> None:
    scores = [0.2, 0.9, 0.35]
    sizes = [LayerSize(str(i), 100, 100) for i in range(3)]
    ranks = ranks_by_formula(rank_positions(scores, mapping), sizes, RankBounds(4, 64))
    expected = [4 + 60 * (f(s) - f(0.2)) / (f(0.9) - f(0.2) + EPS) for s in scores]
    assert ranks == [round(r) for r in expected]
    assert (min(ranks), max(ranks)) == (4, 64)


def test_ranks_stay_within_the_layer_and_divide() -> None:
    bounds = RankBounds(5, 63, 8)
    ranks = ranks_by_formula([1.0, 1.0, 0.0, 0.5], SIZES, bounds)
    assert ranks == [48, 16, 8, 32]  # k has full rank 16; 5 becomes 8
    with pytest.raises(UserError, match="no multiple of 32 between them"):
        ranks_by_formula([0.0], SIZES[:1], RankBounds(5, 30, 32))
    with pytest.raises(UserError, match="k has rank 16, below multiple_of 32"):
        ranks_by_formula([0.0], SIZES[1:2], RankBounds(5, 64, 32))


def cost(ranks: list[int], sizes: list[LayerSize], method: str) -> int:
    """Counted from the factors' shapes."""
    total = 0
    for r, size in zip(ranks, sizes, strict=True):
        shapes = {"polar": [(size.d_out, r), (r, r), (size.d_in, r)], "lora": [(r, size.d_in), (size.d_out, r)]}
        shapes["dora"] = [*shapes["lora"], (size.d_out, 1)]
        total += sum(rows * columns for rows, columns in shapes[method])
    return total


@pytest.mark.parametrize("seed", range(60))
def test_budget_is_kept_and_missed_by_less_than_one_unit_of_rank(seed: int) -> None:
    draw = random.Random(seed)
    unit = draw.choice([1, 2, 4, 8])
    method = draw.choice(["polar", "lora", "dora"])
    number = draw.randint(1, 30)
    sizes = [LayerSize(str(i), draw.randint(8, 300), draw.randint(8, 300)) for i in range(number)]
    bounds = RankBounds(draw.randint(1, 8), draw.randint(16, 64), unit)
    positions = [draw.choice([0.0, draw.random(), 1.0]) for _ in sizes]
    lows, caps = zip(*(bounds.of(size) for size in sizes), strict=True)
    budget = draw.randint(cost(list(lows), sizes, method), cost(list(caps), sizes, method))
    ranks = ranks_by_budget(positions, sizes, bounds, budget, method)
    left = budget - cost(ranks, sizes, method)
    assert left >= 0
    for i, (r, low, cap) in enumerate(zip(ranks, lows, caps, strict=True)):
        assert low <= r <= cap
        assert r % unit == 0
        assert r <= min(sizes[i].d_out, sizes[i].d_in)
        if r < cap:  # another unit does not fit
            more = [*ranks[:i], r + unit, *ranks[i + 1 :]]
            assert cost(more, sizes, method) > budget


@pytest.mark.parametrize("unit", [1, 4])
def test_budget_keeps_the_order_of_the_scores(unit: int) -> None:
    """Layers of one size: a higher score never gets a lower rank; without left-overs it is R_min + t position."""
    sizes = [LayerSize(str(i), 256, 128) for i in range(12)]
    positions = [i / 11 for i in range(12)]
    budget = uniform_budget(16, sizes, "polar")
    ranks = ranks_by_budget(positions, sizes, RankBounds(4, 64, unit), budget, "polar")
    assert ranks == sorted(ranks)
    assert ranks[0] == 4
    slope = (ranks[-1] - 4) / 1.0
    assert all(abs(r - (4 + slope * p)) <= 2 * unit for r, p in zip(ranks, positions, strict=True))


def test_equal_scores_share_a_budget_evenly() -> None:
    sizes = [LayerSize(str(i), 96, 96) for i in range(5)]
    assert ranks_by_budget([0.0] * 5, sizes, RankBounds(4, 64), uniform_budget(16, sizes, "lora"), "lora") == [16] * 5


def test_parameters_of_each_method() -> None:
    size = SIZES[0]
    assert num_parameters(8, size, "polar") == 8 * (64 + 48) + 64
    assert num_parameters(8, size, "lora") == 8 * (64 + 48)
    assert num_parameters(8, size, "dora") == 8 * (64 + 48) + 64
    assert uniform_budget(32, SIZES, "lora") == sum(min(32, s.full_rank) * (s.d_in + s.d_out) for s in SIZES)


def test_bounds_that_cannot_meet_the_budget() -> None:
    bounds = RankBounds(4, 8)
    low = sum(num_parameters(4, size, "lora") for size in SIZES)
    high = sum(num_parameters(8, size, "lora") for size in SIZES)
    with pytest.raises(UserError, match=f"r_min 4 on 4 layers already takes {low:,}.*--budget {low}"):
        ranks_by_budget([0.0] * 4, SIZES, bounds, low - 1, "lora")
    with pytest.raises(UserError, match=f"r_max 8 on 4 layers takes no more than {high:,}.*--budget {high}"):
        ranks_by_budget([0.0] * 4, SIZES, bounds, high + 64, "lora")  # 64: one more unit of k
    assert ranks_by_budget([0.0] * 4, SIZES, bounds, high + 63, "lora") == [8] * 4
