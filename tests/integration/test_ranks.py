"""`polar ranks` as a user runs it: its file builds every kind of adapter, in little memory, and the plot is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import polar
from polar.rank_file import adapter_settings, check_rank_file, read_rank_file, selected_ranks
from tests.integration.commands import ROOT, environment
from tests.integration.commands import polar as run_polar
from tests.tiny_models import write_gemma3, write_multimodal_gemma3

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# More layers than ten, so that layers.1 could be taken for layers.11.
DEEP = {"num_hidden_layers": 12, "layer_types": ["sliding_attention"] * 12}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "polar": ("polar", {}, {}),
    "lora": ("lora", {}, {}),
    "rslora": ("lora", {"use_rslora": True}, {}),
    "dora": ("dora", {"use_dora": True}, {}),
    "qlora": ("lora", {}, {"quantized": True}),
    "polar on 4 bits": ("polar", {}, {"quantized": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"text": write_gemma3(folder / "text", **DEEP), "multimodal": write_multimodal_gemma3(folder / "multimodal")}


@pytest.fixture(scope="module")
def files(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """A rank file for each base and method, by the real command, with the same budget; the first also with a plot."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, base in bases.items():
        for method in ("polar", "lora", "dora"):
            out = folder / f"{name}-{method}.json"
            options = ["--cache", str(folder / "cache"), "--r_max", "16", "--budget", "r=6", "--processes", "2"]
            if not found:
                done = run_polar("ranks", str(base), "--out", str(out), "--method", method, *options,
                                 "--plot", str(folder / "plots" / "ranks.png"))  # fmt: skip
                assert "84 weights (0 from the cache), 42 selected (paper, fraction 0.5)" in done.stdout
                assert (folder / "plots" / "ranks.png").read_bytes().startswith(b"\x89PNG")
            else:  # the same entry point, without starting Python again
                from polar.cli import main

                assert main(["ranks", str(base), "--out", str(out), "--method", method, *options]) == 0
            found[name, method] = read_rank_file(out)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ["text", "multimodal"])
def test_adapters_get_the_ranks_of_the_file(kind: str, base: str, bases, files, tmp_path: Path) -> None:
    """Real PEFT models: each module's rank and alpha, no other module, and the parameters that were counted."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    method, options, loading = CONFIGS[kind]
    ranks = files[base, method]
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "vision_tower"])
    arguments = {"quantization_config": quantization} if loading else {}
    model = AutoModelForCausalLM.from_pretrained(bases[base], **arguments)
    check_rank_file(ranks, {name for name, _ in model.named_modules()})
    peft_type = "POLAR" if method == "polar" else "LORA"
    config_class = polar.PolarConfig if method == "polar" else peft.LoraConfig
    config = config_class(**adapter_settings(ranks, peft_type), **options)
    adapted = peft.get_peft_model(model, config)
    assert adapter_ranks(adapted) == {name: (r, 2.0 * r) for name, r in selected_ranks(ranks).items()}
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == ranks["num_parameters"] <= ranks["budget"]
    if kind in ("polar", "lora"):  # PEFT sorts the patterns when it saves them
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), tmp_path / "adapter")
        assert adapter_ranks(again) == adapter_ranks(adapted)


def adapter_ranks(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Module name -> (r, alpha) of every adapted layer."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and getattr(module, "r", None):
            alpha = module.alpha if hasattr(module, "polar_X") else module.lora_alpha
            found[name] = (module.r["default"], alpha["default"])
    return found


def test_ranks_hold_for_both_names_of_a_layer(files) -> None:
    """The multimodal file names its modules as transformers does, not as the published checkpoint."""
    names = selected_ranks(files["multimodal", "polar"])
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert json.dumps(files["multimodal", "polar"]["provenance"]).count("model.safetensors") == 1


MEMORY_PROGRAM = """
import sys
from pathlib import Path
import torch
from polar.ranks import RankSettings, compute_ranks

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

small, large = sys.argv[1:]
compute_ranks(small, RankSettings(include=("q_proj",)), workers=2)  # libraries, thread pools
torch.nn.functional.linear(torch.zeros(4096, 256), torch.zeros(256, 256))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
compute_ranks(large, RankSettings(include=("down_proj", "up_proj", "gate_proj")), workers=2)
print(status("VmHWM") - before)
"""


def test_memory_is_that_of_a_few_weights(bases, tmp_path: Path) -> None:
    """A 126 MB model in 4 MB weights, two at a time: each has its bytes, one fp32 chunk and Gram matrices in memory."""
    large = write_gemma3(
        tmp_path / "large",
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=10,
        layer_types=["sliding_attention"] * 10,
    )
    size_mib = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    assert size_mib > 120
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(bases["text"]), str(large)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < size_mib / 4


def test_exit_code_of_the_process(bases, tmp_path: Path) -> None:
    out = tmp_path / "out" / "ranks.json"
    result = run_polar("ranks", str(bases["text"]), "--out", str(out), "--budget", "10", "--no_cache", ok=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("polar: error: budget 10: r_min 4 on 42 layers already takes")
    assert not out.parent.exists()
