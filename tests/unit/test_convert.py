"""`polar convert` and `polar combine` against dense delta weights in float64: numpy's SVD, PEFT's own LoRA layers."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from polar import combine as combine_module
from polar import convert as convert_module
from polar.adapter_file import read_adapter
from polar.adapter_formats import read_any_adapter
from polar.combine import combine
from polar.convert import convert
from polar.errors import UserError
from polar.export import export_lora
from polar.upstream import holds_polar
from polar_eval import score
from tests.tiny_models import write_adapter

# Uneven: wide, tall, square; ranks that differ by module.
SIZES = {"l.0.q_proj": (24, 16), "l.1.q_proj": (12, 30), "l.1.down_proj": (9, 9)}
PATTERNS: dict[str, Any] = {"rank_pattern": {"l.1.q_proj": 3}, "alpha_pattern": {"l.1.q_proj": 5.0}}
PREFIX = "base_model.model."
EXACT = {"rtol": 1e-5, "atol": 2e-6}


def dense(folder: Path) -> dict[str, np.ndarray]:
    """dW by module, computed here from the documented format of a PoLAR folder and not by the code under test."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {key: value.double().numpy() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for key in [key for key in tensors if key.endswith(".polar_X")]:
        name = key.removesuffix(".polar_X").removeprefix(PREFIX)

        def lookup(pattern: str, default: float, name: str = name) -> float:
            fits = [v for k, v in config[pattern].items() if re.match(rf"(.*\.)?({k})$", name)]
            return fits[0] if fits else default

        r, alpha = lookup("rank_pattern", config["r"]), lookup("alpha_pattern", config["alpha"])
        X, Theta, Y = (tensors[f"{PREFIX}{name}.polar_{part}"] for part in ("X", "Theta", "Y"))
        assert X.shape[1] == Y.shape[1] == r and Theta.shape == (r, r)
        for factor in (X, Y):  # on the manifold
            np.testing.assert_allclose(factor.T @ factor, np.eye(int(r)), atol=1e-6)
        found[name] = alpha / (math.sqrt(r) if config["use_rslora"] else r) * X @ Theta @ Y.T
    return found


def write_lora(folder: Path, sizes: dict[str, tuple[int, int]], r: int = 4, seed: int = 0, **config: Any) -> dict:
    """A LoRA folder as PEFT lays it out; returns dW = s B A by module in float64."""
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | config
    tensors, deltas = {}, {}
    for name, (d_out, d_in) in sizes.items():
        rank = config.get("rank_pattern", {}).get(name, r)
        alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        s = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        deltas[name] = s * B.double().numpy() @ A.double().numpy()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_becomes_polar_and_lora_again(tmp_path: Path, seed: int, use_rslora: bool) -> None:
    want = write_lora(tmp_path / "lora", SIZES, seed=seed, use_rslora=use_rslora, **PATTERNS)
    report = convert(tmp_path / "lora", tmp_path / "polar")
    assert report["relative_error"] == 0 and report["r"] == {"min": 3, "max": 4}
    found = dense(tmp_path / "polar")
    export_lora(tmp_path / "polar", tmp_path / "back", canary=False)
    back = read_any_adapter(tmp_path / "back").modules
    for name, delta in want.items():
        np.testing.assert_allclose(found[name], delta, **EXACT)
        module = back[name]
        np.testing.assert_allclose(module.X.double() @ module.core() @ module.Y.double().T, delta, **EXACT)


