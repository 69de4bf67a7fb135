"""`manifold_execution: gather`: each factor whole on every rank, textbook formulas, then everybody keeps its part.

The reference for the sharded execution, which must equal it, and what a user would write with GatheredParameters. It
sends n r numbers per factor and phase where the sums need r x r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polar.shards import FactorSlice, all_reduce
from polar.steps import Field, Retraction


class GatheredBatch:
    """The factors of one firing, handled one after the other. Every method is collective."""

    def __init__(self, slices: Sequence[FactorSlice]) -> None:
        self.slices = list(slices)

    def apply_field(self, field: Field, scale: float | Tensor) -> list[str]:
        """Replace the gradients by the field; returns the names of factors whose gradient was not finite (set to 0)."""
        bad = []
        for item in self.slices:
            grad = item.grad()
            has_grad = torch.tensor(float(grad is not None), device=item.device)
            if item.group is not None:
                all_reduce(has_grad, item.group)
            if not has_grad:
                continue
            X, G = gather(item, item.values()), gather(item, grad)
            replacement = field.whole(X, G, scale)
            if not G.isfinite().all():
                bad.append(item.name)
                replacement = torch.zeros_like(G)
            if grad is not None:
                grad.copy_(replacement.reshape(-1)[item.start : item.end])
        return bad

    def retract(self, retraction: Retraction) -> None:
        """Retract the factors.

        Raises:
            FloatingPointError: a factor is not finite.
        """
        for item in self.slices:
            X = gather(item, item.values())
            if not X.isfinite().all():
                raise FloatingPointError(not_finite(item.name))
            scatter(item, retraction.whole(X))


def gather(item: FactorSlice, local: Tensor | None) -> Tensor:
    """The whole (n, r) fp32 matrix whose part on this rank is `local` (None: zeros). Collective; sends n r numbers."""
    whole = torch.zeros(item.n * item.r, dtype=torch.float32, device=item.device)
    if local is not None:
        whole[item.start : item.end] = local.float()
    if item.group is not None:
        all_reduce(whole, item.group)
    return whole.view(item.n, item.r)


def scatter(item: FactorSlice, whole: Tensor) -> None:
    """Write this rank's part of a whole factor (n, r)."""
    item.values().copy_(whole.reshape(-1)[item.start : item.end])


def not_finite(name: str) -> str:
    """The message for a factor that the optimizer destroyed."""
    return f"{name} is not finite after the optimizer step: lower the learning rate or clip gradients"
