"""The plan that completes cut rows, for many simulated ranks at once, against the elements that each of them holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polar import cut_rows
from polar.factor_batch import EqualRankFactors
from polar.shards import FactorSlice

# n r is no multiple of most world sizes; (3, 16) has slices of one element and empty ones at the end.
SHAPES = [(67, 16), (512, 16), (3, 16), (110, 4), (9, 1)]


def zero3_cuts(n: int, r: int, ranks: int) -> range:
    share = -(-n * r // ranks)
    return range(share, ranks * share, share)


def zero2_cuts(n: int, r: int, ranks: int) -> range:
    """A factor in the middle of a flat group of five times its size."""
    share, begin = -(-5 * n * r // ranks), 2 * n * r
    return range(share - begin, ranks * share - begin, share)


def random_cuts(n: int, r: int, ranks: int) -> list[int]:
    """Half of the cuts anywhere, half of them crowded around one row, so that slices are short and empty."""
    draw = random.Random(ranks)
    middle = draw.randrange(n * r)
    cuts = [draw.randrange(n * r + 1) for _ in range(ranks // 2)]
    return sorted(cuts + [min(n * r, middle + draw.randrange(3 * r)) for _ in range(ranks - 1 - len(cuts))])


def slices_of(rank: int, all_cuts: Sequence[Sequence[int]], wholes: Sequence[Tensor]) -> list[FactorSlice]:
    """The slices of a simulated rank, each in its own leaf; no process group."""
    slices = []
    for k, (cuts, whole) in enumerate(zip(all_cuts, wholes, strict=True)):
        n, r = whole.shape
        start = cuts[rank - 1] if rank else 0
        end = cuts[rank] if rank < len(cuts) else n * r
        start, end = (min(max(bound, 0), n * r) for bound in (start, end))
        slices.append(FactorSlice(f"f{k}", n, r, start, end, whole.reshape(-1)[start:end].clone(), 0, None, cuts))
    return slices


@pytest.mark.parametrize("make_cuts", [zero3_cuts, zero2_cuts, random_cuts])
@pytest.mark.parametrize("ranks", [8, 12, 100, 1024])
def test_every_cut_row_becomes_whole_where_it_is_held_and_is_added_once(ranks: int, make_cuts: Any) -> None:
    r = 16
    shapes = [(n, width) for n, width in SHAPES if width == r]
    wholes = [torch.randn(n, r, dtype=torch.float64).float() for n, _ in shapes]
    all_cuts = [make_cuts(n, r, ranks) for n, r in shapes]
    parts = [EqualRankFactors(slices_of(rank, all_cuts, wholes), "neighbours") for rank in range(ranks)]
    plans = [cut_rows.messages(part.cut_rows.held, rank) for rank, part in enumerate(parts)]
    tables, XtX = [], torch.zeros(len(shapes), r, r)
    local = []
    for part in parts:
        table = torch.full((1, len(part.cut_rows) * r), torch.nan)  # what no message fills stays visible
        buffer = torch.zeros(part.sums_numel(gram=True, grad=False))
        local.append(part.local_sums(buffer, table, gram=True, grad=False))
        tables.append(table[0])
    before = [table.clone() for table in tables]
    for rank, (sent, received) in enumerate(plans):
        assert all(rank in plans[other][1] for other in sent)
        for other, places in received.items():
            tables[rank][places] = before[other][plans[other][0][rank]]
    owners: dict[tuple[int, int], int] = {}
    for rank, (part, sums) in enumerate(zip(parts, local, strict=True)):
        for slot, row in enumerate(part.cut_rows.held):
            assert torch.equal(sums.cut_X[slot], wholes[row.factor][row.row])
            owners[row.factor, row.row] = owners.get((row.factor, row.row), 0) + (row.pieces[0].rank == rank)
        part.add_cut_rows(sums)
        XtX += sums.XtX
    expected = {(k, row) for k, (n, r) in enumerate(shapes) for row in cut_rows.cut_rows_of([*all_cuts[k]], n, r)}
    assert owners == dict.fromkeys(expected, 1)
    assert expected
    torch.testing.assert_close(XtX, torch.stack([X.T @ X for X in wholes]), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("ranks", [8, 100, 1024])
def test_equal_shares_send_at_most_two_rows_per_factor(ranks: int) -> None:
    for n, r in SHAPES:
        for make_cuts in (zero3_cuts, zero2_cuts):
            cuts = make_cuts(n, r, ranks)
            for rank, item in enumerate(slices_of(k, [cuts], [torch.zeros(n, r)])[0] for k in range(ranks)):
                sent, received = cut_rows.messages(cut_rows.held_cut_rows([item]), rank)
                assert sum(map(len, sent.values())) <= 2 * r
                assert sum(map(len, received.values())) <= 2 * r


def test_pieces_name_the_rank_of_each_element() -> None:
    for ranks in (2, 3, 7, 40):
        for n, r in SHAPES:
            for cuts in (zero3_cuts(n, r, ranks), zero2_cuts(n, r, ranks), random_cuts(n, r, ranks)):
                for row in range(min(n, 70)):
                    found = [(e, p.rank) for p in cut_rows.pieces_of(row, r, cuts) for e in range(p.start, p.end)]
                    assert found == [(e, sum(c <= e for c in cuts)) for e in range(row * r, row * r + r)]


def test_the_way_that_sends_less_is_chosen_alike_on_every_rank() -> None:
    wholes = [torch.zeros(5376, 16)] * 40
    for ranks, way in ((8, "table"), (1000, "neighbours")):
        all_cuts = [zero3_cuts(5376, 16, ranks)] * 40
        assert {cut_rows.choose_way(slices_of(rank, all_cuts, wholes)) for rank in (0, 3, ranks - 1)} == {way}
