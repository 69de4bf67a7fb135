"""How many bytes does the manifold step send per rank, sharded against gathered factors?

Factors of Gemma-3-27B under ZeRO-3's partitioning. On 2 to 4 gloo ranks the numbers are counted on the real collectives
of `polar.factor_batch` and `polar.gathered`; for any other world size they come from the formula below, which the
counted ones check. Sharded sends r x r sums, and the rows that a rank boundary cuts, in one all-reduce per phase:

    projection  F r^2 + 2 C r numbers        retraction  F r^2 + C r numbers        C = cut rows of all F factors

and gathering sends the gradient and the factor before the optimizer and the factor after it, 3 n r numbers per factor.
Both are counted as what enters a collective. On the wire an all-reduce moves twice as much per rank as an all-gather,
so a user who gathers with all-gathers instead sends half of the `gather` column.

Usage: python benchmarks/manifold_comm.py [--layers 62] [--r 16] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import polar.shards
from benchmarks.manifold_step import PROJECTIONS
from benchmarks.record import environment
from polar.cut_rows import cut_rows_of
from polar.factor_batch import batches_of
from polar.gathered import GatheredBatch
from polar.shards import FactorSlice
from polar.steps import make_step

COUNTED_RANKS = (2, 3, 4)
FORMULA_RANKS = (8, 12, 16, 64, 96, 128, 256, 512, 1000, 1024)
BYTES = 4


def shapes(layers: int, r: int) -> list[tuple[int, int]]:
    """Shapes (n, r) of all factors."""
    return [(n, r) for projection in PROJECTIONS * layers for n in projection]


def cuts(n: int, r: int, ranks: int) -> range:
    """Where ZeRO-3's equal shares cut a factor."""
    share = -(-n * r // ranks)
    return range(share, ranks * share, share)


def formula(factors: list[tuple[int, int]], ranks: int) -> dict[str, int]:
    """Bytes that enter the collectives of one step, on each rank."""
    sums = sum(r * r for _, r in factors)
    cut = sum(len(cut_rows_of(cuts(n, r, ranks), n, r)) * r for n, r in factors)
    return {"sharded": BYTES * (2 * sums + 3 * cut), "gather": BYTES * 3 * sum(n * r for n, r in factors)}


def make_slices(factors: list[tuple[int, int]], rank: int, ranks: int) -> list[FactorSlice]:
    """The slices of this rank with orthonormal values and random gradients, in one flat leaf as under ZeRO-3."""
    torch.manual_seed(rank)
    shares = [-(-n * r // ranks) for n, r in factors]
    leaf = torch.randn(sum(shares)) / 70
    leaf.grad = torch.randn(sum(shares))
    slices, offset = [], 0
    for k, ((n, r), share) in enumerate(zip(factors, shares, strict=True)):
        start, end = min(rank * share, n * r), min((rank + 1) * share, n * r)
        group = dist.group.WORLD
        slices.append(FactorSlice(f"f{k}", n, r, start, end, leaf, offset, group, cuts(n, r, ranks)))
        offset += share
    return slices


def count(rank: int, ranks: int, port: int, factors: list[tuple[int, int]], out: str) -> None:
    """One rank: run the field and the retraction both ways and count what enters torch.distributed.all_reduce."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    real, sent = dist.all_reduce, [0]

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return real(tensor, *args, **kwargs)

    polar.shards.dist.all_reduce = counting
    step = make_step("retract_polar", 0.0, "textbook")
    assert step.field is not None and step.retraction is not None
    found = {}
    with torch.no_grad():
        for execution in ("sharded", "gather"):
            slices = make_slices(factors, rank, ranks)
            sent[0] = 0
            for batch in batches_of(slices) if execution == "sharded" else [GatheredBatch(slices)]:
                batch.apply_field(step.field, 1.0)
                batch.retract(step.retraction)
            found[execution] = sent[0]
    dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(found))


def counted(factors: list[tuple[int, int]], ranks: int, scratch: Path) -> dict[str, int]:
    """Bytes counted on `ranks` gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(count, (ranks, port, factors, str(scratch)), nprocs=ranks)
    result: dict[str, int] = json.loads(scratch.read_text())
    scratch.unlink()
    return result


def main() -> None:
    """Count, check the formula against the counted numbers, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    factors = shapes(arguments.layers, arguments.r)
    rows: list[dict[str, Any]] = []
    for ranks in COUNTED_RANKS:
        found = counted(factors, ranks, Path(f".manifold_comm-{os.getpid()}.json"))
        by_formula = formula(factors, ranks)
        # gather also sends one flag per factor: whether it has a gradient
        expected = {"sharded": by_formula["sharded"], "gather": by_formula["gather"] + BYTES * len(factors)}
        if found != expected:
            sys.exit(f"{ranks} ranks: counted {found}, the formula says {expected}")
        rows.append({"ranks": ranks, "source": "counted", **found, "ratio": found["sharded"] / found["gather"]})
    for ranks in FORMULA_RANKS:
        found = formula(factors, ranks)
        rows.append({"ranks": ranks, "source": "formula", **found, "ratio": found["sharded"] / found["gather"]})
    for row in rows:
        print(
            f"{row['ranks']:5d} ranks ({row['source']})  sharded {row['sharded'] / 2**20:8.2f} MiB  "
            f"gather {row['gather'] / 2**20:8.1f} MiB  {100 * row['ratio']:6.2f} %"
        )
    result = {
        "question": "bytes that enter the collectives of one manifold step on each rank, sharded against gathered",
        **environment(),
        "layers": arguments.layers,
        "num_factors": len(factors),
        "r": arguments.r,
        "bytes": rows,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
