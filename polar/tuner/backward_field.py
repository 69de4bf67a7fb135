"""The field inside the layer's backward: Riemannian gradients for training loops that cannot be touched.

`polar.constrain` replaces gradients just before the optimizer steps. Where no line of the loop is ours, the adapter
does it itself (`PolarConfig.backward_field`): tangent projection and landing field are linear in the gradient G at a
fixed factor X, and X is whole inside the layer under every engine and does not change between the micro batches of a
step. So the field of each local gradient, summed over micro batches and averaged over ranks, is the field of the whole
gradient.

    field of the sum:   F(X, G_1 + ... + G_k) = F(X, G_1) + ... + F(X, G_k)    with penalty / k in each of the k terms

What differs from `constrain`, and cannot be had here:

- The penalty is no part of the loss, so nobody divides it by the number of micro batches or multiplies it by a loss
  scale: `gradient_accumulation_steps` and `loss_scale` of the configuration have to say them. A last, shorter
  accumulation has the penalty of its micro batches only.
- The penalty comes once per use of a factor with a gradient. A micro batch in which a rank leaves the layer out, or in
  which G is exactly zero, leaves its share out; a layer that is called twice in one forward pass adds it twice.
- Clipping acts on the field, in `constrain` on G. Gradients are averaged over ranks (DDP, DeepSpeed, FSDP2 do); where a
  loop sums them, the penalty is larger by the number of ranks.
- Nothing retracts: factors only stay near the manifold. `constrain(model, "retract_polar")` may be added to a tangent
  field, whose projection is idempotent. Where an engine hands bf16 copies of the factors to the layer, X^T X - I has a
  rounding of norm 1e-3 to 2e-3 (measured, n = 64 to 5376), below which the penalty cannot push.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polar import stiefel
from polar.errors import UserError

BackwardFieldName = Literal["none", "tangent", "landing"]


@dataclass(frozen=True)
class BackwardField:
    """What happens to the gradient of a factor on its way from the layer to the parameter.

    Attributes:
        name: the field.
        penalty: weight of X (X^T X - I) in one backward pass, in `convention`; landing only.
        convention: `textbook` or `upstream`, see `polar.stiefel`; landing only.
        allows_fp16: the penalty is right for gradients of fp16, which carry a loss scale.
    """

    name: BackwardFieldName = "none"
    penalty: float = 0.0
    convention: stiefel.LandingConvention = "textbook"
    allows_fp16: bool = True

    def attach(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a view of a factor (n, r) whose gradient reaches the factor as the field.

        Args:
            factor: (n, r), whole.
            dtype: that of the products it goes into; the backward raises a UserError for fp16 of unknown loss scale.
        """
        if self.name == "none" or not torch.is_grad_enabled() or not factor.requires_grad:
            return factor
        view: Tensor = _FieldOfGradient.apply(factor, self, dtype)
        return view

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse gradients of fp16 products, whose loss scale this field cannot see.

        Raises:
            UserError: fp16, and the configuration names no loss scale.
        """
        if dtype == torch.float16 and not self.allows_fp16:
            raise UserError(
                "backward_field='landing' cannot see the loss scale of fp16 training, which its penalty has to be "
                "multiplied by: train in bf16, use backward_field='tangent', or give a static scale as loss_scale"
            )


class _FieldOfGradient(torch.autograd.Function):
    """The identity, with a backward that turns the gradient G of a factor X into a field at X."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, field: BackwardField, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(X)
        ctx.field, ctx.dtype = field, dtype
        return X.view_as(X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        (X,) = ctx.saved_tensors
        field: BackwardField = ctx.field
        if field.name == "tangent":
            return _tangent_field(X, G), None, None
        field.check_dtype(ctx.dtype)
        return _landing_field(X, G, field.penalty, field.convention), None, None


# Operators of their own, because `full_precision` sets what torch.compile cannot trace: it takes an operator as it is.


@torch.library.custom_op("polar::tangent_field", mutates_args=())
def _tangent_field(X: Tensor, G: Tensor) -> Tensor:
    """Tangent projection of G at X, both (n, r), computed in fp32 at least; in the dtype of G."""
    with stiefel.full_precision():
        return stiefel.tangent_project(_at_least_fp32(X), _at_least_fp32(G)).to(G.dtype)


@torch.library.custom_op("polar::landing_field", mutates_args=())
def _landing_field(X: Tensor, G: Tensor, penalty: float, convention: str) -> Tensor:
    """Landing field of G at X, both (n, r), computed in fp32 at least; in the dtype of G; zero where G is zero.

    While Theta = 0 the loss gradient of X and Y is exactly zero, and Adam would blow the rounding of the penalty up to
    full steps.
    """
    known: stiefel.LandingConvention = "upstream" if convention == "upstream" else "textbook"  # a schema has no Literal
    with stiefel.full_precision():
        field = stiefel.landing_field(_at_least_fp32(X), _at_least_fp32(G), penalty=penalty, convention=known)
        return torch.where(G.any(), field, 0.0).to(G.dtype)


@_tangent_field.register_fake
@_landing_field.register_fake
def _like_gradient(X: Tensor, G: Tensor, penalty: float = 0.0, convention: str = "") -> Tensor:
    return torch.empty_like(G)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_applied_once(model: nn.Module, manifold_step: str) -> None:
    """Refuse a manifold step on top of a field that trainable adapters of `model` apply in their backward already.

    Allowed are `none`, which only counts, and the retractions after a tangent field: their own projection finds a
    gradient that is tangent and changes nothing.

    Args:
        model: a model with PoLAR adapters, or one without.
        manifold_step: what `polar.constrain` was asked for.

    Raises:
        UserError: the field would act twice.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "backward_field", 0), dict)]
    for layer in layers:
        for adapter, field in layer.backward_field.items():
            if layer.polar_X[adapter].requires_grad:
                check_goes_with(field.name, manifold_step, f"adapter {adapter!r}")


def check_goes_with(backward_field: BackwardFieldName, manifold_step: str, who: str) -> None:
    """Refuse a field in the backward together with a manifold step that brings a field of its own.

    Raises:
        UserError: names `who` has the field, and what goes with it.
    """
    steps = {"tangent": ("none", "retract_polar", "retract_qr"), "landing": ("none",)}.get(backward_field)
    if steps is not None and manifold_step not in steps:
        raise UserError(
            f"manifold_step is {manifold_step}, but {who} has backward_field='{backward_field}': the field would act "
            f"twice; use manifold_step {' or '.join(steps)}, or backward_field='none'"
        )
