"""Stiefel factors that step together: r x r sums over all their ranks, then right-multiplications of the local rows.

Communication of one phase (projection or retraction), for F factors of rank r over a process group:

    1. each rank adds up X^T X or X^T G over the whole rows that it holds                     F x r x r numbers
    2. its pieces of rows that a rank boundary cuts go to whom they concern (polar.cut_rows)
    3. one all-reduce over the sums, for all factors and all r at once (none where a rank holds everything)
    4. each rank multiplies its own rows, and its pieces of cut rows, by the r x r cores

Nothing of size n is sent and no factor is gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polar import stiefel
from polar.cut_rows import CutRows, CutRowsWay, Exchange, choose_way
from polar.gathered import gather, not_finite, scatter
from polar.shards import FactorSlice, all_reduce
from polar.steps import Field, GradientSums, Retraction
from polar.whole_rows import whole_rows_of

# Above this condition number of X^T X one multiplication in fp32 leaves an error that a second one removes.
REPEAT_CONDITION = 30.0


class Sums(NamedTuple):
    """Sums over all ranks for F factors of equal r; None where not asked for.

    `XtX` and `XtG` are (F, r, r); `GtG` (F,) is norm(G)_F^2, there when both others are. `cut_X` and `cut_G` (C, r) are
    cut rows, whole: all of them, or those that this rank holds pieces of.
    """

    XtX: Tensor | None
    XtG: Tensor | None
    GtG: Tensor | None
    cut_X: Tensor
    cut_G: Tensor | None


class EqualRankFactors:
    """F factors of equal r on one device whose rows are shared by one process group."""

    def __init__(self, slices: Sequence[FactorSlice], way: CutRowsWay = "table") -> None:
        self.slices = list(slices)
        self.r = self.slices[0].r
        self.device = self.slices[0].device
        self.cut_rows = CutRows(self.slices, way)
        self._rows = whole_rows_of(self.slices)

    def sums_numel(self, *, gram: bool, grad: bool) -> int:
        """Numbers of one phase that are summed over the ranks, without cut rows."""
        F, r = len(self.slices), self.r
        return F * r * r * (gram + grad) + F * (gram and grad)

    def local_sums(self, buffer: Tensor, tables: Tensor, *, gram: bool, grad: bool) -> Sums:
        """Write this rank's part of the sums into zeros (fp32) and return them as views.

        Args:
            buffer: (sums_numel,), for the sums over whole rows.
            tables: (1, C * r), or (2, C * r) with gradients, for the pieces of cut rows.
            gram: whether X^T X is wanted.
            grad: whether X^T G is wanted.
        """
        F, r = len(self.slices), self.r
        XtX, XtG, GtG = buffer.split([F * r * r * gram, F * r * r * grad, F * (gram and grad)])
        sums = Sums(
            XtX.view(F, r, r) if gram else None,
            XtG.view(F, r, r) if grad else None,
            GtG if gram and grad else None,
            tables[0].view(-1, r),
            tables[1].view(-1, r) if grad else None,
        )
        self._rows.add_sums(sums.XtX, sums.XtG, sums.GtG)
        self.cut_rows.read(sums.cut_X, grad=False)
        if sums.cut_G is not None:
            self.cut_rows.read(sums.cut_G, grad=True)
        return sums

    def add_cut_rows(self, sums: Sums) -> None:
        """Add the outer products of the cut rows, which are whole now."""
        if not len(self.cut_rows):
            return
        if sums.XtX is not None:
            self.cut_rows.add_products(sums.XtX, sums.cut_X, sums.cut_X)
        if sums.XtG is not None and sums.cut_G is not None:
            self.cut_rows.add_products(sums.XtG, sums.cut_X, sums.cut_G)
        if sums.GtG is not None and sums.cut_G is not None:
            self.cut_rows.add_squares(sums.GtG, sums.cut_G)

    def apply_field(self, sums: Sums, A: Tensor | None, B: Tensor) -> None:
        """Replace the local gradients by `G A + X B`; A = None stands for the identity. A, B: (F, r, r) fp32."""
        self._rows.apply_field(A, B)
        if len(self.cut_rows) and sums.cut_G is not None:
            factor = self.cut_rows.factor
            rows = sums.cut_G if A is None else (sums.cut_G[:, None] @ A[factor])[:, 0]
            self.cut_rows.write(rows + (sums.cut_X[:, None] @ B[factor])[:, 0], grad=True)

    def apply_retraction(self, sums: Sums, M: Tensor) -> None:
        """Replace the local rows by `X M`; M: (F, r, r) fp32."""
        self._rows.apply_retraction(M)
        if len(self.cut_rows):
            self.cut_rows.write((sums.cut_X[:, None] @ M[self.cut_rows.factor])[:, 0], grad=False)

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


class FactorBatch:
    """All factors of one firing that share a process group and a device, of any r.

    Args:
        slices: the factors; the same on every rank of the group, in the same order.
        way: how cut rows become whole, None: as `choose_way` says. The same on every rank.
    """

    def __init__(self, slices: Sequence[FactorSlice], way: CutRowsWay | None = None) -> None:
        self.group = slices[0].group
        self.device = slices[0].device
        self.way = choose_way(slices) if way is None else way
        by_r: dict[int, list[FactorSlice]] = {}
        for item in slices:
            by_r.setdefault(item.r, []).append(item)
        self.parts = [EqualRankFactors(items, self.way) for _, items in sorted(by_r.items())]
        self._exchange: Exchange | None = None
        if self.group is not None and self.way == "neighbours":
            self._exchange = Exchange([part.cut_rows for part in self.parts], self.group, self.device)

    def sums(self, *, gram: bool, grad: bool) -> list[Sums]:
        """Sums over all ranks, one entry per r.

        Collective where a group shares the factors: one all-reduce, after one all-to-all in the way `neighbours`.
        """
        sizes = [part.sums_numel(gram=gram, grad=grad) for part in self.parts]
        table_sizes = [len(part.cut_rows) * part.r for part in self.parts]
        buffer = torch.zeros(sum(sizes) + (1 + grad) * sum(table_sizes), dtype=torch.float32, device=self.device)
        sums_buffer, tables = buffer[: sum(sizes)], buffer[sum(sizes) :].view(1 + grad, sum(table_sizes))
        result = [
            part.local_sums(piece, table, gram=gram, grad=grad)
            for part, piece, table in zip(
                self.parts, sums_buffer.split(sizes), tables.split(table_sizes, 1), strict=True
            )
        ]
        if self._exchange is not None:
            self._exchange.complete(tables)
            self._add_cut_rows(result)
            buffer = sums_buffer
        if self.group is not None:
            all_reduce(buffer, self.group)
        if self._exchange is None:
            self._add_cut_rows(result)
        return result

    def _add_cut_rows(self, result: list[Sums]) -> None:
        for part, sums in zip(self.parts, result, strict=True):
            part.add_cut_rows(sums)

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


def batches_of(slices: Sequence[FactorSlice], way: CutRowsWay | None = None) -> list[FactorBatch]:
    """Split the factors of one firing by process group and device, in an order that is the same on every rank."""
    groups: dict[tuple[Any, ...], list[FactorSlice]] = {}
    for item in slices:
        groups.setdefault((item.group, item.device), []).append(item)
    return [FactorBatch(members, way) for members in groups.values()]


def gram_matrices(slices: Sequence[FactorSlice]) -> dict[str, Tensor]:
    """Return X^T X, (r, r) fp32, of each factor by name. Collective where a group shares the factors."""
    found: dict[str, Tensor] = {}
    with stiefel.full_precision():
        for batch in batches_of(slices):
            for part, sums in zip(batch.parts, batch.sums(gram=True, grad=False), strict=True):
                assert sums.XtX is not None
                found.update(zip((item.name for item in part.slices), sums.XtX, strict=True))
    return found


def largest_orthonormality_error(grams: Iterable[Tensor]) -> float:
    """Return the largest norm(X^T X - I)_F of matrices X^T X, (r, r) each; 0.0 for none."""
    by_r: dict[int, list[Tensor]] = {}
    for XtX in grams:
        by_r.setdefault(XtX.shape[-1], []).append(XtX.cpu())
    errors = [torch.linalg.matrix_norm(torch.stack(same) - torch.eye(r)).max().item() for r, same in by_r.items()]
    return max(errors, default=0.0)
