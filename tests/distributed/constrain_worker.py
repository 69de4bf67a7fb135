"""One rank of tests/distributed/test_constrain.py: the small network under several engines, results to files.

Usage: torchrun --nproc_per_node N constrain_worker.py OUT
"""

from __future__ import annotations

import gc
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
import torch.utils.checkpoint

import polar
from polar.cut_rows import CutRowsWay
from polar.errors import UserError
from polar.factor_batch import FactorBatch
from polar.live_spectrum import LiveSpectrum
from polar.shards import FactorSlice

ENGINES: list[dict[str, Any]] = [
    {"engine": "ddp"},
    {"engine": "zero1"},
    {"engine": "zero2"},
    {"engine": "zero3"},
    {"engine": "zero1", "offload": "optimizer"},
    {"engine": "zero2", "offload": "optimizer"},
    {"engine": "zero3", "offload": "optimizer"},
    {"engine": "zero3", "offload": "params"},
    {"engine": "zero3", "hpz": True},
    {"engine": "fsdp2"},  # HSDP on four ranks
]
STEPS: list[dict[str, Any]] = [
    {"manifold_step": "retract_qr"},
    {"manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "textbook"},
    {"manifold_step": "landing", "landing_penalty": 0.3, "landing_convention": "upstream"},
    {"manifold_step": "euclidean_penalty", "landing_penalty": 0.3},
    {"manifold_step": "none"},
]
EXACT: list[dict[str, Any]] = [
    # every engine with every optimizer that keeps fp32 moments
    *(
        {**engine, "optimizer": optimizer}
        for engine in ENGINES
        for optimizer in ("adamw", "sgd", "stiefel_adamw", *(("cpu_adam",) if engine.get("offload") else ()))
    ),
    # optimizers that are one implementation of the same formula
    {"engine": "ddp", "optimizer": "adamw_fused"},
    {"engine": "ddp", "optimizer": "adamw_foreach"},
    {"engine": "ddp", "optimizer": "cpu_adam"},
    {"engine": "ddp", "optimizer": "zero_redundancy"},
    {"engine": "zero3", "optimizer": "adamw_fused"},
    {"engine": "fsdp2", "optimizer": "adamw_fused"},
    {"engine": "fsdp2", "optimizer": "adamw_foreach"},
    # manifold steps
    *({"engine": engine, **step} for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2") for step in STEPS),
    *(
        {"engine": engine, **step, "manifold_execution": "gather"}
        for engine in ("zero2", "zero3", "fsdp2")
        for step in ({"manifold_step": "retract_qr"}, {"manifold_step": "landing", "landing_penalty": 0.3})
    ),
    # ways in which a loop or an engine cuts a step
    {"engine": "zero3", "sub_group_size": 60},
    {"engine": "zero3", "sub_group_size": 60, "groups": "split", "optimizer": "stiefel_adamw"},
    {"engine": "zero3", "max_grad_norm": 0.05},
    {"engine": "zero3", "accumulation": 2},
    {"engine": "zero3", "groups": "split"},
    {"engine": "zero3", "groups": "split", "manifold_execution": "gather"},
    {"engine": "zero1", "groups": "split"},
    {"engine": "zero2", "groups": "split", "max_grad_norm": 0.05},
    {"engine": "zero2", "accumulation": 2},
    {"engine": "zero2", "frozen_garbage": True},
    {"engine": "ddp", "accumulation": 2, "max_grad_norm": 0.05},
    {"engine": "fsdp2", "accumulation": 2, "max_grad_norm": 0.05},
    {"engine": "fsdp2", "groups": "split"},
    {"engine": "zero3", "second_adapter": True},
    {"engine": "zero2", "second_adapter": True},
    {"engine": "ddp", "second_adapter": True},
    {"engine": "fsdp2", "second_adapter": True},
    {"engine": "ddp", "checkpointing": True},
    {"engine": "zero3", "checkpointing": True},
    {"engine": "fsdp2", "checkpointing": True},
    {"engine": "ddp", "compile": True},
    {"engine": "fsdp2", "compile": True},
    {"engine": "ddp", "loss_scale": True},
    {"engine": "ddp", "loss_scale": True, "optimizer": "adamw_fused"},
    {"engine": "ddp", "loss_scale": True, "optimizer": "stiefel_adamw"},
]
# Gradients rounded to 16 bits, or 8-bit moments: see CLOSE_COSINES in test_constrain.py.
CLOSE: list[dict[str, Any]] = [
    *({**engine, "dtype": "bf16"} for engine in ENGINES if engine["engine"] != "zero1" or not engine.get("offload")),
    *({**engine, "dtype": "bf16", "optimizer": "cpu_adam"} for engine in ENGINES if engine.get("offload")),
    *({"engine": engine, "dtype": "fp16", "loss_scale": True} for engine in ("ddp", "zero1", "zero2", "zero3")),
    {"engine": "zero3", "dtype": "bf16", "optimizer": "stiefel_adamw"},
    {"engine": "fsdp2", "dtype": "bf16", "optimizer": "stiefel_adamw"},
    *({"engine": engine, "optimizer": "adamw_8bit"} for engine in ("ddp", "zero1", "zero2", "zero3")),
    {"engine": "zero3", "offload": "optimizer", "optimizer": "adamw_8bit"},
]
CASES = EXACT + CLOSE
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 0.05
# Combinations that polar.compatibility refuses: the message that the first step gives.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"engine": "fsdp2", "optimizer": "adamw_8bit"}, "AdamW8bit under FSDP2 does not work"),
    ({"engine": "fsdp2", "optimizer": "cpu_adam"}, "DeepSpeedCPUAdam under FSDP2 does not work"),
    ({"engine": "fsdp1"}, "is held by FSDP1"),
]


def cases_of(ranks: int) -> list[dict[str, Any]]:
    """All cases on 2 and 3 ranks (3 cut rows); on 1 and 4 ranks every engine once, and what shards in two ways."""
    if ranks in (2, 3):
        return CASES
    return [case for case in CASES if set(case) <= {"engine", "optimizer", "sub_group_size", "groups"}]


def parameter_groups(model: nn.Module, how: str) -> list[dict[str, Any]]:
    """All parameters in one group, or dealt to three groups that mix X, Y and Theta of several layers."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if how == "one":
        return [{"params": trainable}]
    return [{"params": trainable[k::3]} for k in range(3)]


def make_optimizer(model: nn.Module, case: dict[str, Any]) -> torch.optim.Optimizer:
    groups, name = parameter_groups(model, case.get("groups", "one")), case.get("optimizer", "adamw")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=LR, momentum=0.9)
    if name == "stiefel_adamw":
        return polar.StiefelAdamW(groups, lr=LR)
    if name == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=LR, weight_decay=0.0)
    if name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, lr=LR, weight_decay=0.0, min_8bit_size=1)
    if name == "zero_redundancy":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups[0]["params"], torch.optim.AdamW, lr=LR, weight_decay=0.0)
    kinds = {"adamw": {}, "adamw_fused": {"fused": True}, "adamw_foreach": {"foreach": True}}
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.0, **kinds[name])


def zero_engine(model: nn.Module, case: dict[str, Any]) -> Any:
    import deepspeed

    # DeepSpeed 0.19.8 says no where fp16 has no fast instructions; torch's CPU kernels compute it all the same.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    offload = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "zero_optimization": {
            "stage": int(case["engine"][-1]),
            "stage3_param_persistence_threshold": 0,
            "sub_group_size": case.get("sub_group_size", 10**9),
            **({"offload_optimizer": offload} if case.get("offload") else {}),
            **({"offload_param": offload} if case.get("offload") == "params" else {}),
            **({"zero_hpz_partition_size": dist.get_world_size()} if case.get("hpz") else {}),
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": case.get("max_grad_norm", 0.0),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.get("dtype") == "bf16" or case.get("bf16", False)},
        "fp16": {"enabled": case.get("dtype") == "fp16", "initial_scale_power": 10, "hysteresis": 1},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=make_optimizer(model, case), config=config)[0]


def fsdp2_model(model: nn.Module, case: dict[str, Any] | None = None) -> nn.Module:
    """Shard over all ranks, or over pairs of ranks with replicas (HSDP) on four: rows uneven, some ranks empty."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ranks = dist.get_world_size()
    shape, names = ((ranks // 2, 2), ("replicate", "shard")) if ranks == 4 else ((ranks,), ("shard",))
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    bf16 = (case or {}).get("dtype") == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


class Checkpointed(nn.Module):
    """Recomputes each layer in the backward pass."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False)
        return h


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    model = network.make_network(*network.make_problem()[:2])
    if case.get("second_adapter"):
        network.add_frozen_adapter(model)
    options = {key: value for key, value in case.items() if key.startswith(("manifold", "landing"))}
    handle = polar.constrain(model, **options)
    module: nn.Module = Checkpointed(model) if case.get("checkpointing") else model
    if case["engine"].startswith("zero"):
        wrapped, optimizer = zero_engine(module, case), None
    else:
        if case["engine"] == "fsdp1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            wrapped = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
        elif case["engine"] == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(module)
        else:
            fsdp2_model(model, case)
            wrapped = module
        optimizer = make_optimizer(model, case)
    if case.get("frozen_garbage"):
        gc.freeze()
    losses = train(torch.compile(wrapped, backend="eager") if case.get("compile") else wrapped, optimizer, case, handle)
    states = None if optimizer is None else optimizer.state
    result = {
        "values": {name: whole(p, "value", states) for name, p in named(model)},
        **{
            moment: {name: whole(p, moment, states) for name, p in named(model)} if has_moments(case) else {}
            for moment in moments_of(case)
        },
        "num_factors": handle.num_factors,
        "steps": handle.steps,
        "losses": losses,
        "live": LiveSpectrum(model, handle).measure(),
    }
    handle.remove()
    return result


def refusal(case: dict[str, Any]) -> str:
    """The message of the error that a case ends with, empty if it does not."""
    try:
        run_case(case)
    except UserError as error:
        return str(error)
    return ""


def train(wrapped: Any, optimizer: torch.optim.Optimizer | None, case: dict[str, Any], handle: Any) -> list[float]:
    """Five steps; with `loss_scale` a sixth between them overflows and is left out. Returns the losses."""
    rank, ranks, parts = dist.get_rank(), dist.get_world_size(), case.get("accumulation", 1)
    dtype, losses = DTYPES[case.get("dtype", "fp32")], []
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32 and case["engine"] == "ddp")
    with_overflow = bool(case.get("loss_scale"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=with_overflow and optimizer is not None)
    batches = network.make_problem()[2]
    for number, (inputs, targets) in enumerate([*batches[:2], *batches[1:]] if with_overflow else batches):
        overflows = with_overflow and number == 1
        for part in range(parts):
            rows = slice(rank * parts + part, None, ranks * parts)
            h, t = (torch.tensor(a[rows], dtype=torch.float32) for a in (inputs, targets))
            if optimizer is None:
                h = h.to(dtype)
            with autocast:
                out = wrapped(h)
            loss = nn.functional.mse_loss(out if optimizer is None else out.float(), t) * (
                torch.inf if overflows else 1
            )
            if optimizer is not None:
                scaler.scale(loss / parts).backward()
            else:
                wrapped.backward(loss)
                wrapped.step()
        if optimizer is not None:
            if case.get("max_grad_norm"):
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(wrapped.parameters(), case["max_grad_norm"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        # A fused optimizer is called, and told to leave the step out; another is not called at all.
        handle.check(step_was_skipped=overflows)
        losses.append(loss.item())
    return losses


def moments_of(case: dict[str, Any]) -> tuple[str, ...]:
    """Names of the moments that are compared."""
    if case.get("optimizer") in ("adamw_8bit", "zero_redundancy"):
        return ()
    return ("momentum_buffer",) if case.get("optimizer") == "sgd" else ("exp_avg", "exp_avg_sq")


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
    gc.freeze()  # each engine collects garbage; what is imported by now need not be looked at again
    cuts = all_arbitrary_cuts()
    for number, case in enumerate(CASES):
        if case not in cases_of(dist.get_world_size()):
            continue
        result = {"case": case, **run_case(case)}
        if dist.get_rank() == 0:
            (out / f"case-{number}.json").write_text(json.dumps(result))
    if dist.get_world_size() == 2:
        (out / f"refused-{dist.get_rank()}.json").write_text(json.dumps([refusal(case) for case, _ in REFUSED]))
    (out / f"cuts-{dist.get_rank()}.json").write_text(json.dumps(cuts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
