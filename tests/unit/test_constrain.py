"""The contract of `constrain` on one process: lifecycle, accounting, closures, loss scales, nesting, sabotage."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import polar
from polar.constrain import MAX_FOREIGN_STEPS
from polar.errors import UserError
from tests import reference
from tests.distributed import network


def make(seed: int = 0) -> nn.Sequential:
    values, weights, _ = network.make_problem(seed)
    return network.make_network(values, weights)


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "polar_X" in n or "polar_Y" in n}


def loss_of(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    _, _, batches = network.make_problem()
    h, t = (torch.tensor(a, dtype=torch.float32) for a in batches[0])
    return scale * nn.functional.mse_loss(model(h), t)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def worst_error(model: nn.Module) -> float:
    return max(
        float(np.linalg.norm(p.detach().double().numpy().T @ p.detach().double().numpy() - np.eye(p.shape[1])))
        for p in factors(model).values()
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Lifecycle


def test_unconstrained_training_leaves_the_manifold_and_constrained_does_not() -> None:
    free, bound = make(), make()
    polar.constrain(bound)
    for model in (free, bound):
        train(model, torch.optim.Adam(trainable(model), lr=0.05))
    assert worst_error(free) > 0.1
    assert worst_error(bound) < 2e-6


def test_constrain_after_the_optimizer_and_after_parameters_were_swapped() -> None:
    model = make()
    handle = polar.constrain(model)
    for module in model.modules():  # engines such as fully_shard swap Parameter objects
        if isinstance(module, nn.ParameterDict):
            module[network.ADAPTER] = nn.Parameter(module[network.ADAPTER].detach().clone())
    train(model, torch.optim.Adam(trainable(model), lr=0.05))
    assert handle.steps == 3 and worst_error(model) < 2e-6


def test_remove_ends_the_constraint_and_frees_the_factors() -> None:
    model = make()
    handle = polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)
    train(model, optimizer)
    handle.remove()
    train(model, optimizer)
    assert worst_error(model) > 0.05
    again = polar.constrain(model)
    train(model, optimizer, 1)
    assert again.steps == 1 and worst_error(model) < 2e-6


def test_hooks_go_when_the_model_goes() -> None:
    gc.collect()  # models of earlier tests
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    model = make()
    polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)
    train(model, optimizer, 1)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before


def test_two_models_two_handles() -> None:
    first, second = make(0), make(1)
    handles = polar.constrain(first), polar.constrain(second, "none")
    for model, steps in ((first, 2), (second, 3)):
        train(model, torch.optim.Adam(trainable(model), lr=0.05), steps)
    assert [handle.steps for handle in handles] == [2, 3]
    assert worst_error(first) < 2e-6 < worst_error(second)


def test_two_constraints_on_one_factor_are_an_error() -> None:
    model = make()
    polar.constrain(model)
    with pytest.raises(UserError, match="constrained already"):
        polar.constrain(nn.Sequential(model))


def test_a_model_without_factors_and_unknown_options_are_errors() -> None:
    with pytest.raises(UserError, match="no Stiefel factors"):
        polar.constrain(nn.Linear(3, 3))
    options: list[dict[str, Any]] = [
        {"manifold_step": "retract"},
        {"landing_convention": "paper"},
        {"manifold_execution": "whole"},
        {"landing_penalty": -1.0},
    ]
    for option in options:
        with pytest.raises(UserError, match=next(iter(option))):
            polar.constrain(make(), **option)


# Step accounting


def test_frozen_factors_and_lr_zero_are_fine() -> None:
    """Factors need not move to count, and those that do not train are not expected to."""
    model = make()
    handle = polar.constrain(model)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    train(model, torch.optim.Adam(trainable(model), lr=0.0))
    assert handle.num_factors == 2 * (len(network.LAYERS) - 1)
    assert handle.steps == 3
    handle.check()


def test_factors_dealt_to_several_optimizers_make_one_step() -> None:
    model = make()
    handle = polar.constrain(model)
    parameters = trainable(model)
    optimizers = [torch.optim.Adam(parameters[k::3], lr=0.05) for k in range(3)]
    for _ in range(4):
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        handle.check()
    assert handle.steps == 4 and worst_error(model) < 2e-6


def test_foreign_optimizers_are_ignored() -> None:
    model, critic = make(), nn.Linear(4, 1)
    handle = polar.constrain(model)
    other = torch.optim.SGD(critic.parameters(), lr=0.1)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)
    for _ in range(3):
        for _ in range(7):
            critic(torch.ones(2, 4)).sum().backward()
            other.step()
        train(model, optimizer, 1)
    assert handle.steps == 3


def test_a_factor_in_no_optimizer_is_named() -> None:
    model = make()
    polar.constrain(model)
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("3.polar_Y")]
    with pytest.raises(RuntimeError, match=r"1 of 10 trainable Stiefel factors .* 3\.polar_Y\.default"):
        train(model, torch.optim.Adam(chosen, lr=0.05))


def test_check_names_the_missing_factor_in_the_same_step() -> None:
    model = make()
    handle = polar.constrain(model)
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("3.polar_Y")]
    train(model, torch.optim.Adam(chosen, lr=0.05), 1)
    with pytest.raises(RuntimeError, match=r"3\.polar_Y\.default"):
        handle.check()


def test_an_optimizer_that_holds_only_theta_is_an_error() -> None:
    model = make()
    polar.constrain(model)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "Theta" in n], lr=0.05)
    with pytest.raises(RuntimeError, match="no optimizer held any of its 10 Stiefel factors"):
        train(model, optimizer)


def test_an_optimizer_of_copies_is_an_error_in_the_end_and_at_once_by_check() -> None:
    """What happens when an engine replaces the optimizer by one that steps other tensors."""
    model = make()
    handle = polar.constrain(model)
    copies = [p.detach().clone().requires_grad_() for p in trainable(model)]
    optimizer = torch.optim.Adam(copies, lr=0.05)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no optimizer reached the 10 Stiefel factors"):
        handle.check()
    with pytest.raises(RuntimeError, match="none held a Stiefel factor"):
        for _ in range(MAX_FOREIGN_STEPS):
            optimizer.step()


def test_hooks_that_somebody_removed_are_seen_by_check() -> None:
    model = make()
    handle = polar.constrain(model)
    for hook in handle._hooks:
        hook.remove()
    train(model, torch.optim.Adam(trainable(model), lr=0.05), 1)
    with pytest.raises(RuntimeError, match="no optimizer reached"):
        handle.check()
    handle.check(step_was_skipped=True)


def test_an_adapter_added_after_constrain_is_expected_to_train() -> None:
    model = make()
    handle = polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)
    train(model, optimizer, 1)
    for name in ("polar_X", "polar_Theta", "polar_Y"):
        getattr(model[1], name)["late"] = nn.Parameter(getattr(model[1], name)[network.ADAPTER].detach().clone())
    assert handle.num_factors == 12
    with pytest.raises(RuntimeError, match=r"2 of 12 .* 1\.polar_X\.late"):
        train(model, optimizer, 2)


# Closures, loss scales, nesting


def test_closure_sees_the_field_and_equals_the_plain_loop() -> None:
    plain, closed = make(), make()
    for model in (plain, closed):
        polar.constrain(model)
    train(plain, torch.optim.Adam(trainable(plain), lr=0.05))
    optimizer = torch.optim.Adam(trainable(closed), lr=0.05)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(closed)
        loss.backward()
        return loss

    for how in ("positional", "keyword", "positional"):
        optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    for name, value in snapshot(plain).items():
        assert torch.equal(snapshot(closed)[name], value), name


@pytest.mark.parametrize("step", ["retract_polar", "landing"])
def test_fused_optimizer_with_a_loss_scale_equals_no_scale(step: Any) -> None:
    """GradScaler hands fused optimizers gradients that are still multiplied, and steps that are to be left out."""
    plain, scaled = make(), make()
    for model in (plain, scaled):
        polar.constrain(model, step, landing_penalty=0.3)
    train(plain, torch.optim.AdamW(trainable(plain), lr=0.05, fused=True, weight_decay=0.0))
    optimizer = torch.optim.AdamW(trainable(scaled), lr=0.05, fused=True, weight_decay=0.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(scaled, 1024.0).backward()
        optimizer.step()
    for name, value in snapshot(plain).items():
        assert torch.allclose(snapshot(scaled)[name], value, atol=2e-5), name
    before = snapshot(scaled)
    optimizer.found_inf.fill_(1.0)  # type: ignore[attr-defined]
    optimizer.zero_grad()
    (loss_of(scaled) * torch.inf).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(scaled).items())


class Wrapper(torch.optim.Optimizer):
    """An optimizer whose step() calls the step() of another one with the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_nested_optimizers_apply_the_field_once() -> None:
    plain, nested = make(), make()
    for model in (plain, nested):
        polar.constrain(model, "landing", landing_penalty=0.3)
    train(plain, torch.optim.Adam(trainable(plain), lr=0.05))
    train(nested, Wrapper(torch.optim.Adam(trainable(nested), lr=0.05)))
    for name, value in snapshot(plain).items():
        assert torch.equal(snapshot(nested)[name], value), name


