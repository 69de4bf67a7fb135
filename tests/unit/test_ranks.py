"""Spectra against float64 SVDs, patterns against PEFT's own matching, the cache, and what a user can get wrong."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from polar import base_spectra
from polar import ranks as ranks_module
from polar.base_checkpoint import describe_base
from polar.base_spectra import gram_spectrum
from polar.cli import main
from polar.errors import UserError
from polar.heavy_tails import fit_power_law
from polar.rank_file import (
    adapter_settings,
    check_rank_file,
    pattern_keys,
    read_rank_file,
    selected_ranks,
    target_pattern,
)
from polar.ranks import RankSettings, compute_ranks
from tests.tiny_models import write_gemma3, write_multimodal_gemma3

ALL = RankSettings(fraction=1.0, r_max=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Gemma-3 in several shards."""
    return write_gemma3(tmp_path_factory.mktemp("base"), max_shard_size="30KB", dtype=torch.bfloat16)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """The base in a folder that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Module name -> weight, by transformers' own loading."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def steep(M: int, N: int, condition: float, seed: int = 0) -> torch.Tensor:
    """(N, M) float64 with lambda_max / lambda_{M-k} = condition, tail of 5 % of the eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    bulk, tail = M - M // 20, M // 20
    eigenvalues = torch.cat(
        [torch.linspace(0.5, 1, bulk), torch.logspace(0, math.log10(condition), tail)]
    ).double()  # fmt: skip
    left = torch.linalg.qr(torch.randn(N, M, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(M, M, generator=generator, dtype=torch.float64)).Q
    return (left * eigenvalues.sqrt()) @ right.T


@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (40, 40), (130, 300), (300, 130), (257, 600)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_spectrum_is_that_of_a_float64_svd(shape, dtype, monkeypatch) -> None:
    monkeypatch.setattr(base_spectra, "CHUNK_ROWS", 64)  # several chunks and panels, the last ones short
    monkeypatch.setattr(base_spectra, "MIN_PANEL", 50)
    W = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    want = torch.linalg.svdvals(W.double()).flip(0) ** 2
    for precision, tolerance in (("float32", 1e-5), ("float64", 1e-14)):
        found = gram_spectrum(W, precision)
        assert found.precision == precision
        assert (found.eigenvalues - want).abs().max() <= tolerance * want[-1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    small = gram_spectrum(scale * W, "float32").eigenvalues / scale**2
    torch.testing.assert_close(small, gram_spectrum(W, "float32").eigenvalues, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("condition", "precision"), [(1e2, "float32"), (5e3, "float32"), (1e6, "float64"), (1e8, "float64")]
)
def test_auto_precision_keeps_alpha_to_five_digits(condition: float, precision: str) -> None:
    W = steep(160, 400, condition).float()
    want = fit_power_law(torch.linalg.svdvals(W.double()).flip(0) ** 2).alpha
    found = gram_spectrum(W)
    assert found.precision == precision
    assert fit_power_law(found.eigenvalues, rounding=found.rounding).alpha == pytest.approx(want, rel=2e-5)


def test_what_float32_gets_wrong() -> None:
    """The reason for the switch: a steep spectrum drowns the median in the rounding of the largest eigenvalue."""
    W = steep(160, 400, 1e8).float()
    want = fit_power_law(torch.linalg.svdvals(W.double()).flip(0) ** 2).alpha
    assert abs(fit_power_law(gram_spectrum(W, "float32").eigenvalues).alpha / want - 1) > 1e-3


def test_every_weight_of_a_model_against_float64_svds(base: Path) -> None:
    content, measures = compute_ranks(str(base), ALL, workers=2)
    weights = weights_of(base)
    assert [m.size.name for m in measures] == [name for name in weights if name != "lm_head"]
    for measure in measures:
        W = weights[measure.size.name]
        assert W.dtype == torch.bfloat16
        want = torch.linalg.svdvals(W.double()).flip(0) ** 2
        assert (measure.spectrum.eigenvalues - want).abs().max() < 1e-5 * want[-1]
        module = content["modules"][measure.size.name]
        assert module["alpha_hill"] == pytest.approx(fit_power_law(want).alpha, rel=1e-5)
        edge = want.mean() * (1 + math.sqrt(min(W.shape) / max(W.shape))) ** 2
        assert module["num_spikes"] == (want > edge).sum()
        assert module["shape"] == list(W.shape)
    assert len(content["provenance"]["files_sha256"]) > 2


def test_known_exponent_and_spikes_through_the_files(copy: Path) -> None:
    """One weight gets a Pareto spectrum, one a few spikes: the first has the lowest alpha, the second is counted."""
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    left = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(3))).Q
    quantiles = (torch.arange(32) + 0.5) / 32
    planted = {
        names[0]: left * (1 - quantiles) ** (-1 / (1.5 - 1) / 2),  # alpha 1.5
        names[1]: torch.cat([5 * left[:, :2], left[:, 2:]], 1),
    }
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in planted.items():
            if f"{name}.weight" in tensors:
                tensors[f"{name}.weight"] = value.bfloat16().contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    content, _ = compute_ranks(str(copy), RankSettings(fraction=1.0, r_max=16, include=("up_proj", "gate_proj")))
    modules = content["modules"]
    assert modules[names[0]]["alpha_hill"] == pytest.approx(1.5, abs=0.1)  # 16 values
    assert modules[names[1]]["num_spikes"] == 2
    assert min(modules, key=lambda name: modules[name]["alpha_hill"]) == names[0]
    assert modules[names[0]]["r"] == 4


