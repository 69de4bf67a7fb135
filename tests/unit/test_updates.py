"""StiefelAdamW, width scaling and momentum projection on one process, against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polar
from polar.errors import UserError
from polar.stiefel_adamw import StiefelAdamW
from tests import reference
from tests.distributed import network

LR = 0.05
# fp32 against float64 over five steps; seen: 6e-5, where Adam divides an element near zero by its root mean square. An
# option left out moves elements by 1e-2.
TOLERANCE = 1e-4


def make(seed: int = 0) -> nn.Sequential:
    values, weights, _ = network.make_problem(seed)
    return network.make_network(values, weights)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    for inputs, targets in network.make_problem(seed)[2]:
        optimizer.zero_grad()
        h, t = (torch.tensor(a, dtype=torch.float32) for a in (inputs, targets))
        nn.functional.mse_loss(model(h), t).backward()
        optimizer.step()


def assert_equal(model: nn.Module, expected: dict[str, np.ndarray]) -> None:
    found = {n.removesuffix(".default"): p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].detach(), value, atol=TOLERANCE, err_msg=name)


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=LR), lambda: reference.Adam(LR)),
    "sgd": (lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), lambda: reference.Sgd(LR)),
    "stiefel_adamw": (lambda p: StiefelAdamW(p, lr=LR), lambda: reference.Adam(LR, per_factor=True)),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"project_momentum": True}, {"reference_width": 7.0}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step", ["retract_polar", "landing"])
def test_equals_the_reference(name: str, options: dict[str, Any], step: Any, seed: int) -> None:
    values, weights, batches = network.make_problem(seed)
    model = make(seed)
    ours, theirs = OPTIMIZERS[name]
    polar.constrain(model, step, landing_penalty=0.3, **options)
    train(model, ours(trainable(model)), seed)
    final, _, _ = reference.train(
        values,
        weights,
        network.SCALES,
        batches,
        optimizer=theirs(),
        manifold_step=step,
        penalty=0.3,
        **options,
    )
    assert_equal(model, final)


def test_an_update_of_stiefel_adamw_is_a_multiple_of_the_field() -> None:
    """In the first step the momentum is the field; elementwise Adam gives its signs instead."""
    cosines = {}
    for name in ("adam", "stiefel_adamw"):
        model = make()
        polar.constrain(model, "none")
        optimizer = OPTIMIZERS[name][0](trainable(model))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        h, t = (torch.tensor(a, dtype=torch.float32) for a in network.make_problem()[2][0])
        nn.functional.mse_loss(model(h), t).backward()
        optimizer.step()
        cosines[name] = [
            nn.functional.cosine_similarity((before[n] - p).reshape(-1), p.grad.reshape(-1), dim=0).item()
            for n, p in model.named_parameters()
            if "polar_X" in n and p.grad is not None and p.numel() > 3
        ]
    assert min(cosines["stiefel_adamw"]) > 1 - 1e-5
    assert max(cosines["adam"]) < 0.95


def test_stiefel_adamw_without_a_constraint_is_an_error() -> None:
    model = make()
    optimizer = StiefelAdamW(trainable(model), lr=LR)
    with pytest.raises(RuntimeError, match=r"call polar\.constrain"):
        train(model, optimizer)
    handle = polar.constrain(model)
    train(model, optimizer)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"call polar\.constrain"):
        train(model, optimizer)


def test_stiefel_adamw_inside_a_wrapper_knows_the_factors() -> None:
    plain, nested = make(), make()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__([p for group in inner.param_groups for p in group["params"]], {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    for model in (plain, nested):
        polar.constrain(model)
    train(plain, StiefelAdamW(trainable(plain), lr=LR))
    train(nested, Wrapper(StiefelAdamW(trainable(nested), lr=LR)))
    for (name, wanted), (_, found) in zip(plain.named_parameters(), nested.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_weight_decay_is_that_of_adamw() -> None:
    ours, theirs = make(), make()
    for model in (ours, theirs):
        polar.constrain(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("Theta" in name or "0.polar" in name)
    groups = [
        [
            {"params": [p for n, p in m.named_parameters() if p.requires_grad and "Theta" in n], "weight_decay": 0.3},
            {"params": [p for n, p in m.named_parameters() if p.requires_grad and "Theta" not in n], "lr": 0.0},
        ]
        for m in (ours, theirs)
    ]
    train(ours, StiefelAdamW(groups[0], lr=LR))
    train(theirs, torch.optim.AdamW(groups[1], lr=LR, weight_decay=0.0))
    for (name, wanted), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5, msg=name)


def test_momentum_that_cannot_be_projected_is_refused() -> None:
    import bitsandbytes

    model = make()
    polar.constrain(model, project_momentum=True)
    with pytest.raises(UserError, match="project_momentum needs a momentum in floating point, AdamW8bit keeps absmax1"):
        train(model, bitsandbytes.optim.AdamW8bit(trainable(model), lr=LR, min_8bit_size=1))


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_values_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="none may be negative"):
        StiefelAdamW(trainable(make()), **arguments)


def test_reference_width_must_be_positive() -> None:
    with pytest.raises(UserError, match="reference_width is 0"):
        polar.constrain(make(), reference_width=0)