def test_a_step_that_raised_does_not_disturb_the_next() -> None:
    model = make()
    handle = polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)

    def broken() -> float:
        raise KeyError("in the user's closure")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    train(model, optimizer)
    assert handle.steps == 3 and worst_error(model) < 2e-6


# Numbers


def test_against_the_reference_with_sgd_like_large_steps() -> None:
    """lr 0.5 on unit columns: X^T X is far from I, so the retraction needs its second pass."""
    values, weights, batches = network.make_problem(seed=4)
    model = network.make_network(values, weights)
    polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.5)
    for inputs, targets in batches:
        optimizer.zero_grad()
        h, t = (torch.tensor(a, dtype=torch.float32) for a in (inputs, targets))
        nn.functional.mse_loss(model(h), t).backward()
        optimizer.step()
        assert worst_error(model) < 3e-6
    final, _, _ = reference.train(values, weights, network.SCALES, batches[:1], lr=0.5, manifold_step="retract_polar")
    fresh = network.make_network(values, weights)
    polar.constrain(fresh)
    h, t = (torch.tensor(a, dtype=torch.float32) for a in batches[0])
    optimizer = torch.optim.Adam(trainable(fresh), lr=0.5)
    nn.functional.mse_loss(fresh(h), t).backward()
    optimizer.step()
    for name, parameter in fresh.named_parameters():
        if parameter.requires_grad:
            np.testing.assert_allclose(parameter.detach(), final[name.removesuffix(".default")], atol=2e-4)


