"""The manifold steps by name: which field replaces the gradient, which retraction follows the optimizer.

    name                field                                        retraction
    retract_polar       tangent projection                           X (X^T X)^(-1/2)
    retract_qr          tangent projection                           Q of the QR decomposition (CholeskyQR2)
    landing             landing field                                none
    euclidean_penalty   G + penalty X (X^T X - I)                    none
    none                none                                         none

Each exists twice: as r x r cores, for slices of factors (`manifold_execution: sharded`), and on whole factors, in
textbook form, for `gather`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from polar import stiefel

ManifoldStepName = Literal["retract_polar", "retract_qr", "landing", "euclidean_penalty", "none"]


class GradientSums(NamedTuple):
    """What a field may depend on, for F factors: X^T X and X^T G (F, r, r), and norm(G)_F^2 (F,)."""

    XtX: Tensor | None
    XtG: Tensor
    GtG: Tensor | None


class Field(Protocol):
    """A gradient replacement, linear in G: `G A + X B`."""

    @property
    def needs_gram(self) -> bool:
        """Whether the cores need X^T X and norm(G)_F^2."""

    def cores(self, sums: GradientSums, scale: float | Tensor) -> tuple[Tensor | None, Tensor]:
        """A and B (F, r, r); A = None stands for the identity. `scale`: the gradients are multiplied by it."""

    def whole(self, X: Tensor, G: Tensor, scale: float | Tensor) -> Tensor:
        """The field of one whole factor (n, r)."""


@dataclass(frozen=True)
class TangentField:
    """G - X sym(X^T G)."""

    needs_gram = False

    def cores(self, sums: GradientSums, scale: float | Tensor) -> tuple[None, Tensor]:
        return None, stiefel.tangent_core(sums.XtG)

    def whole(self, X: Tensor, G: Tensor, scale: float | Tensor) -> Tensor:
        return stiefel.tangent_project(X, G)


@dataclass(frozen=True)
class LandingField:
    """skew(G X^T) X + penalty X (X^T X - I), without the 1/2 of skew in the `upstream` convention."""

    penalty: float
    convention: stiefel.LandingConvention
    needs_gram = True

    def cores(self, sums: GradientSums, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        assert sums.XtX is not None and sums.GtG is not None
        A, B = stiefel.landing_cores(sums.XtX, sums.XtG, penalty=self.penalty * scale, convention=self.convention)
        return A, _where_moving(B, sums.GtG)

    def whole(self, X: Tensor, G: Tensor, scale: float | Tensor) -> Tensor:
        field = stiefel.landing_field(X, G, penalty=self.penalty * scale, convention=self.convention)
        return field if G.any() else torch.zeros_like(G)


@dataclass(frozen=True)
class PenaltyField:
    """G + penalty X (X^T X - I): the gradient of the loss plus (penalty / 4) norm(X^T X - I)_F^2."""

    penalty: float
    needs_gram = True

    def cores(self, sums: GradientSums, scale: float | Tensor) -> tuple[None, Tensor]:
        assert sums.XtX is not None and sums.GtG is not None
        identity = torch.eye(sums.XtX.shape[-1], dtype=sums.XtX.dtype, device=sums.XtX.device)
        return None, _where_moving(self.penalty * scale * (sums.XtX - identity), sums.GtG)

    def whole(self, X: Tensor, G: Tensor, scale: float | Tensor) -> Tensor:
        pull = self.penalty * scale * (X @ (X.mT @ X) - X)
        return G + pull if G.any() else torch.zeros_like(G)


@dataclass(frozen=True)
class Retraction:
    """Back onto the manifold: `X core(X^T X)` on slices, `whole(X)` on a whole factor."""

    core: Callable[[Tensor], stiefel.RetractionCore]
    whole: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ManifoldStep:
    """What happens before and after an optimizer step; None where nothing does.

    Attributes:
        field: replaces the gradient.
        retraction: follows the update.
        project_momentum: then the optimizer's momentum is projected to the new tangent space.
        reference_width: before the retraction, updates are scaled by the width of the factor; see `polar.updates`.
    """

    field: Field | None
    retraction: Retraction | None
    project_momentum: bool = False
    reference_width: float | None = None


def make_step(name: ManifoldStepName, penalty: float, convention: stiefel.LandingConvention) -> ManifoldStep:
    """The manifold step of that name, without the options about the update."""
    if name == "retract_polar":
        return ManifoldStep(TangentField(), Retraction(stiefel.polar_core, stiefel.retract_polar))
    if name == "retract_qr":
        return ManifoldStep(TangentField(), Retraction(stiefel.qr_core, stiefel.retract_qr))
    if name == "landing":
        return ManifoldStep(LandingField(penalty, convention), None)
    if name == "euclidean_penalty":
        return ManifoldStep(PenaltyField(penalty), None)
    return ManifoldStep(None, None)


def _where_moving(B: Tensor, GtG: Tensor) -> Tensor:
    """No penalty where the gradient is exactly zero.

    While Theta = 0 the loss gradient of X and Y is zero, and Adam would blow the rounding of the penalty up to full
    steps: a zero gradient is no step.
    """
    return torch.where((GtG > 0)[:, None, None], B, torch.zeros_like(B))
