"""Stiefel factors that step together: r x r sums over all their ranks, then right-multiplications of the local rows.

Communication of one phase (projection or retraction), for F factors of rank r over a process group:

    1. each rank adds up X^T X or X^T G over the whole rows that it holds                 F x r x r numbers
    2. each rank writes its pieces of rows that a rank boundary cuts into a zero table    C x r numbers
    3. one all-reduce over both, for all factors and all r at once (none where a rank holds everything)
    4. the table now has whole rows: their outer products complete the sums
    5. each rank multiplies its own rows, and its pieces of cut rows, by the r x r cores

C is at most (world size - 1) per factor. Nothing of size n is sent and no factor is gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polar import stiefel
from polar.gathered import gather, not_finite, scatter
from polar.shards import FactorSlice, all_reduce
from polar.steps import Field, GradientSums, Retraction
from polar.whole_rows import whole_row_range, whole_rows_of

# Above this condition number of X^T X one multiplication in fp32 leaves an error that a second one removes.
REPEAT_CONDITION = 30.0


class Sums(NamedTuple):
    """Sums over all ranks for F factors of equal r; None where not asked for.

    `XtX` and `XtG` are (F, r, r); `GtG` (F,) is norm(G)_F^2, there when both others are. `cut_X` and `cut_G` (C, r) are
    the cut rows, whole.
    """

    XtX: Tensor | None
    XtG: Tensor | None
    GtG: Tensor | None
    cut_X: Tensor
    cut_G: Tensor | None


@dataclass(frozen=True)
class _Pieces:
    """Pieces of cut rows in one leaf, that of `item`: element `source[i]` of it is element `slot[i]` of the table."""

    item: FactorSlice
    source: Tensor
    slot: Tensor


class EqualRankFactors:
    """F factors of equal r on one device whose rows are shared by one process group."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self.slices = list(slices)
        self.r = self.slices[0].r
        self.device = self.slices[0].device
        self._rows = whole_rows_of(self.slices)
        cut = [(position, row) for position, item in enumerate(self.slices) for row in item.cut_rows]
        self.cut_factor = torch.tensor([position for position, _ in cut], dtype=torch.long, device=self.device)
        self._pieces = self._plan_pieces({key: slot for slot, key in enumerate(cut)})

    def buffer_numel(self, *, gram: bool, grad: bool) -> int:
        """Numbers that one phase sends."""
        F, C, r = len(self.slices), len(self.cut_factor), self.r
        return F * r * r * (gram + grad) + F * (gram and grad) + C * r * (1 + grad)

    def local_sums(self, buffer: Tensor, *, gram: bool, grad: bool) -> Sums:
        """Write this rank's sums into `buffer` (zeros, fp32) and return them as views of it."""
        F, C, r = len(self.slices), len(self.cut_factor), self.r
        sizes = [F * r * r * gram, F * r * r * grad, F * (gram and grad), C * r, C * r * grad]
        XtX, XtG, GtG, cut_X, cut_G = buffer.split(sizes)
        sums = Sums(
            XtX.view(F, r, r) if gram else None,
            XtG.view(F, r, r) if grad else None,
            GtG if gram and grad else None,
            cut_X.view(C, r),
            cut_G.view(C, r) if grad else None,
        )
        self._rows.add_sums(sums.XtX, sums.XtG, sums.GtG)
        for pieces in self._pieces:
            cut_X[pieces.slot] = pieces.item.storage().view(-1)[pieces.source].float()
            storage = pieces.item.grad_storage() if grad else None
            if storage is not None:
                cut_G[pieces.slot] = storage.view(-1)[pieces.source].float()
        return sums

    def complete(self, sums: Sums) -> None:
        """After the all-reduce: add the outer products of the cut rows, which are whole now."""
        if not len(self.cut_factor):
            return
        if sums.XtX is not None:
            sums.XtX.index_add_(0, self.cut_factor, sums.cut_X[:, :, None] * sums.cut_X[:, None, :])
        if sums.XtG is not None and sums.cut_G is not None:
            sums.XtG.index_add_(0, self.cut_factor, sums.cut_X[:, :, None] * sums.cut_G[:, None, :])
        if sums.GtG is not None and sums.cut_G is not None:
            sums.GtG.index_add_(0, self.cut_factor, sums.cut_G.square().sum(1))

    def apply_field(self, sums: Sums, A: Tensor | None, B: Tensor) -> None:
        """Replace the local gradients by `G A + X B`; A = None stands for the identity. A, B: (F, r, r) fp32."""
        self._rows.apply_field(A, B)
        if len(self.cut_factor) and sums.cut_G is not None:
            B_cut = B[self.cut_factor]
            rows = sums.cut_G if A is None else (sums.cut_G[:, None] @ A[self.cut_factor])[:, 0]
            self._store_pieces(rows + (sums.cut_X[:, None] @ B_cut)[:, 0], grad=True)

    def apply_retraction(self, sums: Sums, M: Tensor) -> None:
        """Replace the local rows by `X M`; M: (F, r, r) fp32."""
        self._rows.apply_retraction(M)
        if len(self.cut_factor):
            self._store_pieces((sums.cut_X[:, None] @ M[self.cut_factor])[:, 0], grad=False)

    def local_field(self, core: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradients become G + X core(X^T G) where this rank holds all rows: no reduction. Returns X^T G."""
        XtG = torch.zeros(len(self.slices), self.r, self.r, device=self.device)
        self._rows.project(XtG, core)
        return XtG

    def local_retract(self, core: Callable[[Tensor], stiefel.RetractionCore]) -> tuple[Tensor, Tensor]:
        """Values become X M where this rank holds all rows. Returns X^T X before it and its condition (F,)."""
        XtX = torch.zeros(len(self.slices), self.r, self.r, device=self.device)
        conditions = []

        def product_core(sums: Tensor) -> Tensor:
            M, condition = core(sums)
            conditions.append(condition)
            return M.float()

        self._rows.retract(XtX, product_core)
        return XtX, torch.cat(conditions)

    def discard_gradient(self, position: int) -> None:
        """Set the local gradient of one factor to zero."""
        grad = self.slices[position].grad()
        if grad is not None:
            grad.zero_()

    def _store_pieces(self, rows: Tensor, *, grad: bool) -> None:
        for pieces in self._pieces:
            target = pieces.item.grad_storage() if grad else pieces.item.storage()
            if target is not None:
                target.view(-1)[pieces.source] = rows.reshape(-1)[pieces.slot].to(target.dtype)

    def _plan_pieces(self, slot_of: dict[tuple[int, int], int]) -> list[_Pieces]:
        by_leaf: dict[int, tuple[FactorSlice, list[int], list[int]]] = {}
        for position, item in enumerate(self.slices):
            first, last = whole_row_range(item)
            outside = [*range(0, first), *range(last, item.numel)]
            _, source, slot = by_leaf.setdefault(id(item.leaf), (item, [], []))
            for element in outside:
                row, column = divmod(item.start + element, self.r)
                source.append(item.offset + element)
                slot.append(slot_of[position, row] * self.r + column)
        return [
            _Pieces(item, torch.tensor(source, device=self.device), torch.tensor(slot, device=self.device))
            for item, source, slot in by_leaf.values()
            if source
        ]


class FactorBatch:
    """All factors of one firing that share a process group and a device, of any r."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self.group = slices[0].group
        self.device = slices[0].device
        by_r: dict[int, list[FactorSlice]] = {}
        for item in slices:
            by_r.setdefault(item.r, []).append(item)
        self.parts = [EqualRankFactors(items) for _, items in sorted(by_r.items())]

    def sums(self, *, gram: bool, grad: bool) -> list[Sums]:
        """Sums over all ranks, one entry per r. Collective: one all-reduce where a group shares the factors."""
        sizes = [part.buffer_numel(gram=gram, grad=grad) for part in self.parts]
        buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=self.device)
        result = [
            part.local_sums(piece, gram=gram, grad=grad)
            for part, piece in zip(self.parts, buffer.split(sizes), strict=True)
        ]
        if self.group is not None:
            all_reduce(buffer, self.group)
        for part, sums in zip(self.parts, result, strict=True):
            part.complete(sums)
        return result

    def apply_field(self, field: Field, scale: float | Tensor) -> list[str]:
        """Gradients become the field. Returns the names of factors whose gradient was not finite and is zero now.

        Args:
            field: tangent projection, landing field or penalty.
            scale: what the gradients are multiplied by, 1.0 without a loss scale.
        """
        bad = []
        all_sums = None if self.group is None and not field.needs_gram else self.sums(gram=field.needs_gram, grad=True)
        for number, part in enumerate(self.parts):
            if all_sums is None:
                XtG = part.local_field(lambda XtG: field.cores(GradientSums(None, XtG, None), scale)[1])
            else:
                sums = all_sums[number]
                assert sums.XtG is not None
                XtG = sums.XtG
                part.apply_field(sums, *field.cores(GradientSums(sums.XtX, XtG, sums.GtG), scale))
            finite = XtG.isfinite().all(-1).all(-1)
            if not finite.all():
                for position in (~finite).nonzero()[:, 0].tolist():
                    part.discard_gradient(position)
                    bad.append(part.slices[position].name)
        return bad

    def retract(self, retraction: Retraction) -> None:
        """Retract the factors; again where the first result was ill-conditioned, gathered where it was singular.

        Raises:
            FloatingPointError: a factor is not finite.
        """
        for _ in range(3):
            worst = 1.0
            all_sums = None if self.group is None else self.sums(gram=True, grad=False)
            for number, part in enumerate(self.parts):
                if all_sums is None:
                    XtX, condition = part.local_retract(retraction.core)
                else:
                    sums = all_sums[number]
                    assert sums.XtX is not None
                    M, condition = retraction.core(sums.XtX)
                    part.apply_retraction(sums, M.float())
                    XtX = sums.XtX
                worst = max(worst, condition.max().item())
                if worst == torch.inf:
                    _retract_singular(part, XtX, condition)
            if worst < REPEAT_CONDITION:
                return


def _retract_singular(part: EqualRankFactors, XtX: Tensor, condition: Tensor) -> None:
    """The safe path: gather each singular factor and take the polar factor of its SVD."""
    for position in condition.isinf().nonzero()[:, 0].tolist():
        item = part.slices[position]
        if not XtX[position].isfinite().all():
            raise FloatingPointError(not_finite(item.name))
        warnings.warn(f"{item.name} lost rank in the optimizer step: retracted by a gathered SVD", stacklevel=2)
        scatter(item, stiefel.polar_factor(gather(item, item.values())))


def batches_of(slices: Sequence[FactorSlice]) -> list[FactorBatch]:
    """Split the factors of one firing by process group and device, in an order that is the same on every rank."""
    groups: dict[tuple[Any, ...], list[FactorSlice]] = {}
    for item in slices:
        groups.setdefault((item.group, item.device), []).append(item)
    return [FactorBatch(members) for members in groups.values()]
