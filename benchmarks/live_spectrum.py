"""What the stable rank in the training log costs: one measurement beside a training step and beside the error alone.

Two parts, both in processor time. `step`: a model of about 152 M parameters trains with AdamW and the manifold step;
every second step also measures what the log gets, orthonormality error and stable rank, so that both kinds of step see
the same machine. A run measures at logging steps only: with logging_steps = N the cost is 1 / N of it. `modules`: the
measurement over all 310 adapted modules of Gemma-3-27B (five per layer, one process), beside the orthonormality error
alone, which the log had before.

Usage: python benchmarks/live_spectrum.py [--steps 24] [--runs 9] [--r 16] [--threads 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import polar
from benchmarks.record import environment, publish, summary
from benchmarks.step_overhead import TARGETS, make_model
from polar.live_spectrum import LiveSpectrum

LAYERS, HIDDEN, MIDDLE, HEADS, KEYS = 62, 5376, 21504, 4096, 2048  # Gemma-3-27B
SHAPES = [(HEADS, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]
WARM_UP = 2


class Factors(nn.Module):
    """The three factors of one module, under the names of the tuner, without a base weight."""

    def __init__(self, d_out: int, d_in: int, r: int) -> None:
        super().__init__()
        for name, n in (("polar_X", d_out), ("polar_Y", d_in)):
            factor = nn.Parameter(torch.linalg.qr(torch.randn(n, r)).Q.contiguous())
            setattr(self, name, nn.ParameterDict({"default": factor}))
        self.polar_Theta = nn.ParameterDict({"default": nn.Parameter(torch.randn(r, r))})


def time_ms(work: Callable[[], Any]) -> float:
    """Processor milliseconds of one call, all threads together: other work on the machine hardly touches them."""
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def measure_modules(r: int, runs: int) -> dict[str, Any]:
    """Time the measurement over the factors of Gemma-3-27B, and the orthonormality error alone, in turns."""
    torch.manual_seed(0)
    model = nn.ModuleList(Factors(*shape, r) for _ in range(LAYERS) for shape in SHAPES)
    handle = polar.constrain(model)
    live = LiveSpectrum(model, handle)
    works: dict[str, Callable[[], Any]] = {"error": handle.orthonormality_error, "error_and_rank": live.measure}
    found: dict[str, list[float]] = {name: [] for name in works}
    for run in range(WARM_UP + runs):
        for name, work in works.items():
            elapsed = time_ms(work)
            if run >= WARM_UP:
                found[name].append(elapsed)
    measured = live.measure()
    handle.remove()
    return {
        "num_modules": len(model),
        "cpu_ms": {name: summary(values) for name, values in found.items()},
        "measured": measured,
    }


def measure_steps(r: int, steps: int, length: int, batch: int) -> dict[str, Any]:
    """Train; measure in every second step; return the times of both kinds of step, and of the measurement alone."""
    model = get_peft_model(make_model("medium", "cpu"), polar.PolarConfig(r=r, alpha=2 * r, target_modules=TARGETS))
    handle = polar.constrain(model)
    live = LiveSpectrum(model, handle)
    ids = torch.randint(32_768, (batch, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(measures: bool) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if measures:
            live.measure()

    found: dict[str, list[float]] = {"without": [], "with": []}
    alone = []
    for number in range(2 * WARM_UP + 2 * steps):
        measures = number % 4 in (1, 2)  # without, with, with, without: a drift of the machine cancels
        elapsed = time_ms(lambda measures=measures: step(measures))  # type: ignore[misc]
        if number >= 2 * WARM_UP:
            found["with" if measures else "without"].append(elapsed)
            alone.append(time_ms(live.measure))
    step_ms = {name: summary(values) for name, values in found.items()}
    measurement_ms = summary(alone)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_modules": handle.num_factors // 2,
        "step_cpu_ms": step_ms,
        "measurement_cpu_ms": measurement_ms,
        "step_time_with_over_without": step_ms["with"]["median"] / step_ms["without"]["median"],
        "measurement_over_step": measurement_ms["median"] / step_ms["without"]["median"],
    }


def main() -> None:
    """Measure both parts and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24, help="timed steps of each kind")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--runs", type=int, default=9, help="measurements over the modules of Gemma-3-27B")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = [os.getloadavg()[0]]
    steps = measure_steps(arguments.r, arguments.steps, arguments.length, arguments.batch)
    modules = measure_modules(arguments.r, arguments.runs)
    record = {
        "question": "processor time of orthonormality error and stable rank at a logging step, beside a training step",
        **environment(),
        **{key: getattr(arguments, key) for key in ("r", "steps", "length", "batch", "runs", "threads")},
        "load_average": [*load, os.getloadavg()[0]],
        "step": steps,
        "modules": modules,
    }
    publish(record, arguments.out)


if __name__ == "__main__":
    main()
