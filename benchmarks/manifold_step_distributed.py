"""How long does the manifold step take on two real ranks that hold the factors as under ZeRO-3?

All Stiefel factors of Gemma-3-27B (62 layers; q, k, v, up, down), fp32, in a real DeepSpeed ZeRO-3 engine on gloo ranks
of one machine. A step is the field on the gradients and the retraction of the values. Methods alternate in one run:

    sharded    polar's default: r x r sums of what each rank holds
    gather     polar's reference: each factor whole on every rank
    user       what one writes by hand: safe_get_full_grad, projection, safe_set_full_grad, then GatheredParameters with
               modifier_rank=0 and one SVD, factor by factor

Before timing, every factor and every field of `sharded` and `gather` is compared with those of `user`. The hand-written
way is the shortest one: GatheredParameters changes the compute copy of a factor and not the fp32 master that the
optimizer steps, so a user would have to write each factor there too. The result file says whether that was so.

Usage: python benchmarks/manifold_step_distributed.py [--layers 62] [--r 16] [--runs 5] [--ranks 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.manifold_step import DoNothing, make_factors
from benchmarks.record import environment, publish, summary
from polar import stiefel
from polar.factor_batch import FactorBatch, batches_of
from polar.gathered import GatheredBatch, gather
from polar.launch import end_process, join_deepspeed
from polar.shards import FactorSlice, resolve
from polar.steps import make_step

PHASES = ("field", "retraction")
METHODS = ("sharded", "gather", "user")
# fp32 factors of about 1e-2 per element after one step; measured 1e-7.
MAX_DIFFERENCE = 2e-6


class Held:
    """The factors in the engine, and a state off the manifold to start each method from."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.slices: list[FactorSlice] = list(resolve(self.parameters, model).values())
        for item in self.slices:
            item.leaf.grad = torch.zeros_like(item.leaf)
        self._values = [item.values().clone() for item in self.slices]
        torch.manual_seed(dist.get_rank())
        self._gradients = [torch.randn(item.numel) for item in self.slices]

    def reset(self) -> None:
        """Values and gradients as after an optimizer step and a backward, where every method looks for them."""
        from deepspeed.utils import safe_set_local_grad

        for parameter, item, value, gradient in zip(
            self.parameters.values(), self.slices, self._values, self._gradients, strict=True
        ):
            item.values().copy_(value)
            parameter.ds_tensor.data[: item.numel].copy_(value)
            local = item.grad()
            assert local is not None
            local.copy_(gradient)
            padded = torch.zeros(parameter.partition_numel())
            padded[: item.numel] = gradient
            safe_set_local_grad(parameter, padded)


def zero3_engine(layers: int, r: int) -> nn.Module:
    """The factors in a ZeRO-3 engine, each partitioned over all ranks."""
    import deepspeed

    model = make_factors(layers, r, "cpu")
    for parameter in model.parameters():
        parameter.grad = None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, optimizer=DoNothing(model.parameters(), lr=0.0), config=config)[0]
    model.engine = (engine,)  # type: ignore[assignment]  # a tuple, so that it is no submodule: it lives as long
    return model