def test_published_gemma3_names_become_module_names(tmp_path: Path) -> None:
    folder = write_multimodal_gemma3(tmp_path / "mm")
    content, _ = compute_ranks(str(folder), ALL)
    names = set(weights_of(folder))
    assert set(content["modules"]) == {name for name in names if ".language_model." in name}
    check_rank_file(content, names)


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    """Conv1D stores (d_in, d_out): the file has W's own shape, and the spectrum is the same either way."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    content, measures = compute_ranks(str(tmp_path / "gpt2"), ALL)
    assert len(measures) == 8
    assert content["modules"]["transformer.h.0.attn.c_attn"]["shape"] == [96, 32]
    want = torch.linalg.svdvals(model.transformer.h[0].attn.c_attn.weight.detach().double()).flip(0) ** 2
    torch.testing.assert_close(measures[0].spectrum.eigenvalues, want, rtol=1e-4, atol=1e-5 * want[-1].item())


def test_hub_cache_names_files_by_their_hash(tmp_path: Path) -> None:
    """The hub's cache holds links to blobs named by SHA-256; others are hashed."""
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    cache = base_spectra.SpectrumCache(None)
    assert cache.file_hash(tmp_path / "model.safetensors") == blob.name
    plain = tmp_path / "plain"
    plain.write_bytes(b"weights")
    assert cache.file_hash(plain) == hashlib.sha256(b"weights").hexdigest()


NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "mlp.up-proj", "mlp.experts.3.w1")]
NAMES += ["decoder.model.layers.1.attn.q_proj", "model.layersX1.attn.q_proj", "lm_head", "q_proj", "head.q_proj"]


@pytest.mark.parametrize("seed", range(5))
def test_patterns_match_exactly_by_pefts_rules(seed: int) -> None:
    """Every subset: dots are dots, layers.1 is not layers.11, and names that end in another name are told apart."""
    draw = random.Random(seed)
    chosen = [*draw.sample(NAMES, 12), "q_proj", "model.layers.1.attn.q_proj"]
    keys = pattern_keys(chosen, NAMES)
    patterns = sorted(keys.values())  # PEFT sorts them when it saves a configuration
    config = SimpleNamespace(target_modules=target_pattern(chosen), exclude_modules=None, target_parameters=None)
    for name in NAMES:
        assert bool(check_target_module_exists(config, name)) == (name in chosen), name
        key = get_pattern_key(patterns, name)
        assert key == keys.get(name, name), name


def test_unescaped_names_would_match_more() -> None:
    """What the escaping is for."""
    naive = SimpleNamespace(target_modules="model.layers.1.attn.q_proj", exclude_modules=None, target_parameters=None)
    assert check_target_module_exists(naive, "model.layersX1.attn.q_proj")
    assert get_pattern_key(["q_proj"], "head.q_proj") == "q_proj"


