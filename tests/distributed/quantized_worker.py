"""Training PoLAR on a bitsandbytes base, as one process (`run_case`) or as a rank under torchrun: `OUT`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

import polar
from polar.launch import join_deepspeed
from polar.tuner import restore_factor_dtype

STEPS = 5
CASES = [
    (bits, engine) for bits in (4, 8) for engine in ("ddp", "zero1", "zero2", "zero3") if (bits, engine) != (8, "zero3")
]


class Net(nn.Module):
    """Two linear layers, 64 -> 96 -> 32; the first is quantised and adapted."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        import bitsandbytes as bnb

        torch.manual_seed(0)
        plain = nn.Linear(64, 96)
        if bits == 4:
            # Engines that shard flatten packed weights with others of their dtype, so they are stored as one of those.
            storage = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
            self.lin0 = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.bfloat16, **storage)
        else:
            self.lin0 = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
        self.lin0.load_state_dict(plain.state_dict(), strict=False)
        self.lin1 = nn.Linear(96, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.tanh(self.lin0(x)))


def build(bits: int) -> nn.Module:
    """Return the quantised network with a PoLAR adapter, cast to bf16 as TRL does and restored."""
    net = Net(bits).to("cpu")  # moving quantises
    config = polar.PolarConfig(r=4, alpha=8, target_modules=["lin0"])
    model = get_peft_model(net, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert restore_factor_dtype(model) == 2
    return model


def train(model: nn.Module, engine: str, rank: int, num_ranks: int) -> list[float]:
    """Train STEPS steps of AdamW on this rank's share of 24 rows; return the losses over all rows."""
    handle = polar.constrain(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    wrapped: Any = model
    if engine == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif engine != "one process":
        wrapped = zero_engine(model, optimizer, int(engine[-1]))
    torch.manual_seed(1)
    x, y = torch.randn(24, 64), torch.randn(24, 32)
    x, y = x[rank::num_ranks], y[rank::num_ranks]
    losses = []
    for _ in range(STEPS):
        loss = (wrapped(x) - y).square().mean()
        if engine.startswith("zero"):
            wrapped.backward(loss)
            wrapped.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach().clone()
        if num_ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / num_ranks)
    handle.check()
    assert handle.steps == STEPS
    assert handle.num_factors == 2
    handle.remove()
    return losses


def zero_engine(model: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    """DeepSpeed's engine, with parameters in the dtypes that they have."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All parameters whole on this rank, also under ZeRO-3."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def bits_of(layer: nn.Module) -> torch.Tensor:
    """A copy of the packed weight as bytes: read as bf16 some of it is NaN, which is equal to nothing."""
    return layer.weight.detach().clone().view(torch.uint8)


def run_case(bits: int, engine: str = "one process", rank: int = 0, num_ranks: int = 1) -> dict[str, Any]:
    """Train, and return what the tests look at."""
    model = build(bits)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "polar_" in name}
    base = bits_of(model.get_submodule("base_model.model.lin0.base_layer"))
    losses = train(model, engine, rank, num_ranks)
    layer = next(module for module in model.modules() if isinstance(module, polar.PolarLinear))
    identity = torch.eye(4, dtype=torch.float64)
    with whole(model):
        factors = {"X": layer.polar_X["default"].detach().double(), "Y": layer.polar_Y["default"].detach().double()}
        moved = [(p.detach() - start[n]).abs().max().item() for n, p in model.named_parameters() if n in start]
        return {
            "losses": losses,
            "errors": {n: torch.linalg.norm(F.T @ F - identity).item() for n, F in factors.items()},
            "dtypes": [str(p.dtype) for p in layer.parameters_of("default")],
            "moved": min(moved),
            "base_unchanged": torch.equal(base, bits_of(layer.get_base_layer())),
            "Theta": layer.polar_Theta["default"].detach().tolist(),
        }


def main(out: Path) -> None:
    """Run every case as one rank and write its reports."""
    # 8-bit products in bitsandbytes 0.50 are fp16; the fp32 input of this test is cast, and it says so.
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
    join_deepspeed()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for bits, engine in CASES:
        report = run_case(bits, engine, rank, num_ranks)
        (out / f"bits-{bits}-{engine}-rank-{rank}.json").write_text(json.dumps(report))
    dist.barrier()  # a rank that leaves while another still reduces can hang at exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