def polar_phases(batches: Sequence[FactorBatch | GatheredBatch]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Field and retraction of polar, in one of its executions."""
    step = make_step("retract_polar", 0.0, "textbook")
    assert step.field is not None and step.retraction is not None
    field, retraction = step.field, step.retraction

    def apply_field() -> None:
        with stiefel.full_precision():
            for batch in batches:
                batch.apply_field(field, 1.0)

    def retract() -> None:
        with stiefel.full_precision():
            for batch in batches:
                batch.retract(retraction)

    return apply_field, retract


def user_phases(parameters: Sequence[Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Field and retraction as DeepSpeed's documentation lets a user write them."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

    @torch.no_grad()
    def apply_field() -> None:
        for X in parameters:
            G = safe_get_full_grad(X)
            with GatheredParameters([X]):
                XtG = X.data.T @ G
                field = G - X.data @ (0.5 * (XtG + XtG.T))
            safe_set_full_grad(X, field)

    @torch.no_grad()
    def retract() -> None:
        for X in parameters:
            with GatheredParameters([X], modifier_rank=0):
                if dist.get_rank() == 0:
                    U, _, Vh = torch.linalg.svd(X.data, full_matrices=False)
                    X.data.copy_(U @ Vh)

    return apply_field, retract


def whole_results(held: Held, method: str) -> tuple[list[Tensor], list[Tensor]]:
    """All fields and all factors of a method, whole."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_grad

    if method != "user":
        return [gather(item, item.grad()) for item in held.slices], [gather(i, i.values()) for i in held.slices]
    fields, factors = [], []
    for X in held.parameters.values():
        fields.append(safe_get_full_grad(X).view(X.ds_shape).clone())
        with GatheredParameters([X]):
            factors.append(X.data.clone())
    return fields, factors


def check(held: Held, phases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]]) -> dict[str, Any]:
    """Run each method once and compare with `user`; this is the warm-up too."""
    held.reset()
    masters = [item.values().clone() for item in held.slices]
    for phase in phases["user"]:
        phase()
    master_changed = any(not torch.equal(a, b.values()) for a, b in zip(masters, held.slices, strict=True))
    expected = whole_results(held, "user")
    differences: dict[str, dict[str, float]] = {}
    for method in ("sharded", "gather"):
        held.reset()
        for phase in phases[method]:
            phase()
        found = whole_results(held, method)
        differences[method] = {
            name: max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))
            for name, mine, theirs in zip(PHASES, found, expected, strict=True)
        }
    if max(value for of in differences.values() for value in of.values()) > MAX_DIFFERENCE:
        raise RuntimeError(f"the methods differ by more than {MAX_DIFFERENCE}: {differences}")
    if dist.get_rank() == 0:
        print(f"largest difference from user: {differences}", flush=True)
    return {"max_difference_from_user": differences, "gathered_parameters_reach_the_master": master_changed}


def timed(phase: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    phase()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def measure(rank: int, port: int, arguments: argparse.Namespace, out: str) -> None:
    """One rank."""
    ranks = arguments.ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    join_deepspeed()
    model = zero3_engine(arguments.layers, arguments.r)
    held = Held(model)
    phases = {
        "sharded": polar_phases(batches_of(held.slices)),
        "gather": polar_phases([GatheredBatch(held.slices)]),
        "user": user_phases(list(held.parameters.values())),
    }
    result = check(held, phases)
    seconds: dict[str, dict[str, list[float]]] = {method: {phase: [] for phase in PHASES} for method in METHODS}
    load = [os.getloadavg()[0]]
    for run in range(arguments.runs):
        for method in METHODS:
            if method == "gather" and run >= arguments.gather_runs:
                continue
            held.reset()
            for name, phase in zip(PHASES, phases[method], strict=True):
                seconds[method][name].append(timed(phase))
            if rank == 0:
                shown = "  ".join(f"{name} {1e3 * seconds[method][name][-1]:9.1f} ms" for name in PHASES)
                print(f"run {run + 1}/{arguments.runs}  {method:8s} {shown}", flush=True)
        load.append(os.getloadavg()[0])
    if rank == 0:
        Path(out).write_text(json.dumps({**result, "seconds": seconds, "load_average": load}))
    dist.barrier()
    end_process(0)  # the engine keeps gloo groups alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62, help="decoder layers; a step is linear in them")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gather_runs", type=int, default=2, help="runs of gather, which takes longest")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "measured.json"
        torch.multiprocessing.spawn(measure, (port, arguments, str(path)), nprocs=arguments.ranks)
        measured = json.loads(path.read_text())
    seconds = measured.pop("seconds")
    ms = {}
    for method, phases in seconds.items():
        phases["step"] = [sum(pair) for pair in zip(*(phases[name] for name in PHASES), strict=True)]
        ms[method] = {name: summary([1e3 * value for value in values]) for name, values in phases.items()}
    others = [method for method in METHODS if method != "sharded"]
    result = {
        "question": "time of one manifold step over all factors of Gemma-3-27B on ranks that hold them as under ZeRO-3",
        **environment(),
        "layers": arguments.layers,
        "num_factors": 10 * arguments.layers,
        "r": arguments.r,
        "ranks": arguments.ranks,
        "threads": 1,
        "device": "cpu",
        **measured,
        "ms": ms,
        "times_faster_than": {
            method: {name: ms[method][name]["median"] / ms["sharded"][name]["median"] for name in (*PHASES, "step")}
            for method in others
        },
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
