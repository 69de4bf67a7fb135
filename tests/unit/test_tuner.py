"""The PoLAR layer against W0 + s X Theta Y^T computed by numpy in float64, for every kind of Theta and base layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from polar import PolarConfig, PolarLinear
from polar.errors import UserError
from polar.tuner import restore_factor_dtype

D_IN, D_OUT = 13, 9
KINDS = ["full", "diagonal", "identity"]


class Net(nn.Module):
    """Linear 13 -> 9, tanh, linear 9 -> 4."""

    def __init__(self, dtype: torch.dtype = torch.float32, conv1d: bool = False) -> None:
        super().__init__()
        self.first = Conv1D(D_OUT, D_IN) if conv1d else nn.Linear(D_IN, D_OUT)
        self.second = nn.Linear(D_OUT, 4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float32, conv1d: bool = False, seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    options = {"r": 3, "alpha": 6, "target_modules": ["first"], "init_weights": False, **config}
    return get_peft_model(Net(dtype, conv1d), PolarConfig(**options))


def layer_of(model: nn.Module, name: str = "first") -> PolarLinear:
    layer = model.get_submodule(f"base_model.model.{name}")
    assert isinstance(layer, PolarLinear)
    return layer


def expected_delta(layer: PolarLinear, scale: float, adapter: str = "default") -> np.ndarray:
    X = layer.polar_X[adapter].detach().double().numpy()
    Y = layer.polar_Y[adapter].detach().double().numpy()
    Theta = np.eye(X.shape[1])
    if adapter in layer.polar_Theta:
        Theta = layer.polar_Theta[adapter].detach().double().numpy()
        Theta = np.diag(Theta) if Theta.ndim == 1 else Theta
    return scale * X @ Theta @ Y.T


def orthonormality_error(factor: torch.Tensor) -> float:
    F = factor.detach().double().numpy()
    return float(np.linalg.norm(F.T @ F - np.eye(F.shape[1])))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("theta", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_forward_delta_and_gradients_equal_the_formula(theta: str, conv1d: bool, seed: int) -> None:
    model = adapted(theta=theta, conv1d=conv1d, seed=seed).eval()
    layer = layer_of(model)
    delta = expected_delta(layer, scale=2.0)
    np.testing.assert_allclose(layer.get_delta_weight("default").detach(), delta.T if conv1d else delta, atol=1e-6)

    base = layer.get_base_layer()
    W = base.weight.detach().double().numpy()
    W = (W.T if conv1d else W) + delta
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    out = layer(x)
    want = x.detach().double().numpy() @ W.T + base.bias.detach().double().numpy()
    np.testing.assert_allclose(out.detach(), want, atol=1e-5)

    upstream = torch.randn_like(out)
    out.backward(upstream)
    G = np.einsum("bto,bti->oi", upstream.double().numpy(), x.detach().double().numpy())  # dL/dW
    X = layer.polar_X["default"].detach().double().numpy()
    Y = layer.polar_Y["default"].detach().double().numpy()
    Theta = np.linalg.pinv(X) @ (delta / 2.0) @ np.linalg.pinv(Y.T)
    np.testing.assert_allclose(layer.polar_X["default"].grad, 2.0 * G @ Y @ Theta.T, atol=1e-4)
    np.testing.assert_allclose(layer.polar_Y["default"].grad, 2.0 * G.T @ X @ Theta, atol=1e-4)
    if theta != "identity":
        want = 2.0 * X.T @ G @ Y
        np.testing.assert_allclose(
            layer.polar_Theta["default"].grad, np.diag(want) if theta == "diagonal" else want, atol=1e-4
        )
    np.testing.assert_allclose(x.grad, upstream.double().numpy() @ W, atol=1e-5)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("theta", KINDS)
def test_merge_equals_forward_and_unmerge_restores(theta: str, conv1d: bool, safe: bool) -> None:
    model = adapted(theta=theta, conv1d=conv1d).eval()
    x = torch.randn(7, D_IN)
    before, weight = model(x), layer_of(model).get_base_layer().weight.clone()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(layer_of(model).get_base_layer().weight, weight)
    model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).get_base_layer().weight, weight, atol=1e-6, rtol=0)


def test_a_safe_merge_of_nan_leaves_the_base_alone() -> None:
    model = adapted()
    layer = layer_of(model)
    weight = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.polar_Theta["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("rslora, scale", [(False, 12 / 3), (True, 12 / math.sqrt(3))])
def test_the_scale_is_alpha_over_r_or_over_its_root(rslora: bool, scale: float) -> None:
    layer = layer_of(adapted(alpha=12, use_rslora=rslora))
    np.testing.assert_allclose(layer.get_delta_weight("default").detach(), expected_delta(layer, scale), atol=1e-5)


def test_patterns_give_a_module_its_own_rank_and_scale() -> None:
    model = adapted(target_modules=["first", "second"], rank_pattern={"second": 2}, alpha_pattern={"second": 10})
    assert layer_of(model, "first").polar_X["default"].shape == (D_OUT, 3)
    second = layer_of(model, "second")
    assert second.polar_X["default"].shape == (4, 2) and second.polar_Y["default"].shape == (D_OUT, 2)
    np.testing.assert_allclose(second.get_delta_weight("default").detach(), expected_delta(second, 5.0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_factors_are_fp32_orthonormal_tall_and_contiguous_on_every_base(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    config = PolarConfig(r=3, target_modules=["first"], init_weights=False)
    model = get_peft_model(Net(dtype), config, autocast_adapter_dtype=autocast)
    model.add_adapter("other", config, autocast_adapter_dtype=autocast)
    layer = layer_of(model)
    for adapter in ("default", "other"):
        for factor, n in ((layer.polar_X[adapter], D_OUT), (layer.polar_Y[adapter], D_IN)):
            assert factor.shape == (n, 3) and factor.dtype == torch.float32 and factor.is_contiguous()
            assert orthonormality_error(factor) < 1e-6
    assert model(torch.randn(2, D_IN, dtype=dtype)).dtype == dtype


def test_a_bf16_base_computes_in_bf16_and_agrees_with_fp32() -> None:
    model, exact = adapted(torch.bfloat16).eval(), adapted(torch.float32).eval()
    x = torch.randn(6, D_IN)
    with torch.no_grad():
        np.testing.assert_allclose(model(x.bfloat16()).float(), exact(x), atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_allclose(exact(x).float(), exact(x.clone()).float(), atol=0)
            np.testing.assert_allclose(layer_of(exact)(x).float(), layer_of(exact)(x.bfloat16()).float(), atol=0.05)


def test_a_base_of_higher_precision_than_autocast_keeps_it() -> None:
    class Fp32Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    base = Fp32Linear(8, 8, bias=False)
    layer = PolarLinear(base, "default", PolarConfig(r=2, target_modules="x"), r=2, alpha=2.0)  # Theta = 0
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, base(x))


def test_theta_zero_starts_at_the_base_and_identity_starts_at_the_product() -> None:
    x = torch.randn(5, D_IN)
    model = adapted(init_weights=True)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    for options in ({"init_theta": "identity"}, {"init_theta": "identity", "theta": "diagonal"}, {"theta": "identity"}):
        layer = layer_of(adapted(init_weights=True, **options))
        X, Y = layer.polar_X["default"].detach(), layer.polar_Y["default"].detach()
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), 2.0 * X @ Y.T)


def test_a_seed_gives_one_start_and_another_seed_another() -> None:
    first, again, other = (layer_of(adapted(seed=seed)).polar_X["default"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_orthonormal_draws_have_no_preferred_sign() -> None:
    """LAPACK's Q has signs of its own; of 400 uniform draws half have a negative first entry (50 is 5 sigma)."""
    torch.manual_seed(0)
    config = PolarConfig(r=1, target_modules=["first"])
    layer = layer_of(get_peft_model(Net(), config))
    negative = 0
    for _ in range(400):
        layer.reset_polar_parameters("default", config)
        negative += layer.polar_Y["default"][0, 0].item() < 0
    assert abs(negative - 200) < 50


