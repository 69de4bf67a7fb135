"""Exports against models whose weights were changed by hand with the delta in float64, never against our own tuner."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar.base_checkpoint import describe_base, read_entries
from polar.errors import UserError
from polar.export import add_arguments, compare_forward, export_lora, export_merged, run
from tests.tiny_models import linear_sizes, write_adapter, write_gemma3, write_multimodal_gemma3

# peft 0.21.2 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FP32_TOLERANCE = 1e-5
INPUT_IDS = torch.arange(4, 68).reshape(2, 32)


def load(folder: Path, **kwargs: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT_IDS).logits.float()


def with_delta(folder: Path, deltas: dict[str, torch.Tensor], **kwargs: Any) -> torch.nn.Module:
    """The reference: base weights plus dW, added in float64."""
    model = load(folder, **kwargs)
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.data.double() + delta).to(weight.dtype)
    return model


def lora_logits(base: Path, adapter: Path, **kwargs: Any) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(base, **kwargs), str(adapter)).eval())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sizes(base: Path) -> dict[str, tuple[int, int]]:
    return linear_sizes(load(base))


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
def test_lora_gives_the_logits_of_the_changed_weights(
    tmp_path: Path, base: Path, sizes: dict[str, tuple[int, int]], theta: str
) -> None:
    deltas = write_adapter(tmp_path / "a", sizes, theta=theta, use_rslora=theta == "full")
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    expected = logits(with_delta(base, deltas))
    assert (expected - logits(load(base))).abs().max() > 0.1
    assert (lora_logits(base, tmp_path / "lora") - expected).abs().max() <= FP32_TOLERANCE


def test_rank_pattern_becomes_one_rank_without_patterns(
    tmp_path: Path, base: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    names = sorted(sizes)
    patterns = {"rank_pattern": {names[0]: 2, names[1]: 9}, "alpha_pattern": {names[2]: 1.0}}
    deltas = write_adapter(tmp_path / "a", sizes, **patterns)
    report = export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    assert (lora_logits(base, tmp_path / "lora") - logits(with_delta(base, deltas))).abs().max() <= FP32_TOLERANCE
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 9
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {9}
    assert {value.shape[1] for key, value in tensors.items() if "lora_B" in key} == {9}
    assert report["max_lora_rank"] == 16


@pytest.mark.parametrize(("r", "served_as"), [(1, 1), (8, 8), (9, 16), (33, 64), (129, 256), (257, 320), (513, None)])
def test_max_lora_rank_is_one_that_vllm_takes(tmp_path: Path, r: int, served_as: int | None) -> None:
    write_adapter(tmp_path / "a", {"model.layers.0.q_proj": (600, 520)}, r=r)
    export_lora(tmp_path / "a", tmp_path / "lora")
    report = json.loads((tmp_path / "lora" / "polar_export.json").read_text())
    assert report["max_lora_rank"] == served_as and report["base_checked"] is False


def test_export_loads_in_a_process_that_cannot_import_polar(
    tmp_path: Path, base: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    deltas = write_adapter(tmp_path / "a", sizes)
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    torch.save(logits(with_delta(base, deltas)), tmp_path / "expected.pt")
    script = """
import sys
sys.modules["polar"] = None  # from here on `import polar` raises
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora, expected = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
with torch.no_grad():
    print((model(torch.arange(4, 68).reshape(2, 32)).logits - torch.load(expected)).abs().max().item())
