"""How long does the manifold step of a whole model take, and how much scratch memory?

All Stiefel factors of Gemma-3-27B (62 layers; q, k, v, up, down), fp32, one process. Each method does what a step
needs: the field before the optimizer, the retraction after it. Methods alternate in one run.

    ours           polar.constrain's two hooks around an optimizer step that does nothing
    ours_landing   the landing field of the same hooks, no retraction
    landing_nxn    the landing formula with n x n matrices, as the paper's code computes it   (a)
    svd            projection, then one SVD per factor                                        (b)
    svd_batched    projection, then one batched SVD per shape                                 (c)
    qr             projection, then one QR per factor                                         (d)

Scratch memory is the peak of what is allocated during the step beyond factors and gradients: resident memory of a
fresh process on a CPU, the allocator's counter on a GPU.

Usage: python benchmarks/manifold_step.py [--layers 62] [--r 16] [--runs 7] [--device cpu|cuda] [--out FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import polar
from benchmarks.record import device_name, environment, publish, summary
from polar.steps import ManifoldStepName

# (d_in, d_out) of the adapted projections of Gemma-3-27B, q k v up down, from its published config.json.
PROJECTIONS = [(5376, 4096), (5376, 2048), (5376, 2048), (5376, 21504), (21504, 5376)]
BASELINES = ("landing_nxn", "svd", "svd_batched", "qr")
METHODS = ("ours", "ours_landing", *BASELINES)


class DoNothing(torch.optim.SGD):
    """An optimizer whose step costs nothing, so that only the hooks are timed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def make_factors(layers: int, r: int, device: str) -> nn.ModuleList:
    """Orthonormal factors with gradients of the size of a tangent step of 4e-3."""
    torch.manual_seed(0)
    model = nn.ModuleList()
    for d_in, d_out in PROJECTIONS * layers:
        layer = nn.Module()
        for name, n in (("polar_X", d_out), ("polar_Y", d_in)):
            Q = torch.linalg.qr(torch.randn(n, r, device=device))[0].contiguous()
            parameter = nn.Parameter(Q + 4e-3 * torch.randn(n, r, device=device) / n**0.5)
            parameter.grad = torch.randn(n, r, device=device)
            setattr(layer, name, nn.ParameterDict({"default": parameter}))
        model.append(layer)
    return model


def baseline_step(method: str, parameters: list[nn.Parameter]) -> None:
    """One field and one retraction for all factors, the way a user would write it."""
    with torch.no_grad():
        if method == "landing_nxn":
            for X in parameters:
                G = gradient(X)
                A = G @ X.T - X @ G.T
                X.grad = A @ X + 5e-3 * X @ (X.T @ X - torch.eye(X.shape[1], device=X.device))
            return
        for X in parameters:
            XtG = X.T @ gradient(X)
            X.grad = gradient(X) - X @ (0.5 * (XtG + XtG.T))
        if method == "qr":
            for X in parameters:
                Q, R = torch.linalg.qr(X)
                X.copy_(Q * R.diagonal().sign())
        elif method == "svd":
            for X in parameters:
                U, _, Vh = torch.linalg.svd(X, full_matrices=False)
                X.copy_(U @ Vh)
        else:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for X in parameters:
                by_shape.setdefault(X.shape, []).append(X)
            for group in by_shape.values():
                U, _, Vh = torch.linalg.svd(torch.stack(list(group)), full_matrices=False)
                for X, value in zip(group, U @ Vh, strict=True):
                    X.copy_(value)


def gradient(X: nn.Parameter) -> Tensor:
    assert X.grad is not None
    return X.grad


def make_step(method: str, layers: int, r: int, device: str) -> tuple[Callable[[], None], list[nn.Parameter]]:
    """A function that does one manifold step, and the factors it works on."""
    model = make_factors(layers, r, device)
    parameters = list(model.parameters())
    if method in BASELINES:
        return lambda: baseline_step(method, parameters), parameters
    step: ManifoldStepName = "landing" if method == "ours_landing" else "retract_polar"
    handle = polar.constrain(model, step, landing_penalty=5e-3, landing_convention="upstream")
    optimizer = DoNothing(parameters, lr=0.0)
    optimizer.model_and_handle = model, handle  # type: ignore[attr-defined]  # both live as long as the step
    return optimizer.step, parameters


