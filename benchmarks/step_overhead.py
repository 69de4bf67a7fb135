"""What does a training step with PoLAR cost beside LoRA, in time and in peak memory?

The same model (a random Gemma-3 text model, big enough that compute dominates), Hugging Face Trainer, batches, rank,
target modules and optimizer; only the adapter differs:

    lora            PEFT's LoRA
    polar           PoLAR with its retraction in every step (`polar.constrain`)
    polar_no_step   PoLAR factors trained by AdamW alone: what the layer costs without the manifold step

Every measurement is a process of its own, so that peak memory belongs to one method; the methods take turns. The first
steps of each process are left out. Peak memory is the largest resident set since the model was ready on a CPU, the
allocator's peak on a GPU.

Usage: python benchmarks/step_overhead.py [--size tiny|medium|large] [--device cpu|cuda] [--runs 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import polar
from benchmarks.record import device_name, environment, publish, summary

METHODS = ("lora", "polar", "polar_no_step")
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
# hidden size, layers, vocabulary: 0.4 M, about 130 M, about 1.3 B parameters
SIZES = {"tiny": (64, 2, 512), "medium": (768, 14, 32_768), "large": (2048, 26, 65_536)}
WARM_UP_STEPS = 2
MIB = 2.0**20


def make_model(size: str, device: str) -> Gemma3ForCausalLM:
    """A random model in the dtype in which it would be trained: bf16 on a GPU, fp32 on a CPU."""
    hidden_size, layers, vocabulary = SIZES[size]
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 128, 1),
        head_dim=64,
        sliding_window=512,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = Gemma3ForCausalLM(config)
    if device == "cuda":
        nn.Module.to(model, torch.bfloat16)
    return model


def add_adapter(model: Gemma3ForCausalLM, method: str, r: int) -> PeftModel:
    """LoRA or PoLAR of rank r on the same modules, fp32; PoLAR constrained as `polar train` does it."""
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS))
    adapted = get_peft_model(model, polar.PolarConfig(r=r, alpha=2 * r, target_modules=TARGETS))
    polar.constrain(adapted, "none" if method == "polar_no_step" else "retract_polar")
    return adapted


class RandomRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random token ids, the same for every method."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, the device synchronised at both ends."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.begin = 0.0

    def now(self) -> float:
        """Time, with nothing left to do on the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.begin)


def measure(arguments: argparse.Namespace) -> None:
    """Train one method for a few steps in this process and print one line of JSON."""
    device = arguments.device
    model = add_adapter(make_model(arguments.size, device), arguments.measure, arguments.r)
    num_steps = WARM_UP_STEPS + arguments.steps
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=arguments.batch,
            max_steps=num_steps,
            learning_rate=1e-3,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = RandomRows(num_steps * arguments.batch, arguments.length, SIZES[arguments.size][2])
        trainer = Trainer(model=model, args=options, train_dataset=rows, callbacks=[clock])
        reset_peak_memory(device)
        trainer.train()
    result = {
        "step_ms": [1e3 * value for value in clock.seconds[WARM_UP_STEPS:]],
        "peak_mib": peak_memory_mib(device),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(result))


def reset_peak_memory(device: str) -> None:
    """Start counting the peak here: making the model needs more memory than some models need to train."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: str) -> float:
    """Largest use since `reset_peak_memory`, in MiB: the allocator's on a GPU, the process's resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / MIB


def run_once(method: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one method in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--measure", method]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large" if cuda else "medium")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--length", type=int, default=512 if cuda else 256, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8 if cuda else 2, help="rows per step")
    parser.add_argument("--steps", type=int, default=20 if cuda else 4, help="timed steps per process")
    parser.add_argument("--runs", type=int, default=5, help="processes per method")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Measure all methods in turns and print the result."""
    arguments = parse(sys.argv[1:])
    if arguments.measure:
        measure(arguments)
        return
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for run in range(arguments.runs):
        # Each run begins with another method, so that none always has the warmest or the coolest machine.
        for method in METHODS[run % len(METHODS) :] + METHODS[: run % len(METHODS)]:
            result = run_once(method, sys.argv[1:])
            found[method].append(result)
            best = min(result["step_ms"])
            print(
                f"run {run + 1}/{arguments.runs}  {method:13s} {best:9.1f} ms  {result['peak_mib']:9.1f} MiB",
                flush=True,
            )
    step_ms = {method: summary([v for result in found[method] for v in result["step_ms"]]) for method in METHODS}
    peak_mib = {method: summary([result["peak_mib"] for result in found[method]]) for method in METHODS}
    others = METHODS[1:]
    record = {
        "question": "time and peak memory of a training step with PoLAR beside PEFT's LoRA",
        **environment(),
        **{key: getattr(arguments, key) for key in ("size", "r", "length", "batch", "steps", "runs")},
        "threads": torch.get_num_threads(),
        "device": device_name(arguments.device),
        "num_parameters": found["lora"][0]["num_parameters"],
        "num_trainable": {method: found[method][0]["num_trainable"] for method in METHODS},
        "step_ms": step_ms,
        "peak_mib": peak_mib,
        "step_time_over_lora": {
            key: {method: step_ms[method][key] / step_ms["lora"][key] for method in others} for key in ("min", "median")
        },
        "peak_memory_over_lora": {method: peak_mib[method]["median"] / peak_mib["lora"]["median"] for method in others},
    }
    publish(record, arguments.out)


if __name__ == "__main__":
    main()
