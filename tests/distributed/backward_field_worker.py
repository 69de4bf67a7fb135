"""One rank of tests/distributed/test_backward_field.py: the tuner's layers under several engines, results to a file.

Usage: torchrun --nproc_per_node N backward_field_worker.py OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
import network
from constrain_worker import LR, fsdp2_model, named, parameter_groups, whole, zero_engine

import polar
from polar import PolarConfig, PolarLinear
from polar.launch import join_deepspeed

TEXTBOOK = {"landing_penalty": 0.3, "landing_convention": "textbook"}
UPSTREAM = {"landing_penalty": 0.3, "landing_convention": "upstream"}
CASES: list[dict[str, Any]] = [
    {"engine": "ddp", "backward_field": "landing", **UPSTREAM},
    {"engine": "ddp", "backward_field": "landing", **TEXTBOOK, "accumulation": 2},
    {"engine": "zero1", "backward_field": "landing", **UPSTREAM, "accumulation": 2},
    {"engine": "zero2", "backward_field": "landing", **TEXTBOOK, "accumulation": 2},
    {"engine": "zero3", "backward_field": "landing", **TEXTBOOK, "accumulation": 2},
    {"engine": "zero3", "backward_field": "landing", **UPSTREAM, "checkpointing": True},
    {"engine": "fsdp2", "backward_field": "landing", **TEXTBOOK, "accumulation": 2},
    {"engine": "fsdp2", "backward_field": "landing", **UPSTREAM, "checkpointing": True},
    {"engine": "zero3", "backward_field": "tangent", "accumulation": 2},
    {"engine": "fsdp2", "backward_field": "tangent"},
]


class Layer(PolarLinear):
    """The tuner's layer, then tanh: the layer of tests/reference.py."""

    checkpointing = False

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.checkpointing:
            return torch.tanh(checkpoint(super().forward, h, use_reentrant=False))
        return torch.tanh(super().forward(h))


def make_model(values: dict[str, np.ndarray], weights: list[np.ndarray], case: dict[str, Any]) -> nn.Sequential:
    options = {key: value for key, value in case.items() if key.startswith(("backward", "landing"))}
    if case.get("backward_field") == "landing":
        options["gradient_accumulation_steps"] = case.get("accumulation", 1)
    layers = []
    for k, (W0, scale) in enumerate(zip(weights, network.SCALES, strict=True)):
        d_out, d_in = W0.shape
        base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        r = values[f"{k}.polar_X"].shape[1]
        layer = Layer(base, network.ADAPTER, PolarConfig(target_modules="x", **options), r=r, alpha=scale * r)
        layer.checkpointing = case.get("checkpointing", False)
        with torch.no_grad():
            base.weight.copy_(torch.tensor(W0))
            for part in ("polar_X", "polar_Theta", "polar_Y"):
                getattr(layer, part)[network.ADAPTER].copy_(torch.tensor(values[f"{k}.{part}"]))
        layers.append(layer)
    return nn.Sequential(*layers)


def constrained_instead(case: dict[str, Any]) -> dict[str, Any]:
    """The same landing field by the hooks of `polar.constrain` alone."""
    options = {key: value for key, value in case.items() if key not in ("backward_field", *TEXTBOOK)}
    return {**options, "constrain": {"manifold_step": "landing", **{key: case[key] for key in TEXTBOOK}}}


def train(case: dict[str, Any]) -> dict[str, list[float]]:
    """Five Adam steps; returns the whole values."""
    values, weights, batches = network.make_problem()
    model = make_model(values, weights, case)
    handle = polar.constrain(model, **case.get("constrain", {"manifold_step": "none"}))
    parts, rank, ranks = case.get("accumulation", 1), dist.get_rank(), dist.get_world_size()
    if case["engine"].startswith("zero"):
        wrapped, optimizer = zero_engine(model, case), None
    else:
        wrapped = nn.parallel.DistributedDataParallel(model) if case["engine"] == "ddp" else fsdp2_model(model)
        optimizer = torch.optim.Adam(parameter_groups(model, "one"), lr=LR)
    for inputs, targets in batches:
        for part in range(parts):
            rows = slice(rank * parts + part, None, ranks * parts)
            h, t = (torch.tensor(a[rows], dtype=torch.float32) for a in (inputs, targets))
            loss = nn.functional.mse_loss(wrapped(h), t)
            if optimizer is None:
                wrapped.backward(loss)
                wrapped.step()
            else:
                (loss / parts).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    result = {name: whole(p, "value", None if optimizer is None else optimizer.state) for name, p in named(model)}
    assert handle.steps == len(batches)
    handle.remove()
    return result


def main() -> None:
    torch.set_num_threads(1)
    join_deepspeed()  # without compiling DeepSpeed's own all-reduce
    results = []
    for case in CASES:
        result = {"values": train(case)}
        if case["backward_field"] == "landing":
            result["by_constrain"] = train(constrained_instead(case))
        results.append(result)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