"""
    arguments = [str(base), str(tmp_path / "lora"), str(tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= FP32_TOLERANCE


def test_bf16_base_and_bf16_export_stay_within_bf16_rounding(tmp_path: Path, base: Path, sizes: Any) -> None:
    """Tolerance: 5 % of the largest logit; 1.8 to 2.2 % measured over three seeds, as much as W + dW in bf16."""
    deltas = write_adapter(tmp_path / "a", sizes, scale=0.2)
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), dtype="bfloat16", canary=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    expected = logits(with_delta(base, deltas))
    got = lora_logits(base, tmp_path / "lora", dtype=torch.bfloat16)
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert (logits(load(base)) - expected).abs().max() > 0.1 * expected.abs().max()


def test_multimodal_names_and_the_vision_tower_stays_out(tmp_path: Path) -> None:
    base = write_multimodal_gemma3(tmp_path / "base")
    sizes = linear_sizes(load(base), within="model.language_model.")
    deltas = write_adapter(tmp_path / "a", sizes, target_modules=r"model\.language_model\..*\.(q|k|v|up|down)_proj")
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(sizes)  # a bare q_proj would match the vision tower too
    assert (lora_logits(base, tmp_path / "lora") - logits(with_delta(base, deltas))).abs().max() <= FP32_TOLERANCE


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_other_names_of_the_same_layers_are_translated(tmp_path: Path, prefix: str) -> None:
    """Trained on the text-only class, or before transformers 4.52: the export must carry the names of this base."""
    base = write_multimodal_gemma3(tmp_path / "base")
    sizes = linear_sizes(load(base), within="model.language_model.")
    renamed = {name.replace("model.language_model.", prefix): shape for name, shape in sizes.items()}
    deltas = write_adapter(tmp_path / "a", renamed)
    report = export_lora(tmp_path / "a", tmp_path / "lora", str(base))
    changed = {name.replace(prefix, "model.language_model.", 1): delta for name, delta in deltas.items()}
    expected = logits(with_delta(base, changed))
    assert (lora_logits(base, tmp_path / "lora") - expected).abs().max() <= FP32_TOLERANCE
    assert report["canary"]["forward"]["max_logit_change"] > 0.1
    export_merged(tmp_path / "a", tmp_path / "merged", str(base))
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= FP32_TOLERANCE


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path, base: Path, sizes: Any) -> None:
    write_adapter(tmp_path / "a", sizes, scale=0.0)
    for export in (export_lora, export_merged):
        with pytest.raises(UserError, match="changes nothing"):
            export(tmp_path / "a", tmp_path / "out", str(base))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_forward_canary_fails_when_base_and_export_answer_alike(tmp_path: Path, base: Path, sizes: Any) -> None:
    write_adapter(tmp_path / "a", sizes)
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    described = describe_base(str(base))
    assert compare_forward(described, tmp_path / "lora", None)["max_logit_change"] > 0.1
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: value * ("lora_A" in key) for key, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="same logits"):
        compare_forward(described, tmp_path / "lora", None)


def test_existing_output_needs_overwrite_and_sources_are_safe(tmp_path: Path, base: Path, sizes: Any) -> None:
    write_adapter(tmp_path / "a", sizes)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="--overwrite"):
        export_lora(tmp_path / "a", tmp_path / "out", str(base), canary=False)
    assert (tmp_path / "out" / "precious").exists()
    export_lora(tmp_path / "a", tmp_path / "out", str(base), overwrite=True, canary=False)
    assert not (tmp_path / "out" / "precious").exists()
    for source in (tmp_path / "a", tmp_path, base):
        with pytest.raises(UserError, match="replace its own source"):
            export_lora(tmp_path / "a", source, str(base), overwrite=True)


@pytest.mark.parametrize("export", [export_lora, export_merged])
def test_the_base_that_the_adapter_names_is_never_replaced(tmp_path: Path, sizes: Any, export: Any) -> None:
    base = write_gemma3(tmp_path / "base")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    write_adapter(tmp_path / "a", sizes, base_model_name_or_path=str(base))
    with pytest.raises(UserError, match="replace its own source"):
        export(tmp_path / "a", base, overwrite=True)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_merged_keeps_sharding_names_and_dtype(tmp_path: Path) -> None:
    base = write_gemma3(tmp_path / "base", max_shard_size="25KB", dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text("{}")
    sizes = linear_sizes(load(base))
    deltas = write_adapter(tmp_path / "a", sizes, scale=0.2)
    report = export_merged(tmp_path / "a", tmp_path / "merged", str(base))
    index, merged_index = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "merged")
    )
    assert len(set(index["weight_map"].values())) > 2
    assert merged_index == index
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    before, after = (dict(load(folder).named_parameters()) for folder in (base, tmp_path / "merged"))
    for name, old in before.items():
        delta = deltas.get(name.removesuffix(".weight"))
        expected = old if delta is None else (old.float() + delta.float()).bfloat16()
        assert after[name].dtype == torch.bfloat16
        # One bf16 step where fp32 sums of r = 4 terms, taken in another order, straddle a rounding boundary.
        assert (after[name] != expected).float().mean() < 1e-3, name
    assert report["canary"]["merge"]["changed_share"] > 0.5


def test_merged_fp32_gives_the_logits_of_the_changed_weights(tmp_path: Path, base: Path, sizes: Any) -> None:
    deltas = write_adapter(tmp_path / "a", sizes)
    export_merged(tmp_path / "a", tmp_path / "merged", str(base))
    expected = logits(with_delta(base, deltas))
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= FP32_TOLERANCE


def test_merged_in_another_dtype(tmp_path: Path, base: Path, sizes: Any) -> None:
    deltas = write_adapter(tmp_path / "a", sizes)
    export_merged(tmp_path / "a", tmp_path / "merged", str(base), dtype="bfloat16")
    model = load(tmp_path / "merged")
    reference = with_delta(base, deltas).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=8e-3, atol=1e-6)


def test_merged_transposes_conv1d(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    sizes = {f"transformer.h.{i}.attn.c_attn": (96, 32) for i in range(2)}
    deltas = write_adapter(tmp_path / "a", sizes, fan_in_fan_out=True)
    export_merged(tmp_path / "a", tmp_path / "merged", str(tmp_path / "base"))
    expected = logits(with_delta(tmp_path / "base", {name: delta.T for name, delta in deltas.items()}))
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= FP32_TOLERANCE
    export_lora(tmp_path / "a", tmp_path / "lora", str(tmp_path / "base"), canary=False)
    assert (lora_logits(tmp_path / "base", tmp_path / "lora") - expected).abs().max() <= FP32_TOLERANCE


def test_merging_takes_the_memory_of_a_block_not_of_the_model(tmp_path: Path) -> None:
    """A base of 195 MiB, tensors of 64 MiB, one to a shard; the peak of resident memory may rise by 48 MiB."""
    base = write_gemma3(
        tmp_path / "base",
        max_shard_size="70MB",
        hidden_size=1024,
        intermediate_size=16384,
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 190 * 2**20
    write_adapter(tmp_path / "a", {"model.layers.0.mlp.up_proj": (16384, 1024)})
    script = """