@pytest.mark.parametrize("step", ["retract_polar", "landing"])
def test_zero_theta_gives_no_first_step(step: Any) -> None:
    """With Theta = 0 the loss gradient of X and Y is exactly zero; Adam must not amplify rounding of the penalty."""
    values, weights, _ = network.make_problem()
    values = {name: value * 0 if name.endswith("Theta") else value for name, value in values.items()}
    model = network.make_network(values, weights)
    polar.constrain(model, step, landing_penalty=5.0)
    before = snapshot(model)
    train(model, torch.optim.Adam(trainable(model), lr=0.05), 1)
    for name, parameter in factors(model).items():
        assert torch.allclose(parameter, before[name], atol=1e-6), name


def test_non_finite_gradients_are_reported_and_factors_stay_orthonormal() -> None:
    model = make()
    polar.constrain(model)
    optimizer = torch.optim.Adam(trainable(model), lr=0.05)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    loss_of(model).backward()
    factors(model)["2.polar_X.default"].grad[1, 1] = torch.nan  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"1 Stiefel factors is not finite .* 2\.polar_X\.default"):
        optimizer.step()
    assert worst_error(model) < 2e-6


def test_a_step_that_loses_rank_takes_the_safe_path() -> None:
    model = make()
    polar.constrain(model)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    X = factors(model)["0.polar_X.default"]

    class Collapse(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                X[:, 1] = X[:, 0]

    with pytest.warns(UserWarning, match=r"0\.polar_X\.default lost rank"):
        Collapse(optimizer.param_groups, lr=1.0).step()
    assert worst_error(model) < 2e-6


def test_non_finite_factors_are_an_error() -> None:
    model = make()
    polar.constrain(model)

    class Explode(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                factors(model)["0.polar_X.default"].fill_(torch.inf)

    with pytest.raises(FloatingPointError, match=r"0\.polar_X\.default is not finite"):
        Explode(trainable(model), lr=1.0).step()


def test_factors_that_would_be_stepped_in_bf16_are_refused() -> None:
    """bf16 numbers near 1 are 8e-3 apart: after a step no factor would be orthonormal, and no error would say so."""
    model = make().bfloat16()
    polar.constrain(model)
    _, _, batches = network.make_problem()
    h, t = (torch.tensor(a, dtype=torch.bfloat16) for a in batches[0])
    nn.functional.mse_loss(model(h), t).backward()
    with pytest.raises(UserError, match=r"0\.polar_X\.default is stepped in bfloat16"):
        torch.optim.Adam(trainable(model), lr=0.05).step()