def prepare(parameters: list[nn.Parameter], start: list[Tensor]) -> None:
    """Put the factors back to a state off the manifold, as an optimizer step leaves them; not timed."""
    with torch.no_grad():
        for X, value in zip(parameters, start, strict=True):
            X.copy_(value)
            torch.randn(X.shape, out=gradient(X))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def scratch_mib(method: str, arguments: argparse.Namespace) -> float:
    """Peak scratch memory of one step, in MiB, in a process of its own."""
    command = [sys.executable, __file__, "--measure_memory", method, "--layers", str(arguments.memory_layers)]
    done = subprocess.run(
        [*command, "--r", str(arguments.r), "--device", arguments.device, "--threads", str(arguments.threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure_memory(arguments: argparse.Namespace) -> None:
    """Print the peak of resident (CPU) or allocated (GPU) memory above the level before the second step, in MiB."""
    method = arguments.measure_memory
    # A tiny first step loads libraries and sizes thread pools without touching pages of the size that is measured.
    tiny, tiny_parameters = make_small_step(method, arguments.device)
    tiny()
    del tiny, tiny_parameters
    step, _ = make_step(method, arguments.layers, arguments.r, arguments.device)
    if arguments.device == "cuda":
        synchronise("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise("cuda")
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    before = resident_bytes()
    watcher.start()
    step()
    stop.set()
    watcher.join()
    print(max(0, peak[0] - before) / 2**20)


def make_small_step(method: str, device: str) -> tuple[Callable[[], None], list[nn.Parameter]]:
    global PROJECTIONS
    full, PROJECTIONS = PROJECTIONS, [(64, 48)]
    try:
        return make_step(method, 1, 16, device)
    finally:
        PROJECTIONS = full


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62, help="decoder layers; a step is linear in them")
    parser.add_argument("--nxn_layers", type=int, default=1, help="layers for landing_nxn, scaled up to --layers")
    parser.add_argument("--memory_layers", type=int, default=4, help="layers for the memory measurement")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure_memory", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        measure_memory(arguments)
        return
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    steps: dict[str, tuple[Callable[[], None], list[nn.Parameter], list[Tensor]]] = {}
    for method in METHODS:
        layers = arguments.nxn_layers if method == "landing_nxn" else arguments.layers
        step, parameters = make_step(method, layers, arguments.r, arguments.device)
        start = [parameter.detach().clone() for parameter in parameters]
        steps[method] = step, parameters, start
        timed(step, arguments.device)  # warm-up: plans, thread pools, kernels
    for run in range(arguments.runs):
        for method, (step, parameters, start) in steps.items():
            if method == "landing_nxn" and run > 1:
                continue  # tens of seconds each
            prepare(parameters, start)
            scale = arguments.layers / arguments.nxn_layers if method == "landing_nxn" else 1.0
            seconds[method].append(timed(step, arguments.device) * scale)
            print(f"run {run + 1}/{arguments.runs}  {method:13s} {seconds[method][-1] * 1e3:10.1f} ms", flush=True)
    steps.clear()
    memory = {method: scratch_mib(method, arguments) for method in METHODS}
    ours = summary(seconds["ours"])["median"]
    ours_landing = summary(seconds["ours_landing"])["median"]
    result = {
        "question": "time and scratch memory of one manifold step over all factors of Gemma-3-27B",
        **environment(),
        "layers": arguments.layers,
        "num_factors": 2 * len(PROJECTIONS) * arguments.layers,
        "r": arguments.r,
        "threads": arguments.threads,
        "device": device_name(arguments.device),
        "landing_nxn_note": f"timed on {arguments.nxn_layers} layers and scaled to {arguments.layers}",
        "memory_note": f"MiB on {arguments.memory_layers} layers; svd_batched grows with the number of layers",
        "ms": {method: summary([1e3 * value for value in values]) for method, values in seconds.items()},
        "scratch_mib": memory,
        "times_faster_than": {m: summary(seconds[m])["median"] / ours for m in BASELINES},
        "landing_times_faster_than_nxn": summary(seconds["landing_nxn"])["median"] / ours_landing,
        "times_less_scratch_than": {m: memory[m] / max(memory["ours"], 1e-3) for m in BASELINES},
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
