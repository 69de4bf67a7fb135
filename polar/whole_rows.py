"""Products over the whole rows that a rank holds: X^T X and X^T G, G A + X B, X M, for many factors of equal r.

Two ways, same results: `OneByOne` for CPUs, where a factor should stay in the cache between its sum and its product,
and `Stacked` for accelerators, where a kernel launch costs more than the copy that lets equal shapes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from polar.shards import FactorSlice

# One stack of X and one of G together; bounds the scratch memory on an accelerator.
STACK_BYTES = 64 * 2**20
# Elements of X that stay in a cache, with as many of G, between their sum and their product.
CACHE_NUMEL = 2**20
# Rows of one block of an inner product on a CPU with several threads.
BLOCK_ROWS = 512


class WholeRows(Protocol):
    """What FactorBatch needs; index k of every (F, r, r) argument belongs to the k-th slice."""

    def add_sums(self, XtX: Tensor | None, XtG: Tensor | None, GtG: Tensor | None) -> None:
        """Write X^T X, X^T G (F, r, r) and norm(G)_F^2 (F,); a factor without gradient or rows is left as it is."""

    def apply_field(self, A: Tensor | None, B: Tensor) -> None:
        """Gradients become G A + X B in place; A = None stands for the identity."""

    def apply_retraction(self, M: Tensor) -> None:
        """Values become X M in place."""

    def project(self, XtG: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        """Where no other rank adds to the sums: write X^T G, and gradients become G + X core(X^T G)."""

    def retract(self, XtX: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        """Where no other rank adds to the sums: write X^T X, and values become X core(X^T X)."""


def whole_rows_of(slices: Sequence[FactorSlice]) -> WholeRows:
    """The way that suits the device of the slices."""
    return OneByOne(slices) if slices[0].device.type == "cpu" else Stacked(slices)


def whole_row_range(item: FactorSlice) -> tuple[int, int]:
    """Range of the slice, relative to its start, made of rows that no rank boundary cuts; empty as (numel, numel).

    A slice begins and ends at boundaries, so only its first and its last row can be cut.
    """
    first = -(-item.start // item.r) * item.r - item.start
    last = item.end // item.r * item.r - item.start
    return (first, last) if last > first else (item.numel, item.numel)


class _Views:
    """Row views (m, r) of values and gradients; those of values are kept, because engines keep their buffers."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self.slices = list(slices)
        self._ranges = [whole_row_range(item) for item in slices]
        self.held = [k for k, (first, last) in enumerate(self._ranges) if last > first]
        self._values: dict[int, Tensor] = {}
        self._pointers: dict[int, int] = {}

    def rows(self, k: int) -> int:
        first, last = self._ranges[k]
        return (last - first) // self.slices[k].r

    def values(self, k: int) -> Tensor:
        item = self.slices[k]
        storage = item.storage()
        pointer = storage.data_ptr()
        if self._pointers.get(k) != pointer:
            self._values[k] = self._cut(item.values(), k)
            self._pointers[k] = pointer
        return self._values[k]

    def grad(self, k: int) -> Tensor | None:
        item = self.slices[k]
        storage = item.grad_storage()
        if storage is None:
            return None
        if storage.dim() == 2 and item.numel == storage.numel():
            return storage  # nothing but whole rows of this factor: no view to make
        flat = item.grad()
        assert flat is not None
        return self._cut(flat, k)

    def _cut(self, flat: Tensor, k: int) -> Tensor:
        first, last = self._ranges[k]
        return flat[first:last].view(-1, self.slices[k].r)


