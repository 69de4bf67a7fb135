"""Two options about the update that an optimizer makes: its length by the width of a factor, and its momentum.

Width scaling (as StelLA's gradient scaling, Li et al. 2025, which acts after Adam too): an element of a Stiefel factor
of n rows has size 1 / sqrt(n), and Adam's updates have the same size for every n, so wide factors turn faster. With a
reference width c the update of a factor is multiplied by sqrt(c / n):

    X <- X_before + sqrt(c / n) (X_stepped - X_before),  then the retraction

Momentum projection (vector transport by projection, Absil, Mahony, Sepulchre 2008, sec. 8.1.3): the momentum of the
last steps lies in the tangent space where the factor was; after the retraction it is projected to that of the new X:

    m <- m - X sym(X^T m)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polar.errors import UserError
from polar.shards import FactorSlice

# How optimizers call the first moment: Adam and its relatives, SGD.
MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")


def copy_values(slices: Sequence[FactorSlice]) -> list[Tensor]:
    """Copies of the local values; n r numbers per factor over all its ranks."""
    return [item.values().clone() for item in slices]


def scale_updates(slices: Sequence[FactorSlice], before: Sequence[Tensor], reference_width: float) -> None:
    """Multiply each factor's update by sqrt(reference_width / n), in place.

    Args:
        slices: factors that an optimizer has stepped.
        before: `copy_values` of them, from before the step.
        reference_width: width c at which nothing changes, for example the hidden size.
    """
    for item, old in zip(slices, before, strict=True):
        if item.n != reference_width and item.numel:
            values = item.values()
            values.copy_(torch.lerp(old, values, math.sqrt(reference_width / item.n)))


@dataclass(frozen=True)
class MomentumSlice(FactorSlice):
    """A factor whose `grad` is the momentum that an optimizer keeps for it."""

    momentum: Callable[[], Tensor | None] = lambda: None

    def grad_storage(self) -> Tensor | None:
        tensor = self.momentum()
        if tensor is None:
            return None
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def momentum_slices(slices: Sequence[FactorSlice], optimizer: torch.optim.Optimizer) -> list[MomentumSlice]:
    """The factors with the optimizer's momentum in the place of their gradients."""
    return [
        MomentumSlice(**vars(item), momentum=lambda item=item: _momentum_of(item, optimizer))  # type: ignore[misc]
        for item in slices
    ]


def _momentum_of(item: FactorSlice, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The momentum, shaped like the leaf; None before the first step and where the optimizer has none.

    Raises:
        UserError: the optimizer keeps it in a form that cannot be projected.
    """
    state = optimizer.state.get(item.leaf, {})
    for key in MOMENTUM_KEYS:
        if state.get(key) is not None:
            return state[key]
    if state.keys() - {"step"}:
        raise UserError(
            f"project_momentum needs a momentum in floating point, {type(optimizer).__name__} keeps "
            f"{', '.join(sorted(state.keys() - {'step'}))}: use AdamW or SGD, or leave project_momentum out"
        )
    return None
