"""How fast are adaptive ranks, and how much memory do they need?

The linear layers of Gemma-3-1B or Llama-3.2-1B in shape (random bf16 weights in safetensors files, small vocabulary).
Each measurement is a process of its own; methods alternate.

    ours          polar.ranks.compute_ranks: reads, hashes and measures the files, fits, allocates ranks
    svdvals       the model loaded with transformers, one float32 torch.linalg.svdvals per weight as it lies, as
                  Adaptive-Rank-LoRA does; loading is not timed
    svdvals_tall  the same with wide weights transposed first, which LAPACK treats much better

Everything is timed with one thread and, with --threads N, with N as well; of each baseline the faster counts. Processor
time (`cpu_seconds`) is what all threads of a process used: other load on the machine changes it less than the wall
clock. Memory is the peak of resident memory beyond that of a process which has done the same with a tiny model.
The baseline's is that of the whole model with SVDs of the first layer only: later layers add nothing.
Accuracy is that of alpha_hill against a float64 SVD, on spectra of growing steepness lambda_max / lambda_{M-k}.

Usage: python benchmarks/adaptive_ranks.py [--model gemma3_1b|llama32_1b] [--layers N] [--runs 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.record import environment, publish, summary

# From the published config.json files; vocabulary reduced, since embeddings have no part in this.
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_1b": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 1024,
    },
    "llama32_1b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16}
NAMES = {"gemma3_1b": "Gemma-3-1B", "llama32_1b": "Llama-3.2-1B"}
BASELINES = ("svdvals", "svdvals_tall")
LAYERS_PER_SHARD = 4
STEEPNESS = (1e2, 1e4, 1e6, 1e8)


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and bf16 shards of random weights under transformers' names."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in skeleton.named_parameters():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        shards.setdefault(layer // LAYERS_PER_SHARD, {})[name] = value
    weight_map: dict[str, str] = {}
    for number, tensors in shards.items():
        file = f"model-{number:05d}.safetensors"
        drawn = {name: (0.02 * torch.randn(value.shape)).bfloat16() for name, value in tensors.items()}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(drawn, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def layer_pattern(layers: int) -> str:
    """Regular expression of the projections of the first layers."""
    return rf"model\.layers\.({'|'.join(map(str, range(layers)))})\..*_proj"


def measure_ours(folder: Path, layers: int, workers: int) -> dict[str, Any]:
    """Seconds and peak memory of compute_ranks."""
    from polar.ranks import RankSettings, compute_ranks

    settings = RankSettings(fraction=1.0, include=(layer_pattern(layers),), budget="r=16")
    compute_ranks(str(folder.with_name("tiny")), RankSettings(include=(layer_pattern(1),)), workers=workers)
    before = reset_peak()
    start = clocks()
    content, _ = compute_ranks(str(folder), settings, workers=workers)
    return {**elapsed(start), "peak_mib": (peak() - before) / 2**20, "num_weights": len(content["modules"])}


def measure_baseline(folder: Path, layers: int, tall: bool) -> dict[str, Any]:
    """Seconds of one SVD per weight, peak memory with the loaded model."""
    import re

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder.with_name("tiny"), dtype=torch.bfloat16)
    before = reset_peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():  # transformers maps the files: a page counts once it has been read
        parameter.data.to(torch.float32)
    start = clocks()
    number = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(layer_pattern(layers), name):
            W = module.weight.data.to(torch.float32)
            torch.linalg.svdvals(W.T if tall and W.shape[0] < W.shape[1] else W)
            number += 1
    return {**elapsed(start), "peak_mib": (peak() - before) / 2**20, "num_weights": number}


def clocks() -> tuple[float, float]:
    """Wall clock, and processor time of all threads of this process."""
    return time.perf_counter(), time.process_time()


def elapsed(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since `start`, by both clocks."""
    wall, processor = clocks()
    return {"seconds": wall - start[0], "cpu_seconds": processor - start[1]}