class OneByOne:
    """One factor after the other, in place where its dtype is fp32."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self._views = _Views(slices)
        r = slices[0].r
        self._scratch = torch.empty(max(map(self._views.rows, self._views.held), default=0), r)
        self._groups = self._plan()

    def add_sums(self, XtX: Tensor | None, XtG: Tensor | None, GtG: Tensor | None) -> None:
        XtX_of, XtG_of = (None if sums is None else sums.unbind() for sums in (XtX, XtG))
        for k in self._views.held:
            X = self._views.values(k).float()
            if XtX_of is not None:
                _inner_products(X, X, XtX_of[k])
            grad = None if XtG_of is None else self._views.grad(k)
            if grad is None:
                continue
            G = grad.float()
            assert XtG_of is not None
            _inner_products(X, G, XtG_of[k])
            if GtG is not None:
                torch.dot(G.view(-1), G.view(-1), out=GtG[k])

    def apply_field(self, A: Tensor | None, B: Tensor) -> None:
        for k in self._views.held:
            grad = self._views.grad(k)
            if grad is None:
                continue
            X, G = self._views.values(k).float(), grad.float()
            field = G.addmm_(X, B[k]) if A is None else self._product(G, A[k]).addmm_(X, B[k])
            if field is not grad:
                grad.copy_(field)

    def apply_retraction(self, M: Tensor) -> None:
        for k in self._views.held:
            X = self._views.values(k)
            X.copy_(self._product(X.float(), M[k]))

    def project(self, XtG: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        XtG_of = XtG.unbind()
        for begin, end in self._groups:
            held = []
            for k in range(begin, end):
                grad = self._views.grad(k)
                if grad is not None:
                    X, G = self._views.values(k).float(), grad.float()
                    _inner_products(X, G, XtG_of[k])
                    held.append((k, X, G, grad))
            cores = core(XtG[begin:end]).unbind()
            for k, X, G, grad in held:
                field = G.addmm_(X, cores[k - begin])
                if field is not grad:
                    grad.copy_(field)

    def retract(self, XtX: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        XtX_of = XtX.unbind()
        for begin, end in self._groups:
            values = [self._views.values(k) for k in range(begin, end)]
            rows = [value.float() for value in values]
            for k, X in zip(range(begin, end), rows, strict=True):
                _inner_products(X, X, XtX_of[k])
            for value, X, M in zip(values, rows, core(XtX[begin:end]).unbind(), strict=True):
                value.copy_(self._product(X, M))

    def _product(self, rows: Tensor, core: Tensor) -> Tensor:
        return torch.mm(rows, core, out=self._scratch[: rows.shape[0]])

    def _plan(self) -> list[tuple[int, int]]:
        """Ranges of consecutive factors that fit in the cache together."""
        groups, begin, numel = [], 0, 0
        for k, item in enumerate(self._views.slices):
            if k > begin and numel + item.numel > CACHE_NUMEL:
                groups.append((begin, k))
                begin, numel = k, 0
            numel += item.numel
        return [*groups, (begin, len(self._views.slices))]


def _inner_products(A: Tensor, B: Tensor, out: Tensor) -> None:
    """A^T B (r, r) of tall matrices (m, r), by blocks of rows, which threads can share."""
    blocks = A.shape[0] // BLOCK_ROWS
    if blocks < 2 or torch.get_num_threads() == 1:
        torch.mm(A.T, B, out=out)
        return
    rows, r = blocks * BLOCK_ROWS, A.shape[1]
    products = torch.bmm(A[:rows].view(blocks, BLOCK_ROWS, r).mT, B[:rows].view(blocks, BLOCK_ROWS, r))
    torch.sum(products, 0, out=out)
    if rows < A.shape[0]:
        out.addmm_(A[rows:].T, B[rows:])


class Stacked:
    """Factors with equal numbers of rows in one batched product each, at most STACK_BYTES at a time."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self._views = _Views(slices)
        self._chunks = self._plan()

    def add_sums(self, XtX: Tensor | None, XtG: Tensor | None, GtG: Tensor | None) -> None:
        for chunk in self._chunks:
            if XtX is not None:
                index, X = self._stack(chunk, [self._views.values(k) for k in chunk], XtX)
                XtX[index] = torch.bmm(X.mT, X)
            if XtG is None:
                continue
            chunk, grads = self._with_grad(chunk)
            if chunk:
                index, G = self._stack(chunk, grads, XtG)
                X = X if XtX is not None and len(chunk) == len(X) else self._stack_values(chunk)
                XtG[index] = torch.bmm(X.mT, G)
                if GtG is not None:
                    GtG[index] = G.square().sum((1, 2))

    def apply_field(self, A: Tensor | None, B: Tensor) -> None:
        for whole_chunk in self._chunks:
            chunk, grads = self._with_grad(whole_chunk)
            if chunk:
                index, G = self._stack(chunk, grads, B)
                product = G if A is None else torch.bmm(G, A[index])
                torch._foreach_copy_(grads, list(product.baddbmm_(self._stack_values(chunk), B[index]).unbind()))

    def apply_retraction(self, M: Tensor) -> None:
        for chunk in self._chunks:
            views = [self._views.values(k) for k in chunk]
            index, X = self._stack(chunk, views, M)
            torch._foreach_copy_(views, list(torch.bmm(X, M[index]).unbind()))

    def project(self, XtG: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        for whole_chunk in self._chunks:
            chunk, grads = self._with_grad(whole_chunk)
            if chunk:
                index, G = self._stack(chunk, grads, XtG)
                X = self._stack_values(chunk)
                XtG[index] = torch.bmm(X.mT, G)
                torch._foreach_copy_(grads, list(G.baddbmm_(X, core(XtG[index])).unbind()))

    def retract(self, XtX: Tensor, core: Callable[[Tensor], Tensor]) -> None:
        for chunk in self._chunks:
            views = [self._views.values(k) for k in chunk]
            index, X = self._stack(chunk, views, XtX)
            XtX[index] = torch.bmm(X.mT, X)
            torch._foreach_copy_(views, list(torch.bmm(X, core(XtX[index])).unbind()))

    def _with_grad(self, chunk: list[int]) -> tuple[list[int], list[Tensor]]:
        pairs = [(k, grad) for k in chunk if (grad := self._views.grad(k)) is not None]
        return [k for k, _ in pairs], [grad for _, grad in pairs]

    def _stack_values(self, chunk: list[int]) -> Tensor:
        return torch.stack([self._views.values(k) for k in chunk]).float()

    @staticmethod
    def _stack(chunk: list[int], views: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(chunk, device=like.device), torch.stack(views).float()

    def _plan(self) -> list[list[int]]:
        by_rows: dict[int, list[int]] = {}
        for k in self._views.held:
            by_rows.setdefault(self._views.rows(k), []).append(k)
        chunks = []
        for rows, members in by_rows.items():
            size = max(1, STACK_BYTES // (8 * rows * self._views.slices[0].r))
            chunks += [members[begin : begin + size] for begin in range(0, len(members), size)]
        return chunks
