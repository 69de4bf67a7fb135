"""Spectra against a dense float64 SVD of the delta weight that the file describes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file

from polar.adapter_formats import read_any_adapter
from polar.errors import UserError
from polar.low_rank import singular_values, stable_rank
from polar.spectrum import adapter_spectrum

PREFIX = "base_model.model."


def orthonormal(n: int, r: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q.contiguous()


def write_adapter(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def polar_config(**changes) -> dict:
    return {"peft_type": "POLAR", "r": 4, "alpha": 16, "theta": "full", "target_modules": ["a", "b"]} | changes


def dense(weight: torch.Tensor, r: int) -> torch.Tensor:
    return torch.linalg.svdvals(weight.double())[:r]


@pytest.mark.parametrize(("m", "n", "r"), [(7, 5, 3), (30, 20, 8), (5, 9, 5), (3, 9, 4), (6, 6, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_product_equals_dense_svd(m: int, n: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    left, core, right = torch.randn(m, r), torch.randn(r, r), torch.randn(n, r)
    left[:, 0] *= 1e-3  # far from orthonormal
    values = singular_values(left, core, right)
    want = dense(left.double() @ core.double() @ right.double().T, r)
    assert values.shape == (r,)
    torch.testing.assert_close(values[: len(want)], want, rtol=1e-9, atol=1e-12 * want[0].item())
    assert values[len(want) :].abs().sum() == 0


@pytest.mark.parametrize("is_orthonormal", [True, False])
@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
def test_polar_adapter_equals_dense_svd(tmp_path, theta: str, is_orthonormal: bool) -> None:
    torch.manual_seed(0)
    config = polar_config(theta=theta, rank_pattern={"b": 2}, alpha_pattern={"b": 3.0}, use_rslora=True)
    tensors, want = {}, {}
    for seed, (name, d_out, d_in, r, s) in enumerate([("x.b", 12, 20, 2, 3 / 2**0.5), ("x.a", 16, 10, 4, 16 / 4**0.5)]):
        X, Y = orthonormal(d_out, r, seed).float(), orthonormal(d_in, r, seed + 9).float()
        if not is_orthonormal:
            # As landing leaves them in mid-training: the core alone would be wrong by about ten percent.
            X, Y = X + 0.1 * torch.randn_like(X), Y * 1.1
        Theta = {"full": torch.randn(r, r), "diagonal": torch.randn(r), "identity": None}[theta]
        square = torch.eye(r) if Theta is None else Theta if Theta.ndim == 2 else torch.diag(Theta)
        tensors |= {f"{PREFIX}{name}.polar_X": X, f"{PREFIX}{name}.polar_Y": Y}
        if Theta is not None:
            tensors[f"{PREFIX}{name}.polar_Theta"] = Theta
        want[name] = dense(s * X.double() @ square.double() @ Y.double().T, r)
    spectra = adapter_spectrum(write_adapter(tmp_path / "adapter", config, tensors))
    assert [s.name for s in spectra] == ["x.a", "x.b"]
    assert [(s.shape, s.r) for s in spectra] == [((16, 10), 4), ((12, 20), 2)]
    for spectrum in spectra:
        values = want[spectrum.name]
        torch.testing.assert_close(spectrum.singular_values, values, rtol=2e-6, atol=1e-6)
        assert spectrum.norm == pytest.approx(values.norm().item(), rel=1e-5)
        assert spectrum.stable_rank == pytest.approx((values.norm() ** 2 / values[0] ** 2).item(), rel=1e-5)


def test_lora_adapter_equals_what_peft_merges(tmp_path) -> None:
    """Independent computation: PEFT's own delta weights of the adapter that PEFT saved."""
    torch.manual_seed(1)
    layers = {"fc": torch.nn.Linear(24, 16), "out": torch.nn.Linear(16, 10)}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["fc", "out"], init_lora_weights=False,
                             rank_pattern={"out": 3}, alpha_pattern={"out": 11})  # fmt: skip
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.ModuleDict(layers)), config)
    model.save_pretrained(tmp_path / "adapter")
    spectra = adapter_spectrum(tmp_path / "adapter")
    assert [(s.name, s.r) for s in spectra] == [("0.fc", 4), ("0.out", 3)]
    for spectrum in spectra:
        layer = model.get_submodule(f"base_model.model.{spectrum.name}")
        want = dense(layer.get_delta_weight("default"), spectrum.r)
        torch.testing.assert_close(spectrum.singular_values, want, rtol=1e-5, atol=1e-6)


def test_stable_rank_at_its_ends() -> None:
    assert stable_rank(torch.tensor([0.0, 2.0, 0.0])) == 1.0
    assert stable_rank(torch.full((5,), 3e-30)) == pytest.approx(5.0)
    assert stable_rank(torch.zeros(4)) == 0.0  # an adapter at its start


def test_what_has_no_spectrum_is_refused(tmp_path) -> None:
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    cases = {
        "IA3": ({"peft_type": "IA3"}, {"x": A}),
        "no lora_B": (lora, {f"{PREFIX}q.lora_A.weight": A}),
        "need \\(r, d_in\\)": (lora, {f"{PREFIX}q.lora_A.weight": A, f"{PREFIX}q.lora_B.weight": B.T}),
        "no lora_A": (lora, {f"{PREFIX}q.weight": A}),
    }
    for number, (message, (config, tensors)) in enumerate(cases.items()):
        folder = write_adapter(tmp_path / str(number), config, tensors)
        with pytest.raises(UserError, match=message):
            adapter_spectrum(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="truncated or corrupt"):
        adapter_spectrum(folder)


def test_dora_has_the_spectrum_of_its_low_rank_part(tmp_path) -> None:
    """Independent computation: PEFT's own delta weight of a DoRA layer, which leaves the magnitudes out too."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(24, 16)), config)
    model.save_pretrained(tmp_path / "adapter")
    want = dense(model.base_model.model[0].get_delta_weight("default"), 3)
    torch.testing.assert_close(adapter_spectrum(tmp_path / "adapter")[0].singular_values, want, rtol=1e-5, atol=1e-6)
    assert "DoRA rescales the whole weight" in read_any_adapter(tmp_path / "adapter").notes[0]
