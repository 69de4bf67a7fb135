"""AdamW whose second moment is one number per Stiefel factor, so that a step keeps the direction of its momentum.

Adam divides each element of the momentum by its own root mean square: a tangent vector goes in, another direction
comes out, and most of what the tangent projection took away is back. With one second moment v per factor (Riemannian
Adam, Becigneul and Ganea 2019; on Stiefel manifolds Li, Fuxin and Todorovic 2020) the update is a multiple of the
momentum:

    m <- beta1 m + (1 - beta1) F            F: the field of the factor, from the tangent projection or landing
    v <- beta2 v + (1 - beta2) norm(F)_F^2 / (n r)
    X <- X - lr m_hat / (sqrt(v_hat) + eps)

Per element the step has the size of Adam's, so learning rates carry over. Theta and all other parameters get AdamW.

norm(F)_F^2 needs all ranks that hold rows of the factor; `polar.constrain` sends it, one number per factor, and tells
the optimizer which range of which leaf belongs to which factor. v is stored once per element, in a tensor like Adam's
exp_avg_sq: engines and checkpoints then need no rule of their own for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polar.errors import UserError
from polar.shards import FactorSlice, all_reduce


@dataclass(frozen=True)
class MeanSquare:
    """norm(F)_F^2 / (n r) of one factor: what stands in the range `[offset, offset + numel)` of its local leaf."""

    offset: int
    numel: int
    value: Tensor


def mean_squares(slices: Sequence[FactorSlice]) -> dict[int, list[MeanSquare]]:
    """Mean squares of the gradients of some factors, over all ranks, by `id` of the leaf that holds them. Collective.

    One all-reduce of one number per factor for each process group and device. A factor without gradient counts as zero.
    """
    together: dict[tuple[Any, torch.device], list[FactorSlice]] = {}
    for item in slices:
        together.setdefault((item.group, item.device), []).append(item)
    found: dict[int, list[MeanSquare]] = {}
    for (group, device), items in together.items():
        grads = [(k, grad) for k, item in enumerate(items) if (grad := item.grad()) is not None and grad.numel()]
        sums = torch.zeros(len(items), dtype=torch.float32, device=device)
        if grads:
            norms = torch._foreach_norm([grad.float() for _, grad in grads])
            sums[[k for k, _ in grads]] = torch.stack(norms).square()
        if group is not None:
            all_reduce(sums, group)
        sums /= torch.tensor([item.n * item.r for item in items], dtype=torch.float32, device=device)
        for item, value in zip(items, sums.unbind(), strict=True):
            found.setdefault(id(item.leaf), []).append(MeanSquare(item.offset, item.numel, value))
    return found


class StiefelAdamW(torch.optim.Optimizer):
    """AdamW with one second moment per Stiefel factor; see the module. It needs `polar.constrain` on the model.

    Args:
        params: as for every torch optimizer; factors may be sharded in any way that `polar.shards` knows.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, for the parameters of a group; keep it 0 for the group of the factors.

    Raises:
        UserError: a value that makes no sense.
        RuntimeError: from `step()`, when no constraint has said which parameters are factors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"StiefelAdamW with lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: none may be "
                "negative, and betas must be below 1"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._mean_squares: dict[int, list[MeanSquare]] | None = None

    def set_mean_squares(self, found: dict[int, list[MeanSquare]]) -> None:
        """Take the mean squares of the factors for the step that follows; `polar.constrain` calls it."""
        self._mean_squares = {**(self._mean_squares or {}), **found}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._mean_squares is None:
            raise RuntimeError("StiefelAdamW does not know the Stiefel factors: call polar.constrain(model) first")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        self._mean_squares = None
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        states = [self._state_of(parameter) for parameter in parameters]
        values = [_local(parameter.detach()) for parameter in parameters]
        grads = [_local(parameter.grad) for parameter in parameters]
        first, second = [_local(s["exp_avg"]) for s in states], [_local(s["exp_avg_sq"]) for s in states]
        torch._foreach_add_([s["step"] for s in states], 1.0)
        steps = [s["step"].item() for s in states]

        squares = torch._foreach_mul(grads, grads)
        assert self._mean_squares is not None
        for parameter, square in zip(parameters, squares, strict=True):
            for factor in self._mean_squares.get(id(parameter), ()):
                square.view(-1)[factor.offset : factor.offset + factor.numel] = factor.value
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_add_(second, squares, alpha=1 - beta2)

        torch._foreach_copy_(squares, second)  # the squares' memory is free now
        torch._foreach_sqrt_(squares)
        torch._foreach_div_(squares, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(squares, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(values, first, squares, [-lr / (1 - beta1**step) for step in steps])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