def reset_peak() -> int:
    """Start a new high-water mark of resident memory and return the present level, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def accuracy(M: int, N: int) -> list[dict[str, float]]:
    """Relative errors of alpha_hill (median fit) against a float64 SVD."""
    from polar.base_spectra import gram_spectrum
    from polar.heavy_tails import fit_power_law

    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(N, M, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(M, M, generator=generator, dtype=torch.float64)).Q
    rows = []
    for steepness in STEEPNESS:
        tail = torch.logspace(0, math.log10(steepness), M // 20, dtype=torch.float64)
        eigenvalues = torch.cat([torch.linspace(0.5, 1, M - M // 20, dtype=torch.float64), tail])
        W = ((left * eigenvalues.sqrt()) @ right.T).float()
        want = fit_power_law(torch.linalg.svdvals(W.double()).flip(0) ** 2).alpha
        spectra = {
            "float32_svd": torch.linalg.svdvals(W).flip(0).double() ** 2,
            "float32_gram": gram_spectrum(W, "float32").eigenvalues,
            "float64_gram": gram_spectrum(W, "float64").eigenvalues,
            "auto": gram_spectrum(W).eigenvalues,
        }
        errors = {name: abs(fit_power_law(values).alpha / want - 1) for name, values in spectra.items()}
        rows.append({"steepness": steepness, **errors})
    return rows


def child(arguments: argparse.Namespace, folder: Path, method: str, layers: int, threads: int) -> dict[str, Any]:
    """Measure one method in a process of its own."""
    command = [sys.executable, __file__, "--measure", method, "--folder", str(folder), "--layers", str(layers)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=True, env=variables
    )
    result = json.loads(done.stdout.splitlines()[-1])
    times = f"{result['seconds']:8.2f} s, {result['cpu_seconds']:8.2f} s of processor time"
    print(f"{method:13s} {threads} thread(s) {times}, {result['peak_mib']:6.0f} MiB", file=sys.stderr, flush=True)
    return result


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements, and what they say."""
    total = MODELS[arguments.model]["num_hidden_layers"]
    layers = min(arguments.layers or total, total)
    threads = arguments.threads
    counts = sorted({1, threads})
    seconds: dict[str, dict[str, list[float]]] = {"seconds": {}, "cpu_seconds": {}}
    number = 0
    for _ in range(arguments.runs):
        for method, count in [(name, n) for name in ("ours", *BASELINES) for n in counts]:
            result = child(arguments, folder, method, layers, count)
            for key, found in seconds.items():
                found.setdefault(f"{method}_{count}_threads", []).append(result[key])
            number = result["num_weights"]
    memory = {
        "ours": child(arguments, folder, "ours", total, threads)["peak_mib"],
        "svdvals": child(arguments, folder, "svdvals", 1, 1)["peak_mib"],
    }
    times = {key: {name: summary(values) for name, values in found.items()} for key, found in seconds.items()}
    hidden, inner = (MODELS[arguments.model][key] for key in ("hidden_size", "intermediate_size"))
    return {
        "question": "time and memory of adaptive ranks against one float32 SVD per weight",
        **environment(),
        "device": "cpu",
        "threads": threads,
        "model": NAMES[arguments.model],
        "layers": layers,
        "layers_of_model": total,
        "num_weights": number,
        **times,
        "times_faster_than": {key: times_faster(found, counts) for key, found in times.items()},
        "peak_mib": memory,
        "weights_mib": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20,
        "largest_weight_mib": {"bf16": hidden * inner * 2 / 2**20, "float32": hidden * inner * 4 / 2**20},
        "accuracy_shape": [inner // 2, hidden],
        "accuracy": accuracy(hidden, inner // 2),
    }


def times_faster(times: dict[str, dict[str, float]], counts: list[int]) -> dict[str, float]:
    """Median of each baseline over ours, each with the number of threads that suits it best."""
    best = {name: min(times[f"{name}_{n}_threads"]["median"] for n in counts) for name in ("ours", *BASELINES)}
    return {name: best[name] / best["ours"] for name in BASELINES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gemma3_1b")
    parser.add_argument("--layers", type=int, help="layers that are timed (memory is always that of all); default: all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=("ours", *BASELINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure == "ours":
        print(json.dumps(measure_ours(arguments.folder, arguments.layers, arguments.threads)))
    elif arguments.measure:
        print(json.dumps(measure_baseline(arguments.folder, arguments.layers, arguments.measure == "svdvals_tall")))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            config = MODELS[arguments.model]
            write_model(Path(scratch) / "model", config)
            write_model(Path(scratch) / "tiny", {**config, **TINY})
            publish(run(arguments, Path(scratch) / "model"), arguments.out)


if __name__ == "__main__":
    main()