@pytest.mark.parametrize("conv1d", [False, True])
def test_svd_start_spans_the_leading_singular_vectors_of_the_base(conv1d: bool) -> None:
    layer = layer_of(adapted(conv1d=conv1d, init_factors="svd"))
    W = layer.get_base_layer().weight.detach().double().numpy()
    U, _, Vt = np.linalg.svd(W.T if conv1d else W)
    X, Y = (p.detach().double().numpy() for p in (layer.polar_X["default"], layer.polar_Y["default"]))
    np.testing.assert_allclose(np.abs(U[:, :3].T @ X), np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.abs(Vt[:3] @ Y), np.eye(3), atol=1e-5)


def test_svd_start_of_a_large_weight_finds_a_dominant_subspace() -> None:
    """Above 1024 the decomposition is randomised: a planted rank-2 part must be found, and factors stay orthonormal."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 2))[0] for n in (1100, 1200))
    base = nn.Linear(1200, 1100, bias=False)
    with torch.no_grad():
        base.weight.copy_(100 * U @ V.T + 0.01 * torch.randn(1100, 1200))
    layer = PolarLinear(base, "default", PolarConfig(r=2, target_modules="x", init_factors="svd"), r=2, alpha=2.0)
    assert torch.linalg.matrix_norm(U.T @ layer.polar_X["default"].detach(), 2).item() == pytest.approx(1, abs=1e-4)
    assert orthonormality_error(layer.polar_X["default"]) < 1e-5
    assert orthonormality_error(layer.polar_Y["default"]) < 1e-5


def test_gaussian_start_has_columns_of_expected_norm_one() -> None:
    layer = PolarLinear(
        nn.Linear(2000, 2000), "default", PolarConfig(r=8, target_modules="x", init_factors="gaussian"), r=8, alpha=8.0
    )
    norms = layer.polar_X["default"].detach().norm(dim=0)
    assert (norms - 1).abs().max() < 0.1 and orthonormality_error(layer.polar_X["default"]) > 1e-2


def test_restore_factor_dtype_undoes_a_cast_to_bf16() -> None:
    model = adapted(target_modules=["first", "second"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "polar_" in name}
    parameters = dict(model.named_parameters())
    for name in before:  # what TRL 1.16 does to the trainable parameters of a quantised base
        parameters[name].data = parameters[name].data.to(torch.bfloat16)
    assert restore_factor_dtype(model) == 4
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter is parameters[name] and parameter.dtype == torch.float32
            torch.testing.assert_close(parameter.detach(), before[name], atol=0.02, rtol=0.02)
            if "Theta" not in name:
                assert orthonormality_error(parameter) < 1e-6
    assert restore_factor_dtype(model) == 0


def test_restore_factor_dtype_does_not_orthonormalise_what_never_was_orthonormal() -> None:
    model = adapted(init_factors="gaussian")
    factor = layer_of(model).polar_X["default"]
    rounded = factor.detach().to(torch.bfloat16)
    factor.data = rounded
    assert restore_factor_dtype(model) == 1
    assert torch.equal(layer_of(model).polar_X["default"].detach(), rounded.float())


def test_a_base_on_the_meta_device_gets_factors_there_without_computing() -> None:
    with torch.device("meta"):
        base = Net()
    model = get_peft_model(base, PolarConfig(r=3, target_modules=["first"]))
    assert layer_of(model).polar_X["default"].is_meta
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (D_IN + D_OUT) + 9


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": -4}, "got -4"),
        ({"r": 2.5}, "got 2.5"),
        ({"r": True}, "got True"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": "32"}, "got '32'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"theta": "ful"}, "theta must be one of full, diagonal, identity; got 'ful'"),
        ({"init_theta": "ones"}, "init_theta must be one of zeros, identity; got 'ones'"),
        ({"init_factors": "kaiming"}, "init_factors must be one of orthonormal, gaussian, svd; got 'kaiming'"),
        ({"bias": "lora_only"}, "bias must be one of none, all, polar_only; got 'lora_only'"),
        ({"rank_pattern": {"first": 0}}, r"rank_pattern\['first'\] must be a positive integer, got 0"),
        ({"alpha_pattern": {"first": -1}}, r"alpha_pattern\['first'\] must be a positive number, got -1"),
        ({"target_modules": ".*first", "layers_to_transform": 1}, "layers_to_transform needs target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' does nothing without layers_to_transform"),
    ],
)
def test_a_bad_option_is_one_line_with_the_value(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        PolarConfig(**{"target_modules": ["first"], **options})
    assert "\n" not in str(caught.value)