def test_a_model_gives_the_same_logits_with_peft_lora_and_its_conversion(tmp_path: Path) -> None:
    """PEFT makes, saves and loads both: only the conversion is ours."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 5))
    config = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["0", "2"], init_lora_weights=False)
    lora = peft.get_peft_model(layers, config)
    x = torch.randn(7, 12)
    want = lora(x)
    lora.save_pretrained(tmp_path / "lora")
    convert(tmp_path / "lora", tmp_path / "polar")
    ours = peft.PeftModel.from_pretrained(lora.unload(), str(tmp_path / "polar"))
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_truncation_is_numpys_best_approximation_with_the_error_it_reports(tmp_path: Path, theta: str, r: int) -> None:
    deltas = write_adapter(tmp_path / "a", SIZES, theta=theta, use_rslora=True, seed=r, **PATTERNS)
    report = convert(tmp_path / "a", tmp_path / "b", r=r)
    lost = total = 0.0
    for name, found in dense(tmp_path / "b").items():
        delta = deltas[name].numpy()
        U, S, Vt = np.linalg.svd(delta)
        total += np.square(S).sum()
        lost += np.square(delta - found).sum()
        if S[r - 1] - S[min(r, len(S) - 1)] > 1e-6:  # else the best approximation is not unique
            np.testing.assert_allclose(found, U[:, :r] * S[:r] @ Vt[:r], **EXACT)
        assert np.linalg.norm(delta - found) == pytest.approx(np.linalg.norm(S[r:]), rel=1e-4, abs=1e-5)
    assert report["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=1e-4, abs=1e-6)
    # s is kept, so that Theta keeps its size for further training.
    assert read_adapter(tmp_path / "b").modules["l.0.q_proj"].scaling == pytest.approx(8.0 / 2)


def test_energy_keeps_the_smallest_ranks_with_that_share(tmp_path: Path) -> None:
    deltas = write_adapter(tmp_path / "a", SIZES, r=6)
    convert(tmp_path / "a", tmp_path / "b", energy=0.9)
    for name, module in read_adapter(tmp_path / "b").modules.items():
        squares = np.square(np.linalg.svd(deltas[name].numpy(), compute_uv=False))
        shares = squares.cumsum() / squares.sum()
        assert shares[module.r - 1] >= 0.9 and (module.r == 1 or shares[module.r - 2] < 0.9)


@pytest.mark.parametrize("parameterize", ["identity", "diagonal", "removal"])
@pytest.mark.parametrize("scale_key", ["lora_S.parametrizations.weight.original", "lora_S.weight",
                                       "lora_S.default.parametrizations.weight.original"])  # fmt: skip
def test_adapters_of_the_papers_code(
    tmp_path: Path, parameterize: str, scale_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layer adds lora_alpha / r B P(S) A x; P leaves S, its diagonal or nothing of it."""
    torch.manual_seed(3)
    tensors, want = {}, {}
    for name, (d_out, d_in) in SIZES.items():
        A = torch.linalg.qr(torch.randn(d_in, 4)).Q.T.contiguous() + 0.02 * torch.randn(4, d_in)
        B, S = torch.linalg.qr(torch.randn(d_out, 4)).Q.contiguous() * 1.05, torch.randn(4, 4)
        P = {"identity": S, "diagonal": torch.diag(torch.diag(S)), "removal": torch.eye(4)}[parameterize]
        want[name] = (32 / 4 * B.double() @ P.double() @ A.double()).numpy()
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        tensors[f"{PREFIX}{name}.{scale_key}"] = S
    (tmp_path / "up").mkdir()
    save_file(tensors, tmp_path / "up" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "parameterize_S": parameterize, "adapter_name": "polar"}
    config |= {"target_modules": ["q_proj", "down_proj"], "use_rslora": False, "lora_dropout": 0.05, "use_dora": False}
    (tmp_path / "up" / "adapter_config.json").write_text(json.dumps(config))
    convert(tmp_path / "up", tmp_path / "polar")
    assert holds_polar(tmp_path / "up") and holds_polar(tmp_path / "polar")
    write_lora(tmp_path / "plain", SIZES)
    assert not holds_polar(tmp_path / "plain")
    exports = []
    monkeypatch.setattr(score, "export_lora", lambda folder, *_, **__: exports.append(folder) or sys.exit())
    with pytest.raises(SystemExit):
        score._load(SimpleNamespace(adapter=tmp_path / "up", base="x"), tmp_path, None)
    assert exports == [tmp_path / "up"]  # polar eval scores it as PoLAR, not as the LoRA that its config says
    assert json.loads((tmp_path / "polar" / "adapter_config.json").read_text())["dropout"] == 0.05
    export_lora(tmp_path / "up", tmp_path / "lora", canary=False)  # directly
    exported = read_any_adapter(tmp_path / "lora").modules
    for name, found in dense(tmp_path / "polar").items():
        np.testing.assert_allclose(found, want[name], **EXACT)
        module = exported[name]
        np.testing.assert_allclose(module.X.double() @ module.core() @ module.Y.double().T, want[name], **EXACT)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_combination_of_full_rank_is_the_sum(tmp_path: Path, seed: int) -> None:
    """Ranks 4 + 2 + 5 exceed min(d_out, d_in) = 9 of one module; the third adapter is LoRA and lacks a module."""
    first = write_adapter(tmp_path / "a", SIZES, seed=seed, **PATTERNS)
    second = write_adapter(tmp_path / "b", SIZES, r=2, theta="diagonal", seed=seed + 10)
    third = write_lora(tmp_path / "c", {k: v for k, v in SIZES.items() if "l.0" not in k}, r=5, seed=seed)
    report = combine([tmp_path / part for part in "abc"], tmp_path / "sum", [0.5, -2.0, 0.25])
    found = dense(tmp_path / "sum")
    assert report["relative_error"] == 0 and report["num_modules"] == 3
    assert {name: module.r for name, module in read_adapter(tmp_path / "sum").modules.items()} == {
        "l.0.q_proj": 6, "l.1.q_proj": 10, "l.1.down_proj": 9,
    }  # fmt: skip
    for name in SIZES:
        want = 0.5 * first[name].numpy() - 2.0 * second[name].numpy() + 0.25 * third.get(name, 0.0)
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5)


