"""Which manifold step, base optimizer and option converge best, and is the shipped default among them?

Two problems (`convergence_problems.py`): low-rank matrix factorisation with a controlled spectrum, and a tiny
language model. Every manifold step with every base optimizer, the options about momentum and width, the landing field
through n x n matrices as the paper's code computes it, and LoRA. The learning rate of each method is swept in steps of
about 3; the grid grows while its best rate is at an edge. The best rate has the lowest median final loss; among those
within 5 %, it is the one whose worst seed is best. Schedule: 3 % warm-up, then cosine to zero.

    factorisation    all seeds in the sweep; they train side by side in one process. Milliseconds per step are measured
                     apart, one seed at a time, in rounds in which the methods take turns
    language model   the sweep has the first seed; then the others at the best rate, methods in turns

"Seconds" are processor seconds of this process (`time.process_time`), one thread, because others may load the machine:
steps times the median of a step. Wall time of a step is stored beside it. A rate at which one of the seeds that train
together diverges counts as diverged.

Each finished training goes to `--partial` at once; the same command continues after a kill. Results are merged by part
into `--out`, with the plots beside it.

Usage: python benchmarks/convergence.py [--part factorisation|language_model] [--quick] [--out FILE] [--partial FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.convergence_problems import Factorisation, LanguageModel
from benchmarks.convergence_report import compare, draw
from benchmarks.convergence_training import PAPER_PENALTY, Method, Problem, Run
from benchmarks.record import device_name, environment

PARTS = ("factorisation", "language_model")
STEPS = ("retract_polar", "retract_qr", "landing", "euclidean_penalty", "none")
PAPER = {"landing_penalty": PAPER_PENALTY, "landing_convention": "upstream"}
TIE = 1.05  # losses within this ratio are equal in the choice of a rate
MAX_EXTENSIONS = 6  # rates added to a grid
# Exponents k of the first grids, around the best rates of a look at each problem; `rate_of` makes rates of them.
FIRST_GRIDS = {
    "factorisation": {"AdamW": (-4, -3, -2), "StiefelAdamW": (-2, -1, 0), "SGD": (-1, 0, 1)},
    "language_model": {"AdamW": (-4, -3, -2), "StiefelAdamW": (-4, -3, -2), "SGD": (-2, -1, 0)},
}
TIMING_ROUNDS, TIMING_STEPS = 5, 40


def rate_of(exponent: int) -> float:
    """1 or 3 times a power of ten: ..., 0.01, 0.03, 0.1, ... for ..., -4, -3, -2, ..."""
    return float(f"{3 if exponent % 2 else 1}e{exponent // 2}")


def factorisation_methods() -> list[Method]:
    """Every step with every base optimizer, the options with the default step, LoRA."""
    optimizers = ("AdamW", "SGD", "StiefelAdamW")
    methods = [Method(step, optimizer) for step in STEPS for optimizer in optimizers]
    methods += [Method("landing", optimizer, PAPER, "paper") for optimizer in ("AdamW", "SGD")]
    methods += [Method("landing_nxn", optimizer) for optimizer in ("AdamW", "SGD")]
    methods += [Method("retract_polar", o, {"project_momentum": True}, "project_momentum") for o in optimizers]
    methods += [Method("retract_polar", o, {"reference_width": True}, "reference_width") for o in optimizers]
    return [*methods, Method("lora", "AdamW"), Method("lora", "SGD")]


def language_model_methods() -> list[Method]:
    """The same with AdamW; the default step and landing with StiefelAdamW, the default step with SGD."""
    by_name = {method.name: method for method in factorisation_methods()}
    names = [f"{step} AdamW" for step in (*STEPS, "landing paper", "landing_nxn", "lora")]
    names += ["retract_polar project_momentum AdamW", "retract_polar reference_width AdamW", "retract_polar SGD"]
    names += [f"{step} StiefelAdamW" for step in ("retract_polar", "retract_polar project_momentum", "landing")]
    return [by_name[name] for name in names]


class Store:
    """Finished trainings, one JSON line each, so that a killed benchmark continues."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        if path is not None and path.exists():
            # A kill may have cut the last line: it goes.
            *whole, rest = path.read_text(encoding="utf-8").split("\n")
            for line in whole:
                key, run = json.loads(line)
                self.runs[key] = Run(**run)
            if rest:
                path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def get(self, problem: Problem, method: Method, rate: float, seeds: Sequence[int], **more: Any) -> Run:
        """The run with these settings: a stored one, or a new one."""
        key = json.dumps([str(problem), dataclasses.asdict(method), rate, list(seeds), more], sort_keys=True)
        if key not in self.runs:
            begin = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of rates that are too high, and of libraries
                run = problem.run(method, rate, seeds, more.get("steps"))
            self.runs[key] = run
            median, seconds = statistics.median(curve[-1] for curve in run.losses), time.perf_counter() - begin
            where = f"{problem.name:38s} {method.name:44s} {rate:<7g} {list(seeds)!s:16s}"
            print(f"{where} {median:9.3g} {seconds:5.1f} s", flush=True)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, dataclasses.asdict(run)]) + "\n")
        return self.runs[key]


def best_exponent(losses: dict[int, list[float]], floor: float) -> int:
    """The exponent with the lowest median loss; of those within TIE of it, the one whose worst seed is best."""
    clipped = {k: [max(value, floor) for value in values] for k, values in losses.items()}
    lowest = min(statistics.median(values) for values in clipped.values())
    tied = [k for k, values in clipped.items() if statistics.median(values) <= TIE * lowest]
    return min(tied, key=lambda k: (max(clipped[k]), statistics.median(clipped[k]), k))


