"""What the log says of the adapter against dense float64; engines are in tests/distributed/test_constrain.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import polar
from polar.live_spectrum import LiveSpectrum, stable_ranks
from polar.progress import describe_step


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5), nn.Linear(5, 7))


def dense_median(model: nn.Module) -> float:
    ranks = []
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight"):
            S = np.linalg.svd(layer.get_delta_weight("default").detach().double().numpy(), compute_uv=False)
            ranks += [np.square(S / S[0]).sum()] if S[0] > 0 else []
    return float(np.median(ranks))


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("is_orthonormal", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_median_stable_rank_of_polar(theta: str, is_orthonormal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    config = polar.PolarConfig(
        r=4, target_modules=["0", "2", "3"], theta=theta, init_weights=False, rank_pattern={"3": 2}, alpha=3,
        init_factors="orthonormal" if is_orthonormal else "gaussian",
    )  # fmt: skip
    model = get_peft_model(network(), config)
    handle = polar.constrain(model)
    measured = LiveSpectrum(model, handle).measure()
    assert measured["stable_rank"] == pytest.approx(dense_median(model), rel=1e-5)
    assert measured["orthonormality_error"] == handle.orthonormality_error()
    assert (measured["orthonormality_error"] < 1e-5) == is_orthonormal
    handle.remove()


@pytest.mark.parametrize("use_dora", [False, True])
def test_median_stable_rank_of_lora(use_dora: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(network(), config)
    assert LiveSpectrum(model, None).measure() == {"stable_rank": pytest.approx(dense_median(model), rel=1e-5)}
    start = get_peft_model(network(), LoraConfig(r=3, target_modules=["0", "2"]))
    assert LiveSpectrum(start, None).measure() == {}  # B = 0


def test_modules_that_have_not_moved_do_not_count_and_another_adapter_is_found() -> None:
    torch.manual_seed(0)
    config = polar.PolarConfig(r=4, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(network(), config)
    handle = polar.constrain(model)
    live = LiveSpectrum(model, handle)
    first = model.base_model.model[0]
    with torch.no_grad():
        first.polar_Theta["default"].zero_()
    S = np.linalg.svd(model.base_model.model[2].get_delta_weight("default").detach().numpy(), compute_uv=False)
    assert live.measure()["stable_rank"] == pytest.approx(np.square(S).sum() / S[0] ** 2, rel=1e-5)
    model.add_adapter("second", polar.PolarConfig(r=2, target_modules=["0"], init_weights=False))
    model.set_adapter("second")
    S = np.linalg.svd(first.get_delta_weight("second").detach().numpy(), compute_uv=False)
    assert live.measure()["stable_rank"] == pytest.approx(np.square(S).sum() / S[0] ** 2, rel=1e-5)
    handle.remove()


def test_tiny_and_broken_delta_weights() -> None:
    tiny = 1e-25 * torch.eye(3)
    assert stable_ranks([(None, tiny, None)]) == [pytest.approx(3.0)]
    assert stable_ranks([(tiny, torch.eye(3), tiny)]) == [pytest.approx(3.0)]
    assert stable_ranks([(None, torch.full((2, 2), torch.nan), None)]) == []


def test_the_line_shows_it() -> None:
    assert "stable rank 2.50" in describe_step({"loss": 1.0, "stable_rank": 2.5})
