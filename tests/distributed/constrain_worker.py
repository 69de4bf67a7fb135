"""One rank of tests/distributed/test_constrain.py: the small network under several engines, results to files.

Usage: torchrun --nproc_per_node N constrain_worker.py OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import network

import polar
from polar.cut_rows import CutRowsWay
from polar.factor_batch import FactorBatch
from polar.shards import FactorSlice

CASES: list[dict[str, Any]] = [
    {"engine": "ddp", "manifold_step": "retract_polar"},
    {"engine": "ddp", "manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "upstream"},
    {"engine": "zero3", "manifold_step": "retract_polar"},
    {"engine": "zero3", "manifold_step": "retract_polar", "sub_group_size": 60},
    {"engine": "zero3", "manifold_step": "retract_polar", "max_grad_norm": 0.05},
    {"engine": "zero3", "manifold_step": "retract_polar", "accumulation": 2},
    {"engine": "zero3", "manifold_step": "retract_polar", "groups": "split"},
    {"engine": "zero3", "manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "textbook"},
    {"engine": "zero3", "manifold_step": "none"},
    {"engine": "zero3", "manifold_step": "retract_polar", "bf16": True},
    {"engine": "zero1", "manifold_step": "retract_polar"},
    {"engine": "zero1", "manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "upstream"},
    {"engine": "zero2", "manifold_step": "retract_polar"},
    {"engine": "zero2", "manifold_step": "retract_polar", "groups": "split", "max_grad_norm": 0.05},
    {"engine": "zero2", "manifold_step": "retract_polar", "accumulation": 2},
    {"engine": "zero2", "manifold_step": "retract_polar", "bf16": True},
    {"engine": "zero2", "manifold_step": "retract_qr", "offload": True},
    {"engine": "zero3", "manifold_step": "retract_polar", "offload": True},
    {"engine": "zero3", "manifold_step": "retract_qr"},
    {"engine": "zero3", "manifold_step": "euclidean_penalty", "landing_penalty": 0.3},
    {"engine": "zero3", "manifold_step": "retract_polar", "manifold_execution": "gather"},
    {"engine": "zero3", "manifold_step": "landing", "landing_penalty": 0.3, "manifold_execution": "gather"},
    {"engine": "ddp", "manifold_step": "retract_qr"},
    {"engine": "fsdp2", "manifold_step": "retract_polar"},
    {"engine": "fsdp2", "manifold_step": "retract_qr", "manifold_execution": "gather"},
    {"engine": "fsdp2", "manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "textbook"},
]
LR = 0.05


def parameter_groups(model: nn.Module, how: str) -> list[dict[str, Any]]:
    """All parameters in one group, or dealt to three groups that mix X, Y and Theta of several layers."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if how == "one":
        return [{"params": trainable}]
    return [{"params": trainable[k::3]} for k in range(3)]