def test_the_combination_of_lower_rank_is_numpys_best(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", SIZES, seed=1)
    second = write_adapter(tmp_path / "b", SIZES, seed=2)
    report = combine([tmp_path / "a", tmp_path / "b"], tmp_path / "mean", r=3)
    lost = total = 0.0
    for name, found in dense(tmp_path / "mean").items():
        want = (first[name].numpy() + second[name].numpy()) / 2
        U, S, Vt = np.linalg.svd(want)
        np.testing.assert_allclose(found, U[:, :3] * S[:3] @ Vt[:3], rtol=1e-5, atol=1e-5)
        lost, total = lost + np.square(S[3:]).sum(), total + np.square(S).sum()
    assert report["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=1e-5)


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tensor(folder: Path, ending: str, value: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith(ending))] = value
    save_file(tensors, file)


BAD = {
    "rank above": (lambda p: ["a", "--r", "5"], r"--r 5: .* has rank 4; give 1 to 4"),
    "rank of zero": (lambda p: ["a", "--r", "0"], "--r 0"),
    "share above one": (lambda p: ["a", "--energy", "1.5"], "--energy 1.5: must be above 0 and at most 1"),
    "nothing to do": (lambda p: ["a"], "on the manifold already; give --r or --energy"),
    "dora": (lambda p: _config(p / "lora", use_dora=True) or ["lora"], "use_dora makes it more than base"),
    "pissa": (lambda p: _config(p / "lora", init_lora_weights="pissa") or ["lora"], "init_lora_weights: pissa"),
    "bias": (lambda p: _config(p / "lora", bias="all") or ["lora"], "bias: all makes it more"),
    "other rank": (lambda p: _config(p / "lora", r=5) or ["lora"], "has rank 4, adapter_config.json says 5"),
    "nan": (lambda p: _tensor(p / "lora", "lora_A.weight", torch.full((4, 16), math.nan)) or ["lora"], "NaN or Inf"),
    "convolution": (
        lambda p: _tensor(p / "lora", "lora_A.weight", torch.ones(4, 16, 1, 1)) or ["lora"],
        r"shape \(4, 16, 1, 1\); only the 2-D",
    ),
    "truncated": (
        lambda p: (p / "lora/adapter_model.safetensors").write_bytes(b"\x10\x00") and ["lora"],
        "truncated or corrupt",
    ),
    "its own source": (lambda p: ["a", "--r", "2", "--out", "a"], "would replace its own source"),
    "parameterize_S": (lambda p: _upstream(p / "lora") or ["lora"], "parameterize_S 'dense' is none of identity"),
}


def _upstream(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {f"{PREFIX}l.0.q_proj.lora_S.weight": torch.eye(4)}, folder / "adapter_model.safetensors")
    _config(folder, parameterize_S="dense")


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    arrange, message = BAD[name]
    write_adapter(tmp_path / "a", SIZES)
    write_lora(tmp_path / "lora", SIZES)
    source, *options = arrange(tmp_path)
    out = "new"
    if "--out" in options:
        out = options.pop()
        options.pop()
    before = sorted(tmp_path.iterdir())
    parser = argparse.ArgumentParser()
    convert_module.add_arguments(parser)
    with pytest.raises(UserError, match=message) as caught:
        convert_module.run(parser.parse_args([str(tmp_path / source), str(tmp_path / out), *options]))
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


BAD_SUMS = {
    "one adapter": (["a"], "1 adapter is given"),
    "weights": (["a", "b", "--weights", "1"], "1 weights for 2 adapters"),
    "weight of zero": (["a", "b", "--weights", "1", "0"], "weight 0: must be a finite number"),
    "rank": (["a", "b", "--r", "9"], "the ranks sum up to 8; give 1 to 8"),
    "other base": (["a", "other"], "of different bases, org/one and org/two"),
    "other sizes": (["a", "sizes"], r"l.0.q_proj is \(24, 16\) in the first and \(24, 18\)"),
    "no common module": (["a", "alone"], r"no module is common to .*\(l.0.q_proj, ...\) and .*\(m.k_proj, ...\)"),
    "dora": (["a", "dora"], "use_dora"),
}


@pytest.mark.parametrize("name", BAD_SUMS)
def test_what_cannot_be_combined_is_one_line_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    arguments, message = BAD_SUMS[name]
    write_adapter(tmp_path / "a", SIZES, base_model_name_or_path="org/one")
    write_adapter(tmp_path / "b", SIZES, base_model_name_or_path="/cache/models--org--one/snapshots/0123")
    write_adapter(tmp_path / "other", SIZES, base_model_name_or_path="org/two")
    write_adapter(tmp_path / "sizes", {"l.0.q_proj": (24, 18)})
    write_adapter(tmp_path / "alone", {"m.k_proj": (8, 8)})
    write_lora(tmp_path / "dora", SIZES, use_dora=True)
    parser = argparse.ArgumentParser()
    combine_module.add_arguments(parser)
    paths = [str(tmp_path / part) if part.isalpha() else part for part in arguments]
    with pytest.raises(UserError, match=message) as caught:
        combine_module.run(parser.parse_args([*paths, "--out", str(tmp_path / "new")]))
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_loralib_checkpoints(tmp_path: Path) -> None:
    """microsoft/LoRA's files for DeBERTa: pickled state dicts with bare names, and the trained head beside them."""
    torch.manual_seed(0)
    stem = "deberta.encoder.layer.0.attention.self.query_proj"
    A, B = torch.randn(16, 24), torch.randn(20, 16)
    state = {f"{stem}.lora_A": A, f"{stem}.lora_B": B, "classifier.weight": torch.ones(3, 20)}
    torch.save(state, tmp_path / "mnli.bin")
    adapter = read_any_adapter(tmp_path / "mnli.bin")
    assert list(adapter.modules) == [stem] and adapter.modules[stem].scaling == 1.0
    assert any("alpha is not in the file" in note for note in adapter.notes)
    with pytest.raises(UserError, match="give the lora_alpha of its training with --alpha"):
        convert(tmp_path / "mnli.bin", tmp_path / "new")
    convert(tmp_path / "mnli.bin", tmp_path / "new", lora_alpha=32)
    np.testing.assert_allclose(dense(tmp_path / "new")[stem], 2.0 * (B.double() @ A.double()).numpy(), **EXACT)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran_code"),))


def test_a_loralib_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x.lora_A": torch.ones(1, 2), "x.lora_B": _Evil()}, tmp_path / "evil.bin")
    torch.save({"x.lora_A": torch.ones(2, 2)}, tmp_path / "half.bin")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    good = tmp_path / "half.bin"
    (tmp_path / "short.bin").write_bytes(good.read_bytes()[:-300])
    (tmp_path / "notes.txt").write_text("x")
    wrong = {"evil.bin": "more than tensors in a pickle", "half.bin": "no lora_B beside it", "list.pt": "holds list"}
    wrong |= {"short.bin": "truncated", "notes.txt": "neither an adapter folder nor"}
    for file, message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            read_any_adapter(tmp_path / file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran_code").exists()
