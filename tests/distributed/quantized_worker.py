"""Training PoLAR on a bitsandbytes base, as one process (`run_case`) or as a rank under torchrun: `OUT`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

import polar
from polar.tuner import restore_factor_dtype

STEPS = 5


class Net(nn.Module):
    """Two linear layers, 64 -> 96 -> 32; the first is quantised and adapted."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        import bitsandbytes as bnb

        torch.manual_seed(0)
        plain = nn.Linear(64, 96)
        if bits == 4:
            self.lin0 = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
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


def train(model: nn.Module, rank: int, num_ranks: int) -> tuple[list[float], polar.PolarLinear]:
    """Train STEPS steps of AdamW on this rank's share of 24 rows; return the losses over all rows."""
    layer = next(m for m in model.modules() if isinstance(m, polar.PolarLinear))
    if num_ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    handle = polar.constrain(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    torch.manual_seed(1)
    x, y = torch.randn(24, 64), torch.randn(24, 32)
    x, y = x[rank::num_ranks], y[rank::num_ranks]
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if num_ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / num_ranks)
    handle.check()
    assert handle.steps == STEPS
    assert handle.num_factors == 2
    return losses, layer


def run_case(bits: int, rank: int = 0, num_ranks: int = 1) -> dict[str, Any]:
    """Train, and return what the tests look at."""
    model = build(bits)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "polar_" in name}
    base = model.get_submodule("base_model.model.lin0.base_layer").weight.detach().clone()
    losses, layer = train(model, rank, num_ranks)
    factors = {"X": layer.polar_X["default"].detach().double(), "Y": layer.polar_Y["default"].detach().double()}
    identity = torch.eye(4, dtype=torch.float64)
    return {
        "losses": losses,
        "errors": {n: torch.linalg.norm(F.T @ F - identity).item() for n, F in factors.items()},
        "dtypes": [str(p.dtype) for p in layer.parameters_of("default")],
        "moved": min((p.detach() - start[n]).abs().max().item() for n, p in model.named_parameters() if n in start),
        "base_unchanged": torch.equal(base, layer.get_base_layer().weight.detach()),
        "Theta": layer.polar_Theta["default"].detach().tolist(),
    }


def main(out: Path) -> None:
    """Run every case as one rank and write its reports."""
    # 8-bit products in bitsandbytes 0.50 are fp16; the fp32 input of this test is cast, and it says so.
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for bits in (4, 8):
        (out / f"bits-{bits}-rank-{rank}.json").write_text(json.dumps(run_case(bits, rank, num_ranks)))
    dist.barrier()  # a rank that leaves while another still reduces can hang at exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
