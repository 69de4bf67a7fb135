"""The field in the layer's backward against the n x n textbook formulas of tests/reference.py in float64."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import polar
from polar import PolarConfig, PolarLinear
from polar.errors import UserError
from tests import reference

FIELDS: list[dict[str, Any]] = [
    {"backward_field": "tangent"},
    {"backward_field": "landing", "landing_penalty": 0.3},
    {"backward_field": "landing", "landing_penalty": 0.3, "landing_convention": "upstream"},
]
FIELD_IDS = ["tangent", "textbook", "upstream"]
# fp32 products of at most 60 terms against float64, in the Frobenius norm.
TOLERANCE = 1e-6


def textbook_field(X: np.ndarray, G: np.ndarray, options: dict[str, Any], penalty_factor: float = 1.0) -> np.ndarray:
    if options["backward_field"] == "tangent":
        return reference.tangent_project(X, G)
    convention = options.get("landing_convention", "textbook")
    return reference.landing_field(X, G, penalty_factor * options["landing_penalty"], convention)


def assert_close(got: torch.Tensor, want: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.linalg.norm(got.double().numpy() - want) < tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("options", FIELDS, ids=FIELD_IDS)
@pytest.mark.parametrize("seed, d_in, d_out, r", [(0, 13, 9, 3), (1, 60, 21, 7), (2, 5, 5, 5), (3, 40, 2, 1)])
def test_gradients_equal_the_textbook_field_of_the_hand_written_gradient(
    seed: int, d_in: int, d_out: int, r: int, options: dict[str, Any], theta: str
) -> None:
    torch.manual_seed(seed)
    config = PolarConfig(target_modules="x", init_factors="gaussian", init_weights=False, theta=theta, **options)
    layer = PolarLinear(nn.Linear(d_in, d_out), "default", config, r=r, alpha=2.0 * r)
    x, upstream = torch.randn(6, d_in), torch.randn(6, d_out)
    layer(x).backward(upstream)
    X, Y = (layer.polar_X["default"], layer.polar_Y["default"])
    Theta = layer.polar_Theta["default"].detach().double().numpy() if theta != "identity" else np.eye(r)
    Theta = np.diag(Theta) if Theta.ndim == 1 else Theta
    dW = upstream.double().numpy().T @ x.double().numpy()
    x64, y64 = (p.detach().double().numpy() for p in (X, Y))
    assert_close(X.grad, textbook_field(x64, 2.0 * dW @ y64 @ Theta.T, options))
    assert_close(Y.grad, textbook_field(y64, 2.0 * dW.T @ x64 @ Theta, options))
    if theta == "full":
        assert_close(layer.polar_Theta["default"].grad, 2.0 * x64.T @ dW @ y64)


class Net(nn.Module):
    """Linear 13 -> 9, tanh, linear 9 -> 4; `wrap` calls the first layer."""

    def __init__(self, wrap: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 9), nn.Linear(9, 4)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.wrap(self.first, x) if self.wrap else self.first(x)))


def adapted(options: dict[str, Any], wrap: Callable[..., torch.Tensor] | None = None, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    net = Net(wrap)
    # "gaussian" factors are far enough off the manifold for the penalty to count.
    config = PolarConfig(
        r=3, alpha=6, target_modules=["first", "second"], init_factors="gaussian", init_weights=False, **options, **more
    )
    return get_peft_model(net, config)


def run_plain(model: PeftModel, x: torch.Tensor) -> None:
    model(x).square().sum().backward()


def run_in_autocast(model: PeftModel, x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()  # the backward too, as careless loops do


def run_two_micro_batches(model: PeftModel, x: torch.Tensor) -> None:
    for rows in x.chunk(2):
        (model(rows).square().sum() / 2).backward()


def run_bf16_base(model: PeftModel, x: torch.Tensor) -> None:
    for module in (m for m in model.modules() if type(m) is nn.Linear):
        module.to(torch.bfloat16)
    model(x.bfloat16()).float().square().sum().backward()


def run_fp16_with_a_loss_scale(model: PeftModel, x: torch.Tensor) -> None:
    for module in (m for m in model.modules() if type(m) is nn.Linear):
        module.to(torch.float16)
    (8.0 * model(x.half()).float().square().sum()).backward()


def run_mixed_batch(model: PeftModel, x: torch.Tensor) -> None:
    model.eval()(x, adapter_names=["default", "__base__"] * (len(x) // 2)).square().sum().backward()


def reentrant(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x.requires_grad_(), use_reentrant=True)


def recomputed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x, use_reentrant=False)


CONTEXTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"run": run_in_autocast},
    "bf16 base": {"run": run_bf16_base},
    "reentrant checkpointing": {"wrap": reentrant},
    "checkpointing": {"wrap": recomputed},
    "mixed batch": {"run": run_mixed_batch},
    "accumulation": {"run": run_two_micro_batches, "landing": {"gradient_accumulation_steps": 2}},
    "loss scale": {"run": run_fp16_with_a_loss_scale, "landing": {"loss_scale": 8.0}, "penalty_factor": 8.0},
}


@pytest.mark.parametrize("options", FIELDS, ids=FIELD_IDS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_in_every_context_the_gradient_is_the_field_of_the_gradient_without_it(
    name: str, options: dict[str, Any]
) -> None:
    context = CONTEXTS[name]
    more = context.get("landing", {}) if options["backward_field"] == "landing" else {}
    models = [adapted({}, context.get("wrap")), adapted(options, context.get("wrap"), **more)]
    torch.manual_seed(1)
    x = torch.randn(6, 13)
    for model in models:
        context.get("run", run_plain)(model, x.clone())
    plain, ours = (dict(model.named_parameters()) for model in models)
    for key, parameter in plain.items():
        if parameter.grad is None:
            continue
        want = parameter.grad.double().numpy()
        if "polar_Theta" not in key:
            value = parameter.detach().double().numpy()
            want = textbook_field(value, want, options, context.get("penalty_factor", 1.0))
        assert_close(ours[key].grad, want)
    assert sum(p.grad is not None for p in plain.values()) == 6


@pytest.mark.parametrize("options", FIELDS, ids=FIELD_IDS)
def test_a_quantised_base_has_the_same_field(options: dict[str, Any]) -> None:
    import bitsandbytes

    gradients = []
    for chosen in ({}, options):
        torch.manual_seed(0)
        base = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        base.weight = bitsandbytes.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
        config = PolarConfig(target_modules="x", init_factors="gaussian", init_weights=False, **chosen)
        layer = PolarLinear(base.to("cpu"), "default", config, r=4, alpha=4.0)
        assert layer.quantization_backend is not None
        layer(torch.randn(5, 64)).square().sum().backward()
        gradients.append(layer.polar_X["default"].grad)
    value = layer.polar_X["default"].detach().double().numpy()
    assert_close(gradients[1], textbook_field(value, gradients[0].double().numpy(), options))


def test_each_of_several_active_adapters_has_the_field_of_its_own_configuration() -> None:
    plain, ours = adapted({}), adapted(FIELDS[0])
    for model, options in ((plain, {}), (ours, FIELDS[2])):
        torch.manual_seed(2)
        second = PolarConfig(r=2, target_modules=["first"], init_factors="gaussian", init_weights=False, **options)
        model.add_adapter("second", second)
        model.base_model.set_adapter(["default", "second"])
        run_plain(model, torch.randn(4, 13))
    for adapter, options in (("default", FIELDS[0]), ("second", FIELDS[2])):
        name = f"base_model.model.first.polar_X.{adapter}"
        X, G = plain.get_parameter(name), plain.get_parameter(name).grad
        want = textbook_field(X.detach().double().numpy(), G.double().numpy(), options)
        assert_close(ours.get_parameter(name).grad, want)
    ours.delete_adapter("second")
    assert list(ours.base_model.model.first.backward_field) == ["default"]


def test_the_penalty_does_not_act_while_the_gradient_is_zero() -> None:
    """Theta = 0: the loss gradient of X and Y is exactly zero; Adam would turn a penalty of 1e-7 into whole steps."""
    config = PolarConfig(r=3, target_modules=["first"], init_factors="gaussian", **FIELDS[1])  # Theta starts at zero
    model = get_peft_model(Net(), config)
    run_plain(model, torch.randn(4, 13))
    layer = model.base_model.model.first
    assert not layer.polar_X["default"].grad.any() and not layer.polar_Y["default"].grad.any()
    assert layer.polar_Theta["default"].grad.any()


def test_the_penalty_comes_once_per_use_of_the_layer() -> None:
    """The documented limits: one of two micro batches without the layer, and one forward pass that calls it twice."""
    torch.manual_seed(4)
    x, other = torch.randn(2, 4, 13)
    for accumulation, inputs, penalty_factor in ((2, [x], 0.5), (1, [x, other], 2.0)):
        plain = adapted({}).base_model.model.first
        ours = adapted(FIELDS[1], gradient_accumulation_steps=accumulation).base_model.model.first
        for layer in (plain, ours):
            sum(layer(each).square().sum() for each in inputs).backward()
        X, G = plain.polar_X["default"].detach(), plain.polar_X["default"].grad
        want = textbook_field(X.double().numpy(), G.double().numpy(), FIELDS[1], penalty_factor)
        assert_close(ours.polar_X["default"].grad, want)


def test_without_gradients_the_forward_is_untouched() -> None:
    x = torch.randn(3, 13)
    with torch.no_grad():
        assert torch.equal(adapted({})(x), adapted(FIELDS[1])(x))


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    model = adapted(FIELDS[1])
    factor = model.get_parameter("base_model.model.first.polar_X.default")
    (gradient,) = torch.autograd.grad(model(torch.randn(2, 13)).sum(), factor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_fp16_without_a_loss_scale_is_refused_for_landing_only() -> None:
    x = torch.randn(6, 13)
    with pytest.raises(UserError, match="loss scale of fp16") as caught:
        run_fp16_with_a_loss_scale(adapted(FIELDS[1]), x)
    assert "\n" not in str(caught.value)
    model = adapted(FIELDS[1])
    with pytest.raises(UserError, match="loss scale of fp16"), torch.autocast("cpu", torch.float16):
        model(x).float().square().sum().backward()
    with torch.autocast("cpu", torch.float16):
        model(x)  # a forward pass alone is no training
    run_fp16_with_a_loss_scale(adapted(FIELDS[0]), x)  # a tangent projection does not see the scale


def test_the_options_are_saved_with_the_adapter_and_come_back(tmp_path: Path) -> None:
    options = {**FIELDS[2], "gradient_accumulation_steps": 4, "loss_scale": 128.0}
    adapted(options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: saved[key] for key in options} == options
    config = PeftConfig.from_pretrained(tmp_path)
    assert {key: getattr(config, key) for key in options} == options
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    field = loaded.base_model.model.first.backward_field["default"]
    assert (field.penalty, field.convention) == (0.3 * 128 / 4, "upstream")


def test_an_adapter_saved_before_these_options_existed_has_no_field(tmp_path: Path) -> None:
    adapted({}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for key in ("backward_field", "landing_penalty", "landing_convention", "gradient_accumulation_steps", "loss_scale"):
        del saved[key]
    path.write_text(json.dumps(saved))
    assert PeftModel.from_pretrained(Net(), tmp_path).base_model.model.first.backward_field["default"].name == "none"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backward_field": "land"}, "backward_field must be one of none, tangent, landing; got 'land'"),
        ({"backward_field": "landing"}, "landing_penalty must be a positive number, got None"),
        ({"backward_field": "landing", "landing_penalty": 0}, "landing_penalty must be a positive number, got 0"),
        ({"backward_field": "landing", "landing_penalty": float("inf")}, "got inf"),
        ({"landing_penalty": 0.3}, "landing_penalty=0.3 does nothing with backward_field='none'"),
        ({"backward_field": "tangent", "landing_convention": "upstream"}, "does nothing with backward_field='tangent'"),
        ({"backward_field": "tangent", "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 does nothing"),
        ({**FIELDS[1], "landing_convention": "paper"}, "landing_convention must be one of textbook, upstream"),
        ({**FIELDS[1], "gradient_accumulation_steps": 0}, "must be an integer from 1 on, got 0"),
        ({**FIELDS[1], "gradient_accumulation_steps": 2.0}, "must be an integer from 1 on, got 2.0"),
        ({**FIELDS[1], "loss_scale": -1}, "loss_scale must be a positive number, got -1"),
    ],
)
def test_a_bad_option_is_one_line_with_the_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        PolarConfig(target_modules=["first"], **options)
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def constrained(model: nn.Module, manifold_step: Any) -> Iterator[polar.ManifoldHandle]:
    handle = polar.constrain(model, manifold_step)
    try:
        yield handle
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "options, manifold_step",
    [
        (FIELDS[0], "landing"),
        (FIELDS[0], "euclidean_penalty"),
        (FIELDS[1], "landing"),
        (FIELDS[1], "retract_polar"),
        (FIELDS[1], "retract_qr"),
        (FIELDS[1], "euclidean_penalty"),
    ],
)
def test_constrain_refuses_to_apply_a_field_twice(options: dict[str, Any], manifold_step: Any) -> None:
    model = adapted(options)
    words = f"manifold_step is {manifold_step}, but adapter 'default' has backward_field='{options['backward_field']}'"
    with pytest.raises(UserError, match=words) as caught:
        polar.constrain(model, manifold_step)
    assert "\n" not in str(caught.value)
    with constrained(model, "none"):  # the refusal left no claim behind
        pass


def test_constrain_ignores_the_field_of_an_adapter_until_it_is_trained() -> None:
    model = adapted(FIELDS[1])
    model.add_adapter("second", PolarConfig(r=2, target_modules=["first"]))
    model.set_adapter("second")
    with constrained(model, "retract_polar"):
        model.set_adapter("default")  # from now on it is
        run_plain(model, torch.randn(4, 13))
        with pytest.raises(UserError, match="the field would act twice"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_retraction_after_a_tangent_field_is_the_step_of_constrain_alone() -> None:
    finals = []
    for options in ({}, FIELDS[0]):
        model = adapted(options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "polar_X" in name or "polar_Y" in name:
                    parameter.copy_(torch.linalg.qr(parameter)[0])
        with constrained(model, "retract_polar") as handle:
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
            torch.manual_seed(3)
            for _ in range(5):
                optimizer.zero_grad()
                run_plain(model, torch.randn(6, 13))
                optimizer.step()
            assert handle.steps == 5 and handle.orthonormality_error() < 3e-6
        finals.append({name: p.detach() for name, p in model.named_parameters()})
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, atol=1e-5, rtol=0)