def zero_engine(model: nn.Module, case: dict[str, Any]) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "zero_optimization": {
            "stage": int(case["engine"][-1]),
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": case.get("sub_group_size", 10**9),
            **({"offload_optimizer": {"device": "cpu"}} if case.get("offload") else {}),
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": case.get("max_grad_norm", 0.0),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.get("bf16", False)},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.Adam(parameter_groups(model, case.get("groups", "one")), lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def fsdp2_model(model: nn.Module) -> nn.Module:
    """Shard over all ranks, or over pairs of ranks with replicas (HSDP) on four: rows uneven, some ranks empty."""
    from torch.distributed.fsdp import fully_shard

    ranks = dist.get_world_size()
    shape, names = ((ranks // 2, 2), ("replicate", "shard")) if ranks == 4 else ((ranks,), ("shard",))
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    values, weights, batches = network.make_problem()
    model = network.make_network(values, weights)
    options = {key: value for key, value in case.items() if key.startswith(("manifold", "landing"))}
    handle = polar.constrain(model, **options)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    losses = []
    if case["engine"].startswith("zero"):
        wrapped, optimizer = zero_engine(model, case), None
    else:
        wrapped = nn.parallel.DistributedDataParallel(model) if case["engine"] == "ddp" else fsdp2_model(model)
        optimizer = torch.optim.Adam(parameter_groups(model, "one"), lr=LR)
    for inputs, targets in batches:
        parts = case.get("accumulation", 1)
        for part in range(parts):
            rows = slice(rank * parts + part, None, ranks * parts)
            h, t = (torch.tensor(a[rows], dtype=torch.float32) for a in (inputs, targets))
            if case.get("bf16"):
                h, t = h.bfloat16(), t.bfloat16()
            loss = nn.functional.mse_loss(wrapped(h), t)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            else:
                wrapped.backward(loss)
                wrapped.step()
        handle.check()
        losses.append(loss.item())
    states = None if optimizer is None else optimizer.state
    result = {
        "values": {name: whole(p, "value", states) for name, p in named(model)},
        **{
            moment: {name: whole(p, moment, states) for name, p in named(model)} if has_moments(case) else {}
            for moment in ("exp_avg", "exp_avg_sq")
        },
        "num_factors": handle.num_factors,
        "steps": handle.steps,
        "orthonormality_error": handle.orthonormality_error(),
    }
    handle.remove()
    return result


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name.removesuffix("." + network.ADAPTER), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def has_moments(case: dict[str, Any]) -> bool:
    """Whether the engine's own getter can read the moments: deepspeed 0.19.8 links those of the first group only."""
    return not (case["engine"] in ("zero1", "zero2") and case.get("groups") == "split")


def whole(parameter: nn.Parameter, what: str, states: dict[Any, Any] | None) -> list[Any]:
    """Whole fp32 value or moment, by the engine's own means and not by ours."""
    if states is not None:
        tensor = parameter.detach() if what == "value" else states[parameter][what]
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    else:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensor = safe_get_full_fp32_param(parameter)
        if what != "value":
            tensor = safe_get_full_optimizer_state(parameter, what)
    return tensor.double().reshape(-1).tolist()


def arbitrary_cuts(seed: int, way: CutRowsWay, group: dist.ProcessGroup) -> dict[str, float]:
    """FactorBatch on slices cut anywhere: empty ones, several cuts in one row, against the whole computation."""
    rng = np.random.default_rng(seed)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    wholes, slices = [], []
    for k, (n, r) in enumerate([(4, 4), (7, 3), (2, 2), (40, 5), (3, 1), (6, 5), (9, 5)]):
        X, G = torch.tensor(rng.standard_normal((2, n, r)), dtype=torch.float32)
        cuts = sorted(rng.integers(0, n * r + 1, ranks - 1).tolist())
        if k % 3 == 0:
            cuts = sorted(min(n * r, 1 + j) for j in range(ranks - 1))  # inside the first row, where r allows it
        elif k == 1:
            cuts = [10] * (ranks - 1)  # a row on the first and the last rank, those between hold nothing
        start, end = [0, *cuts][rank], [*cuts, n * r][rank]
        leaf = torch.cat([torch.full((k,), 9.0), X.reshape(-1)[start:end], torch.full((2,), 9.0)])  # with padding
        leaf.grad = torch.cat([torch.full((k,), 9.0), G.reshape(-1)[start:end], torch.full((2,), 9.0)])
        wholes.append((X, G))
        slices.append(FactorSlice(f"f{k}", n, r, start, end, leaf, k, group, cuts))
    batch = FactorBatch(slices, way)
    worst = {"sums": 0.0, "field": 0.0, "retraction": 0.0, "padding": 0.0}
    order = [item for part in batch.parts for item in part.slices]
    cores = [torch.tensor(rng.standard_normal((3, len(p.slices), p.r, p.r)), dtype=torch.float32) for p in batch.parts]
    for part, sums, (A, B, _) in zip(batch.parts, batch.sums(gram=True, grad=True), cores, strict=True):
        for k, item in enumerate(part.slices):
            X, G = wholes[int(item.name[1:])]
            difference = max((sums.XtX[k] - X.T @ X).abs().max(), (sums.XtG[k] - X.T @ G).abs().max())
            relative = (sums.GtG[k] / G.square().sum() - 1).abs()
            worst["sums"] = max(worst["sums"], difference.item(), relative.item())
        part.apply_field(sums, A, B)
    for part, sums, (_, _, M) in zip(batch.parts, batch.sums(gram=True, grad=False), cores, strict=True):
        part.apply_retraction(sums, M)
    position = 0
    for part, (A, B, M) in zip(batch.parts, cores, strict=True):
        for k in range(len(part.slices)):
            item = order[position]
            X, G = wholes[int(item.name[1:])]
            expected = {"field": G @ A[k] + X @ B[k], "retraction": X @ M[k]}
            for what, tensor in (("field", item.grad()), ("retraction", item.values())):
                local = expected[what].reshape(-1)[item.start : item.end]
                if item.numel:
                    worst[what] = max(worst[what], (tensor - local).abs().max().item())
            for tensor in (item.leaf, item.leaf.grad):
                outside: Tensor = torch.cat([tensor[: item.offset], tensor[item.offset + item.numel :]])
                worst["padding"] = max(worst["padding"], (outside - 9.0).abs().max().item())
            position += 1
    return worst


def all_arbitrary_cuts() -> list[dict[str, float]]:
    """Both ways for cut rows, in the group of all ranks and, on four, in pairs whose ranks are not the global ones."""
    groups = [dist.group.WORLD]
    if dist.get_world_size() == 4:
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        groups.append(pairs[dist.get_rank() % 2])
    ways = get_args(CutRowsWay)
    return [arbitrary_cuts(seed, way, group) for group in groups for way in ways for seed in range(5)]


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        from polar.launch import join_deepspeed

        join_deepspeed()  # without compiling DeepSpeed's own all-reduce
    cuts = all_arbitrary_cuts()
    for number, case in enumerate(CASES):
        result = {"case": case, **run_case(case)}
        if dist.get_rank() == 0:
            (out / f"case-{number}.json").write_text(json.dumps(result))
    (out / f"cuts-{dist.get_rank()}.json").write_text(json.dumps(cuts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