def sweep(losses_at: Callable[[int], list[float]], first: Iterable[int], floor: float) -> dict[int, list[float]]:
    """Final losses per exponent; the grid grows by one while its best exponent is at an edge."""
    losses = {k: losses_at(k) for k in first}
    for _ in range(MAX_EXTENSIONS):
        best = best_exponent(losses, floor)
        if min(losses) < best < max(losses):
            break
        k = best - 1 if best == min(losses) else best + 1
        losses[k] = losses_at(k)
    return losses


def measure(
    problem: Problem, methods: Sequence[Method], first: dict[str, Iterable[int]], store: Store, timing_rounds: int
) -> dict[str, Any]:
    """Sweep all methods from their optimizer's first grid, train the remaining seeds, measure the time of a step."""
    swept: dict[str, dict[int, list[float]]] = {}
    for method in methods:

        def losses_at(k: int, method: Method = method) -> list[float]:
            run = store.get(problem, method, rate_of(k), problem.sweep_seeds)
            return [curve[-1] for curve in run.losses]

        swept[method.name] = sweep(losses_at, first[method.optimizer], problem.floor)
    rates = {name: rate_of(best_exponent(losses, problem.floor)) for name, losses in swept.items()}
    runs = {m.name: [store.get(problem, m, rates[m.name], problem.sweep_seeds)] for m in methods}
    for seed in problem.seeds:
        if seed not in problem.sweep_seeds:
            for method in methods:
                runs[method.name].append(store.get(problem, method, rates[method.name], (seed,)))
    timed = {name: list(of) for name, of in runs.items()}
    if timing_rounds:
        timed = {name: [] for name in runs}
        for k in range(timing_rounds):
            for m in methods:
                run = store.get(problem, m, rates[m.name], problem.seeds[:1], steps=TIMING_STEPS, round=k)
                timed[m.name].append(run)
    return {
        "settings": dataclasses.asdict(problem),  # type: ignore[call-overload]
        "methods": {m.name: summarise(m, rates[m.name], swept[m.name], runs[m.name], timed[m.name]) for m in methods},
    }


def summarise(
    method: Method, rate: float, swept: dict[int, list[float]], runs: Sequence[Run], timed: Sequence[Run]
) -> dict[str, Any]:
    """What is stored of one method on one problem; a loss that diverged is null."""
    losses = [curve for run in runs for curve in run.losses]
    return {
        "step": method.step,
        "optimizer": method.optimizer,
        "options": method.options,
        "rate": rate,
        "swept": {f"{rate_of(k):g}": rounded(statistics.median(values)) for k, values in sorted(swept.items())},
        "final": [rounded(curve[-1]) for curve in losses],
        "orthonormality_error": rounded(max((v for run in runs for v in run.orthonormality), default=math.nan)),
        "cpu_ms_per_step": rounded(statistics.median(run.cpu_ms for run in timed)),
        "wall_ms_per_step": rounded(statistics.median(run.wall_ms for run in timed)),
        "steps": runs[0].steps,
        "losses": [[rounded(value) for value in curve] for curve in losses],
    }


def rounded(value: float) -> float | None:
    """Four digits; None for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def problems_of(part: str, quick: bool) -> list[Problem]:
    """The problems of a part; `quick` for a look: fewer, shorter, fewer seeds."""
    if part == "factorisation":
        if quick:
            return [Factorisation(condition=10, r=4, target_rank=4, rows=40, columns=30, steps=20, seeds=(0, 1))]
        return [Factorisation(condition=c, r=r) for c, r in ((10, 8), (100, 8), (100, 16), (100, 32))]
    return [LanguageModel(steps=6, evaluations=2, seeds=(0, 1)) if quick else LanguageModel()]


def run_part(part: str, store: Store, quick: bool) -> dict[str, Any]:
    """Measure one part."""
    begin = time.process_time()
    methods = factorisation_methods() if part == "factorisation" else language_model_methods()
    if quick:
        wanted = ("retract_polar AdamW", "retract_polar StiefelAdamW", "landing_nxn AdamW", "lora AdamW")
        methods = [method for method in methods if method.name in wanted]
    rounds = 0 if part == "language_model" else 1 if quick else TIMING_ROUNDS
    first: Any = FIRST_GRIDS[part]
    found = {problem.name: measure(problem, methods, first, store, rounds) for problem in problems_of(part, quick)}
    return {
        **environment(),
        "threads": torch.get_num_threads(),
        "device": device_name("cpu"),
        "cpu_minutes_of_last_session": rounded((time.process_time() - begin) / 60),
        "problems": found,
    }


def to_json(result: dict[str, Any]) -> str:
    """Indented, with every list of plain values on one line."""
    text = json.dumps(result, indent=2, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, compare, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--quick", action="store_true", help="a look at tiny versions; numbers mean nothing")
    parser.add_argument("--out", type=Path, help="result file; parts that it has already stay")
    parser.add_argument("--partial", type=Path, help="finished trainings; removed when both parts are in --out")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = arguments.out
    if out is not None:
        from polar.plotting import require_matplotlib

        require_matplotlib()
    store = Store(arguments.partial)
    result: dict[str, Any] = {"question": "which manifold step, base optimizer and option converge best", "parts": {}}
    if out is not None and out.exists():
        result["parts"] = json.loads(out.read_text(encoding="utf-8"))["parts"]
    for part in (arguments.part,) if arguments.part else PARTS:
        parts = {**result["parts"], part: run_part(part, store, arguments.quick)}
        result["parts"] = {name: parts[name] for name in PARTS if name in parts}
        result["comparison"] = compare(result["parts"])
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(to_json(result), encoding="utf-8")
    print(json.dumps(result["comparison"], indent=2))
    if out is not None:
        draw(result["parts"], out.parent)
        if len(result["parts"]) == len(PARTS) and arguments.partial is not None:
            arguments.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
