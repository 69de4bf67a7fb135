"""Rows that a boundary between ranks cuts: who holds their pieces, and the two ways in which they become whole.

    table         each rank writes its pieces of all C cut rows of all factors into a zero table that travels with the
                  r x r sums: one all-reduce, C r numbers, C up to (world size - 1) per factor. The whole rows are then
                  on every rank, and each adds their outer products to the reduced sums.
    neighbours    before the all-reduce each rank sends its pieces to the ranks that hold the rest of the same rows, in
                  one message to each for all factors: at most two rows per factor, whatever the world size. The rank
                  that holds a row's first element adds its outer product to its own sums.

`choose_way` says which. The neighbours are the ranks before and after, and more of them where slices are shorter than a
row or empty. Their messages are one all-to-all with the numbers of elements for each rank: a collective of the group,
so no order of sends can deadlock, and NCCL turns it into sends and receives between the ranks that have something to
say.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from polar.shards import FactorSlice, all_to_all
from polar.whole_rows import whole_row_range

CutRowsWay = Literal["table", "neighbours"]
# What the second collective of `neighbours` costs, in numbers sent: 256 KiB take 20 us where an all-reduce moves them
# at 13 GB/s, and a small collective over a few nodes takes about as long.
COLLECTIVE_NUMEL = 2**16


class Piece(NamedTuple):
    """The part `[start, end)` of a row, in the flattening of its factor, and the rank of the group that holds it."""

    rank: int
    start: int
    end: int


class CutRow(NamedTuple):
    """A cut row of the k-th slice (`factor`) of a list, with its two or more pieces, none of them empty, by rank."""

    factor: int
    row: int
    pieces: tuple[Piece, ...]


def cut_rows_of(cuts: Iterable[int], n: int, r: int) -> tuple[int, ...]:
    """Rows of an (n, r) factor, ascending, that a cut of its flattening at one of `cuts` splits."""
    return tuple(sorted({cut // r for cut in cuts if cut % r and 0 < cut < n * r}))


def pieces_of(row: int, r: int, cuts: Sequence[int]) -> tuple[Piece, ...]:
    """The non-empty pieces of a row; one piece where no cut splits it. `cuts` as in `FactorSlice`."""
    start, end = row * r, (row + 1) * r
    first, last = bisect_right(cuts, start), bisect_right(cuts, end - 1)
    bounds = pairwise([start, *cuts[first:last], end])
    return tuple(Piece(first + k, begin, stop) for k, (begin, stop) in enumerate(bounds) if stop > begin)


def held_cut_rows(slices: Sequence[FactorSlice]) -> list[CutRow]:
    """Cut rows of which a rank holds pieces: a slice ends at cuts, so its first and its last row at most."""
    found = []
    for factor, item in enumerate(slices):
        for row in sorted({item.start // item.r, (item.end - 1) // item.r}) if item.numel else ():
            pieces = pieces_of(row, item.r, item.cuts)
            if len(pieces) > 1:
                found.append(CutRow(factor, row, pieces))
    return found


def messages(rows: Iterable[CutRow], rank: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """What a rank sends to and gets from each other rank so that the rows of which it holds pieces become whole.

    Args:
        rows: `held_cut_rows` of this rank, of one list of slices or of several after each other.
        rank: this rank in its group.

    Returns:
        By other rank, positions in the concatenated rows: of the elements sent, and of those received. Both sides list
        them in the same order.
    """
    sent: dict[int, list[int]] = {}
    received: dict[int, list[int]] = {}
    begin = 0
    for row in rows:
        shift = begin - row.pieces[0].start
        places = {piece.rank: range(piece.start + shift, piece.end + shift) for piece in row.pieces}
        for other, place in places.items():
            if other != rank:
                sent.setdefault(other, []).extend(places[rank])
                received.setdefault(other, []).extend(place)
        begin = row.pieces[-1].end + shift
    return sent, received


def choose_way(slices: Sequence[FactorSlice]) -> CutRowsWay:
    """The way that sends less, with COLLECTIVE_NUMEL for the second collective; the same on every rank.

    `neighbours` counts as two rows per factor, which it does not exceed where all slices are equally long.
    """
    numbers = [(len(cut_rows_of(item.cuts, item.n, item.r)), item.r) for item in slices]
    table = sum(count * r for count, r in numbers)
    neighbours = sum(min(count, 2) * r for count, r in numbers)
    return "table" if table <= neighbours + COLLECTIVE_NUMEL else "neighbours"


class CutRows:
    """Cut rows of factors of equal r as a table (C, r): all of them, or for `neighbours` those held in pieces here.

    Attributes:
        factor: (C,) which slice each row belongs to.
    """

    def __init__(self, slices: Sequence[FactorSlice], way: CutRowsWay) -> None:
        self.r, device = slices[0].r, slices[0].device
        self.held = held_cut_rows(slices)
        keys = [(row.factor, row.row) for row in self.held]
        added = [slices[factor].start <= row * self.r for factor, row in keys]
        if way == "table":
            keys = [(k, row) for k, item in enumerate(slices) for row in cut_rows_of(item.cuts, item.n, item.r)]
            added = [True] * len(keys)
        self.factor = torch.tensor([factor for factor, _ in keys], dtype=torch.long, device=device)
        self._added = torch.tensor(added, dtype=torch.bool, device=device).nonzero()[:, 0]
        self._pieces = _local_pieces(slices, {key: slot for slot, key in enumerate(keys)})

    def __len__(self) -> int:
        return len(self.factor)

    def read(self, table: Tensor, *, grad: bool) -> None:
        """Write this rank's pieces of the values, or of the gradients where there are any, into the table (C, r)."""
        for item, source, slot in self._pieces:
            storage = item.grad_storage() if grad else item.storage()
            if storage is not None:
                table.view(-1)[slot] = storage.view(-1)[source].float()

    def write(self, table: Tensor, *, grad: bool) -> None:
        """Write this rank's pieces of the rows of the table (C, r) back."""
        for item, source, slot in self._pieces:
            storage = item.grad_storage() if grad else item.storage()
            if storage is not None:
                storage.view(-1)[source] = table.reshape(-1)[slot].to(storage.dtype)

    def add_products(self, sums: Tensor, A: Tensor, B: Tensor) -> None:
        """Add a^T b of the whole rows a of A and b of B (C, r) to the sums (F, r, r) of their factors.

        In the table way, of all rows: call it after the reduction. Otherwise, of the rows whose first element this rank
        holds: call it before.
        """
        A, B = A[self._added], B[self._added]
        sums.index_add_(0, self.factor[self._added], A[:, :, None] * B[:, None, :])

    def add_squares(self, sums: Tensor, B: Tensor) -> None:
        """Add norm(b)^2 of the same rows of B (C, r) to the sums (F,) of their factors."""
        sums.index_add_(0, self.factor[self._added], B[self._added].square().sum(1))


