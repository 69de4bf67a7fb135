"""One rank of tests/distributed/test_engine_state.py.

Usage: python engine_state_worker.py FOLDER; it forks the ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import network
from constrain_worker import fsdp2_model, has_moments, make_optimizer, named, whole, zero_engine

import polar
from polar.engine_state import whole_optimizer_state, whole_values, write_optimizer_state, write_values

CASES: list[dict[str, Any]] = [
    {"engine": "zero3", "sub_group_size": 60, "groups": "split"},
    {"engine": "ddp"},
    {"engine": "zero2", "groups": "split"},
    {"engine": "fsdp2"},
    {"engine": "zero1"},
    {"engine": "zero3", "bf16": True},
    {"engine": "zero2", "bf16": True},
    {"engine": "zero3", "optimizer": "stiefel_adamw"},
    {"engine": "ddp", "optimizer": "stiefel_adamw"},
    {"engine": "fsdp2", "optimizer": "stiefel_adamw"},
    {"engine": "zero3", "offload": "optimizer", "optimizer": "cpu_adam"},  # what accelerate makes of AdamW
]
SAVING_RANKS = 2
# By number of ranks: which case reads whose state. On 3 ranks everybody reads another engine's; FSDP2 is HSDP on 4.
LOADS: dict[int, list[tuple[int, int]]] = {
    1: [(0, 0), (1, 0), (3, 0)],
    2: [(2, 0), (3, 0), (7, 7), (9, 7), (10, 0), (0, 10)],
    3: [*((k, (k + 1) % 7) for k in range(7)), (3, 0), (7, 8), (8, 9), (9, 7)],
    4: [(0, 0), (3, 0), (7, 7)],
}
STEPS_BEFORE, STEPS_AFTER = 3, 2


class Training:
    """The small network under one engine."""

    def __init__(self, case: dict[str, Any]) -> None:
        values, weights, self.batches = network.make_problem()
        self.case, self.model = case, network.make_network(values, weights)
        self.handle = polar.constrain(self.model)
        if case["engine"].startswith("zero"):
            self.wrapped = zero_engine(self.model, case)
            self.optimizer = self.wrapped.optimizer
        else:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model) if case["engine"] == "ddp" else None
            self.wrapped = self.wrapped or fsdp2_model(self.model)
            self.optimizer = make_optimizer(self.model, case)

    def run(self, first: int, number: int) -> list[float]:
        """Make steps; returns the mean loss of all ranks before each."""
        rank, ranks, losses = dist.get_rank(), dist.get_world_size(), []
        for inputs, targets in self.batches[first : first + number]:
            h, t = (torch.tensor(a[rank::ranks], dtype=torch.float32) for a in (inputs, targets))
            if self.case.get("bf16"):
                h, t = h.bfloat16(), t.bfloat16()
            loss = nn.functional.mse_loss(self.wrapped(h), t)
            if self.case["engine"].startswith("zero"):
                self.wrapped.backward(loss)
                self.wrapped.step()
            else:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            mean = loss.detach().float()
            dist.all_reduce(mean)
            losses.append(mean.item() / ranks)
        return losses

    def state(self) -> dict[str, Any]:
        optimizer = whole_optimizer_state(self.model, self.optimizer, keep=True)
        assert not optimizer.problem
        return {"values": whole_values(self.model), "moments": optimizer.moments, "steps": optimizer.steps}

    def compute_copies(self) -> dict[str, Tensor]:
        """What the next forward pass computes with, whole, by the engine's own means."""
        copies = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                if hasattr(parameter, "ds_id"):
                    import deepspeed

                    with deepspeed.zero.GatheredParameters([parameter]):
                        copies[name] = parameter.detach().clone()
                else:
                    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                    copies[name] = full.detach().clone()
        return copies


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of what is not equal bit for bit."""
    wrong = [f"{name} value" for name, value in expected["values"].items() if not same(found["values"][name], value)]
    for name, moments in expected["moments"].items():
        wrong += [f"{name} {k}" for k, value in moments.items() if not same(found["moments"][name][k], value)]
    return wrong + ([] if found["steps"] == expected["steps"] else ["steps"])


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.equal(found, expected)


def save(case: dict[str, Any], path: Path) -> dict[str, Any]:
    """Train, read the state, compare it with what the engine's own getters say, train on."""
    training = Training(case)
    training.run(0, STEPS_BEFORE)
    state = training.state()
    states = None if case["engine"].startswith("zero") else training.optimizer.state
    wrong = []
    for short, parameter in named(training.model):
        name = f"{short}.{network.ADAPTER}"
        for what in ("value", "exp_avg", "exp_avg_sq") if has_moments(case) else ("value",):
            tensor = state["values"][name] if what == "value" else state["moments"][name][what]
            if tensor.double().reshape(-1).tolist() != whole(parameter, what, states):
                wrong.append(f"{name} {what}")
    losses = training.run(STEPS_BEFORE, STEPS_AFTER)
    after = whole_values(training.model)
    if dist.get_rank() == 0:
        torch.save({"before": state, "after": after, "losses": losses}, path)
    training.handle.remove()
    return {"wrong": wrong, "steps": sorted(set(state["steps"].values()))}


def load(case: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write another engine's state, read it back, look at the compute copies, train on."""
    saved = torch.load(path)
    before = saved["before"]
    training = Training(case)
    write_values(training.model, lambda name: before["values"][name])
    keys = {name: sorted(moments) for name, moments in before["moments"].items()}
    read = lambda name, key: before["moments"][name][key]  # noqa: E731
    write_optimizer_state(training.model, training.optimizer, keys, before["steps"], read)
    wrong = differences(training.state(), before)
    for name, copy in training.compute_copies().items():
        if not same(copy, before["values"][name].to(copy.dtype)):
            wrong.append(f"{name} compute copy")
    losses = training.run(STEPS_BEFORE, STEPS_AFTER)
    after = whole_values(training.model)
    training.handle.remove()
    return {
        "wrong": wrong,
        "distance": max((after[n] - v).abs().max().item() for n, v in saved["after"].items()),
        "losses": losses,
        "expected_losses": saved["losses"],
    }


def rank_work(what: str, folder: Path) -> None:
    """All that one rank saves or loads."""
    from polar.launch import join_deepspeed

    torch.set_num_threads(1)
    join_deepspeed()  # without compiling DeepSpeed's own all-reduce
    if what == "save":
        for number, case in enumerate(CASES):
            result = save(case, folder / f"state-{number}.pt")
            (folder / f"save-{number}-{dist.get_rank()}.json").write_text(json.dumps(result))
    else:
        for number, source in LOADS[dist.get_world_size()]:
            result = load(CASES[number], folder / f"state-{source}.pt")
            name = f"load-{dist.get_world_size()}-{number}-{source}-{dist.get_rank()}.json"
            (folder / name).write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.runtime.zero.stage3  # noqa: F401  before the ranks are forked

    from tests.forked_ranks import run_ranks

    folder = Path(sys.argv[1])
    run_ranks(SAVING_RANKS, lambda: rank_work("save", folder), folder / "save.log")
    for ranks in LOADS:
        run_ranks(ranks, lambda: rank_work("load", folder), folder / f"load-{ranks}.log")


if __name__ == "__main__":
    main()