import sys, threading, time
from polar.export import export_merged

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def watch():
    while not done:
        samples.append(resident_mib())
        time.sleep(0.001)

adapter, base, out = sys.argv[1:]
export_merged(adapter, base=base, out=out)  # imports and the linear algebra library's own buffers
samples, done = [], False
watcher = threading.Thread(target=watch)
watcher.start()
before = resident_mib()
export_merged(adapter, base=base, out=out, overwrite=True)
done = True
watcher.join()
print(max(samples) - before, len(samples))
"""
    arguments = [str(tmp_path / "a"), str(base), str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rise_mib, num_samples = map(float, done.stdout.split())
    assert num_samples > 50
    assert rise_mib < 48


def test_merged_refuses_what_it_would_get_wrong(tmp_path: Path, base: Path, sizes: Any) -> None:
    write_adapter(tmp_path / "tied", {"lm_head": (384, 32)})
    with pytest.raises(UserError, match="lm_head shares its weight"):
        export_merged(tmp_path / "tied", tmp_path / "out", str(base))
    write_adapter(tmp_path / "a", sizes)
    quantized = write_gemma3(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\)"):
        export_merged(tmp_path / "a", tmp_path / "out", str(quantized))
    pickled = write_gemma3(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as pickle \(pytorch_model.bin\)"):
        export_merged(tmp_path / "a", tmp_path / "out", str(pickled))
    cut = write_gemma3(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(UserError, match="truncated"):
        export_merged(tmp_path / "a", tmp_path / "out", str(cut))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_delta_below_bf16_resolution_is_refused_not_swallowed(tmp_path: Path) -> None:
    base = write_gemma3(tmp_path / "base", dtype=torch.bfloat16)
    write_adapter(tmp_path / "a", linear_sizes(load(base)), scale=1e-9)
    with pytest.raises(UserError, match="below the resolution"):
        export_merged(tmp_path / "a", tmp_path / "out", str(base))


def test_modules_to_save_pass_through_both_formats(tmp_path: Path) -> None:
    base = write_gemma3(tmp_path / "base", tie_word_embeddings=False)
    sizes = linear_sizes(load(base))
    deltas = write_adapter(tmp_path / "a", sizes, modules_to_save=["lm_head"])
    head = 0.1 * torch.randn(384, 32, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": head}, file)
    reference = with_delta(base, deltas)
    reference.lm_head.weight.data = head
    export_lora(tmp_path / "a", tmp_path / "lora", str(base), canary=False)
    export_merged(tmp_path / "a", tmp_path / "merged", str(base))
    assert (lora_logits(base, tmp_path / "lora") - logits(reference)).abs().max() <= FP32_TOLERANCE
    assert (logits(load(tmp_path / "merged")) - logits(reference)).abs().max() <= FP32_TOLERANCE


def test_trained_biases_are_refused(tmp_path: Path, base: Path, sizes: Any) -> None:
    write_adapter(tmp_path / "a", sizes, bias="all")
    with pytest.raises(UserError, match="bias: all cannot be exported"):
        export_lora(tmp_path / "a", tmp_path / "out", str(base))


def test_command_reports_what_it_measured(
    tmp_path: Path, base: Path, sizes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "run" / "adapter", sizes, base_model_name_or_path=str(base), r=10)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(tmp_path / "run"), str(tmp_path / "lora")]))
    assert "r = 10, max_lora_rank for vLLM: 16" in capsys.readouterr().out
    forward = json.loads((tmp_path / "lora" / "polar_export.json").read_text())["canary"]["forward"]
    assert forward["max_difference_to_adapter"] <= FP32_TOLERANCE < forward["max_logit_change"]
    run(
        parser.parse_args([str(tmp_path / "run"), str(tmp_path / "merged"), "--format", "merged", "--dtype", "float16"])
    )
    assert "merged model, 10 modules" in capsys.readouterr().out
    entries, _ = read_entries(tmp_path / "merged" / "model.safetensors")
    assert {entry.dtype for entry in entries} == {"F16"}


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
def test_an_adapter_that_peft_saved_is_read_and_exported(tmp_path: Path, base: Path, theta: str) -> None:
    """The other tests write the files by hand; here the tuner does, and its own logits are the reference."""
    from peft import get_peft_model

    from polar import PolarConfig

    config = PolarConfig(
        r=4,
        alpha=6,
        theta=theta,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 7},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "polar_Theta" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "a")
    report = export_lora(tmp_path / "a", tmp_path / "lora")  # the base's folder is named in adapter_config.json
    assert report["base_checked"] and report["r"] == 7 and report["num_modules"] == 4
    assert report["canary"]["forward"]["max_difference_to_adapter"] <= FP32_TOLERANCE
    export_merged(tmp_path / "a", tmp_path / "merged")
    expected = logits(model.eval())
    assert (lora_logits(base, tmp_path / "lora") - expected).abs().max() <= FP32_TOLERANCE
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() <= FP32_TOLERANCE