class Exchange:
    """The messages between neighbours for several tables of cut rows held in pieces."""

    def __init__(self, tables: Sequence[CutRows], group: dist.ProcessGroup, device: torch.device) -> None:
        sent, received = messages([row for table in tables for row in table.held], dist.get_rank(group))
        ranks = range(dist.get_world_size(group))
        self._group = group
        self._num_sent, self._num_received = ([len(m.get(k, ())) for k in ranks] for m in (sent, received))
        self._sent, self._received = (
            torch.tensor([e for k in sorted(m) for e in m[k]], dtype=torch.long, device=device)
            for m in (sent, received)
        )

    def complete(self, tables: Tensor) -> None:
        """Fill in what other ranks hold of the concatenated tables, each row of (k, numel) alike. Collective."""
        pieces = tables[:, self._sent].T.contiguous()
        tables[:, self._received] = all_to_all(pieces, self._num_sent, self._num_received, self._group).T


def _local_pieces(
    slices: Sequence[FactorSlice], slot_of: dict[tuple[int, int], int]
) -> list[tuple[FactorSlice, Tensor, Tensor]]:
    """For each leaf one of its slices, positions in the leaf, and those of the same elements in the flattened table."""
    by_leaf: dict[int, tuple[FactorSlice, list[int], list[int]]] = {}
    for factor, item in enumerate(slices):
        first, last = whole_row_range(item)
        _, source, slot = by_leaf.setdefault(id(item.leaf), (item, [], []))
        for element in (*range(first), *range(last, item.numel)):
            row, column = divmod(item.start + element, item.r)
            source.append(item.offset + element)
            slot.append(slot_of[factor, row] * item.r + column)
    return [
        (item, torch.tensor(source, device=item.device), torch.tensor(slot, device=item.device))
        for item, source, slot in by_leaf.values()
        if source
    ]