def test_selection_and_fit_reach_the_file(base: Path) -> None:
    files = {}
    for selection in ("paper", "upstream_code"):
        settings = RankSettings(fraction=0.5, r_max=16, selection=selection, fit="goodness_of_fit", tracy_widom=0.99)
        files[selection], _ = compute_ranks(str(base), settings)
    paper, code = (set(selected_ranks(files[name])) for name in files)
    assert not paper & code
    assert len(paper) == len(code) == 7
    scores = {name: value["score"] for name, value in files["paper"]["modules"].items()}
    assert min(scores[name] for name in paper) >= max(scores[name] for name in code)
    for content in files.values():  # either way the higher score has the higher rank
        ranks = selected_ranks(content)
        ordered = sorted(ranks, key=lambda name: scores[name])
        assert [ranks[name] for name in ordered] == sorted(ranks.values())
        assert {value["precision"] for value in content["modules"].values()} == {"float64"}


def test_second_call_reads_no_weight(base: Path, tmp_path: Path, monkeypatch) -> None:
    first, _ = compute_ranks(str(base), ALL, cache=tmp_path)
    assert first["provenance"]["num_cached"] == 0
    monkeypatch.setattr(base_spectra, "_measure", lambda *arguments: pytest.fail("a weight was read"))
    monkeypatch.setattr(ranks_module, "fit_power_law", lambda *arguments: pytest.fail("a tail was fitted"))
    monkeypatch.setattr(base_spectra.hashlib, "file_digest", lambda *arguments: pytest.fail("a shard was hashed"))
    second, _ = compute_ranks(str(base), ALL, cache=tmp_path)
    assert second["provenance"].pop("num_cached") == 14
    first["provenance"].pop("num_cached")
    assert second == first
    compute_ranks(str(base), RankSettings(mapping="log", r_max=8, budget="r=6"), cache=tmp_path)  # other ranks as well


def test_cache_notices_changed_and_damaged_files(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compute_ranks(str(copy), RankSettings(include=("q_proj",)), cache=cache)
    content, _ = compute_ranks(str(copy), ALL, cache=cache)
    assert content["provenance"]["num_cached"] == 2
    shard = next(file for file in sorted(copy.glob("*.safetensors")) if any("mlp" in key for key in load_file(file)))
    changed = {name: 2 * value for name, value in load_file(shard).items()}
    save_file(changed, shard, metadata={"format": "pt"})
    content, measures = compute_ranks(str(copy), ALL, cache=cache)
    num_changed = sum(name.endswith("proj.weight") for name in changed)
    assert content["provenance"]["num_cached"] == 14 - num_changed
    for file in cache.glob("*-v1-*"):
        file.write_bytes(file.read_bytes()[:-4])
    again, fresh = compute_ranks(str(copy), ALL, cache=cache)
    assert again["provenance"]["num_cached"] == 0
    assert [m.power_law for m in fresh] == [m.power_law for m in measures]


def test_work_survives_a_failure(copy: Path, tmp_path: Path) -> None:
    """NaN in one weight: one line, and what was measured before it is not measured again."""
    file = _with(copy, "model.layers.1.mlp.down_proj.weight", lambda value: value.fill_(float("nan")))
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=rf"{file.name}: the weight of model.layers.1.mlp.down_proj holds NaN"):
        compute_ranks(str(copy), ALL, cache=cache, workers=1)
    assert list(cache.glob("spectra-*"))
    exclude = ("model.layers.1.mlp.down_proj",)
    content, _ = compute_ranks(str(copy), RankSettings(exclude=exclude), cache=cache)
    assert content["provenance"]["num_cached"] > 0
    assert len(content["modules"]) == 13


def _with(folder: Path, tensor: str, change) -> Path:
    """Change one tensor of a model folder and return its file."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / weight_map[tensor]
    tensors = load_file(file)
    tensors[tensor] = change(tensors[tensor].clone()).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


UP = "model.layers.0.mlp.up_proj.weight"
FILE_CASES = {
    "all zeros": (lambda folder: _with(folder, UP, torch.zero_), "is all zeros", "--exclude model.layers.0"),
    "infinity": (lambda folder: _with(folder, UP, lambda value: value * math.inf), "holds NaN or inf", "--exclude"),
    "not 2-D": (lambda folder: _with(folder, UP, lambda value: value[None]), "has 3 dimensions", "--exclude"),
    "wrong shape": (lambda folder: _with(folder, UP, lambda value: value.T), "config.json asks for (64, 32)", "again"),
    "quantised": (lambda folder: _with(folder, UP, lambda value: value.to(torch.int8)), "is I8", "pass a bf16"),
    "rank one": (
        lambda folder: _with(folder, UP, torch.ones_like), "1 eigenvalue(s)", "--exclude model.layers.0"
    ),
    "truncated": (lambda folder: _truncate(folder), "truncated", "copy or download it again"),
    "shard missing": (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "is missing", "download"),
}  # fmt: skip
OPTION_CASES = {
    "no layers": (["--include", "c_attn"], "'c_attn' matches no linear layer", "end in down_proj"),
    "nothing left": (["--exclude", "proj", ".*proj"], "no linear layer", "model.layers.0.self_attn.q_proj"),
    "a norm": (["--include", "model.norm"], "has 1 dimension(s)", "no linear layer's"),
    "the head": (["--include", "lm_head"], "lm_head is an output layer", "left out"),
    "bad pattern": (["--include", "("], "pattern '(' is no regular expression", "name"),
    "budget too small": (["--budget", "100"], "budget 100: r_min 4 on 7 layers", "smaller --r_min"),
    "budget too large": (["--budget", "r=64", "--r_max", "8"], "r_max 8 on 7 layers", "larger --r_max"),
    "budget a word": (["--budget", "r=many"], "'r=many'", "r=16"),
    "bounds": (["--r_min", "8", "--r_max", "4"], "r_min 8 is above r_max 4", "swap"),
    "multiple": (["--multiple_of", "64"], "below multiple_of 64", "--exclude"),
    "fraction": (["--fraction", "1.5"], "fraction 1.5", "at most 1"),
    "probability": (["--tracy_widom", "2"], "tracy_widom 2.0", "0.99 is usual"),
    "weights": (["--w_hill", "0", "--w_spikes", "0"], "w_hill 0.0", "not both zero"),
    "workers": (["--processes", "0"], "--processes 0", "at least 1"),
    "no GPU": (["--device", "cuda"], "--device cuda", "--device cpu"),
    "plot name": (["--plot", "x.pdf"], "--plot x.pdf", "x.png"),
}


def _truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


def check_one_line(argv: list[str], out: Path, value: str, fix: str, capsys) -> None:
    assert main(["ranks", *argv, "--out", str(out), "--no_cache"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("polar: error: ")
    assert value in lines[0]
    assert fix in lines[0]
    assert not out.parent.exists()


@pytest.mark.parametrize("case", FILE_CASES)
def test_bad_file_is_one_line(case: str, copy: Path, tmp_path: Path, capsys) -> None:
    damage, value, fix = FILE_CASES[case]
    damage(copy)
    check_one_line([str(copy)], tmp_path / "out" / "ranks.json", value, fix, capsys)


@pytest.mark.parametrize("case", OPTION_CASES)
def test_bad_option_is_one_line(case: str, base: Path, tmp_path: Path, capsys) -> None:
    options, value, fix = OPTION_CASES[case]
    if case == "no GPU" and torch.cuda.is_available():
        options = ["--processes", "-1"]
        value, fix = "--processes -1", "at least 1"
    check_one_line([str(base), *options], tmp_path / "out" / "ranks.json", value, fix, capsys)


def test_only_a_rank_file_is_replaced(base: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "ranks.json"
    out.write_text('{"mine": 1}')
    assert main(["ranks", str(base), "--out", str(out), "--no_cache"]) == 2
    assert "format None, need 'polar-ranks-1'" in capsys.readouterr().err
    assert out.read_text() == '{"mine": 1}'
    out.unlink()
    for r_max in ("8", "16"):
        assert main(["ranks", str(base), "--out", str(out), "--no_cache", "--r_max", r_max]) == 0
        assert max(selected_ranks(read_rank_file(out)).values()) == int(r_max)


INCOMPLETE = '{"format": "polar-ranks-1", "r": 4}'


def test_rank_file_of_another_model(base: Path, tmp_path: Path) -> None:
    content, _ = compute_ranks(str(base), ALL)
    names = {name for name, _ in describe_base(str(base)).model.named_modules()}
    check_rank_file(content, names)
    others = {name.replace("model.layers", "model.language_model.layers") for name in names}
    with pytest.raises(
        UserError, match=r"14 of its modules do not exist in the model, the first is model\.layers\.0.*nearest"
    ):
        check_rank_file(content, others)
    with pytest.raises(UserError, match="peft_type IA3"):
        adapter_settings(content, "IA3")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "format 'list'"),
        (None, "No such file"),
        (INCOMPLETE, "has no alpha;"),
    ):
        file = tmp_path / "bad.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_rank_file(file)
