"""How many bytes does the manifold step send per rank, sharded against gathered factors?

Factors of Gemma-3-27B under ZeRO-3's partitioning. On 2 to 4 gloo ranks the numbers are counted on the real collectives
of `polar.factor_batch` and `polar.gathered`; for any other world size they come from the formula below, which the
counted ones check, there and on odd shapes that all those world sizes cut. Sharded sends r x r sums in one all-reduce
per phase, F r^2 numbers for F factors, and the rows that a rank boundary cuts, in one of two ways (`polar.cut_rows`):

    table         C r numbers per phase and matrix in the same all-reduce, C = cut rows of all factors
    neighbours    pieces of rows, point to point: of each cut row that a rank holds a piece of, the piece to each
                  other rank that holds one; the number is that of the rank that sends most

The projection sends X and the gradient, the retraction X. `choose_way` picks the way; both are shown. Gathering
sends the gradient and the factor before the optimizer and the factor after it, 3 n r numbers per factor. All are
counted as what enters a collective or a message. On the wire an all-reduce moves twice as much per rank as an
all-gather, so a user who gathers with all-gathers instead sends half of the `gather` column.

Usage: python benchmarks/manifold_comm.py [--layers 62] [--r 16] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import polar.shards
from benchmarks.manifold_step import PROJECTIONS
from benchmarks.record import environment
from polar.cut_rows import CutRowsWay, choose_way, cut_rows_of
from polar.factor_batch import batches_of
from polar.gathered import GatheredBatch
from polar.shards import FactorSlice
from polar.steps import make_step

COUNTED_RANKS = (2, 3, 4)
FORMULA_RANKS = (8, 12, 16, 64, 96, 128, 256, 512, 1000, 1024)
BYTES = 4
# Numbers of rows whose shares 2, 3 and 4 ranks cut inside a row, unlike those of the model, to check the formula.
ODD_ROWS = (1001, 1003, 1211)


def shapes(layers: int, r: int) -> list[tuple[int, int]]:
    """Shapes (n, r) of all factors."""
    return [(n, r) for projection in PROJECTIONS * layers for n in projection]


def cuts(n: int, r: int, ranks: int) -> range:
    """Where ZeRO-3's equal shares cut a factor."""
    share = -(-n * r // ranks)
    return range(share, ranks * share, share)


def formula(factors: list[tuple[int, int]], ranks: int) -> dict[str, int]:
    """Bytes that enter the collectives and messages of one step, on the rank that sends most."""
    sums = 2 * sum(r * r for _, r in factors)
    table = sum(len(cut_rows_of(cuts(n, r, ranks), n, r)) * r for n, r in factors)
    pieces = [0] * ranks
    for (n, r), number in Counter(factors).items():
        pieces = [total + number * sent for total, sent in zip(pieces, numbers_to_neighbours(n, r, ranks), strict=True)]
    return {
        "table": BYTES * (sums + 3 * table),
        "neighbours": BYTES * (sums + 3 * max(pieces)),
        "gather": BYTES * 3 * sum(n * r for n, r in factors),
    }


def numbers_to_neighbours(n: int, r: int, ranks: int) -> list[int]:
    """For each rank, how many numbers of its pieces of cut rows go to other ranks."""
    share = -(-n * r // ranks)
    sent = []
    for rank in range(ranks):
        start, end = min(rank * share, n * r), min((rank + 1) * share, n * r)
        total = 0
        for row in {start // r, (end - 1) // r} if end > start else ():
            first, last = row * r, (row + 1) * r
            others = (last - 1) // share - first // share
            total += (min(end, last) - max(start, first)) * others
        sent.append(total)
    return sent


def make_slices(factors: list[tuple[int, int]], rank: int, ranks: int) -> list[FactorSlice]:
    """The slices of this rank with orthonormal values and random gradients, in one flat leaf as under ZeRO-3."""
    torch.manual_seed(rank)
    shares = [-(-n * r // ranks) for n, r in factors]
    leaf = torch.randn(sum(shares)) / 70
    leaf.grad = torch.randn(sum(shares))
    slices, offset = [], 0
    for k, ((n, r), share) in enumerate(zip(factors, shares, strict=True)):
        start, end = min(rank * share, n * r), min((rank + 1) * share, n * r)
        slices.append(FactorSlice(f"f{k}", n, r, start, end, leaf, offset, dist.group.WORLD, cuts(n, r, ranks)))
        offset += share
    return slices


def chosen_way(factors: list[tuple[int, int]], ranks: int) -> CutRowsWay:
    """What the rank program chooses; only shapes and cuts matter."""
    nothing = torch.empty(0)
    return choose_way([FactorSlice("", n, r, 0, 0, nothing, 0, None, cuts(n, r, ranks)) for n, r in factors])


def count(rank: int, ranks: int, port: int, models: list[list[tuple[int, int]]], out: str) -> None:
    """One rank: for each list of shapes and in each way, count what one step hands to torch.distributed."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    sent = [0]
    real_all_reduce, real_all_to_all = dist.all_reduce, dist.all_to_all_single

    def counting_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return real_all_reduce(tensor, *args, **kwargs)

    def counting_all_to_all(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return real_all_to_all(output, tensor, *args, **kwargs)

    polar.shards.dist.all_reduce = counting_all_reduce
    polar.shards.dist.all_to_all_single = counting_all_to_all  # type: ignore[assignment]
    found: list[dict[str, Any]] = []
    for factors in models:
        found.append({})
        for execution in (*get_args(CutRowsWay), "gather"):
            slices = make_slices(factors, rank, ranks)
            sent[0] = 0
            manifold_step(slices, execution)
            most = torch.tensor(sent[0])
            real_all_reduce(most, op=dist.ReduceOp.MAX)
            found[-1][execution] = most.item()
    dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text(json.dumps(found))


def manifold_step(slices: list[FactorSlice], execution: Any) -> None:
    """One field and one retraction, `gather` or sharded in a way for cut rows."""
    step = make_step("retract_polar", 0.0, "textbook")
    assert step.field is not None and step.retraction is not None
    with torch.no_grad():
        for batch in [GatheredBatch(slices)] if execution == "gather" else batches_of(slices, execution):
            batch.apply_field(step.field, 1.0)
            batch.retract(step.retraction)


def counted(models: list[list[tuple[int, int]]], ranks: int) -> list[dict[str, int]]:
    """Bytes counted on `ranks` gloo ranks, on the rank that sends most; exits when the formula says other ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counted.json"
        torch.multiprocessing.spawn(count, (ranks, port, models, str(out)), nprocs=ranks)
        found: list[dict[str, int]] = json.loads(out.read_text())
    for factors, numbers in zip(models, found, strict=True):
        expected = formula(factors, ranks)
        expected["gather"] += BYTES * len(factors)  # one flag per factor: whether it has a gradient
        if numbers != expected:
            sys.exit(f"{ranks} ranks: counted {numbers}, the formula says {expected}")
    return found


def main() -> None:
    """Count, check the formula against the counted numbers, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    factors = shapes(arguments.layers, arguments.r)
    odd = [(n, arguments.r) for n in ODD_ROWS]
    rows: list[dict[str, Any]] = []
    for ranks in (*COUNTED_RANKS, *FORMULA_RANKS):
        is_counted = ranks in COUNTED_RANKS
        found = counted([odd, factors], ranks)[-1] if is_counted else formula(factors, ranks)
        way = chosen_way(factors, ranks)
        row: dict[str, Any] = {"ranks": ranks, "source": "counted" if is_counted else "formula", **found, "way": way}
        rows.append({**row, "sharded": found[way], "ratio": found[way] / found["gather"]})
    for row in rows:
        print(
            f"{row['ranks']:5d} ranks ({row['source']})  table {row['table'] / 2**20:8.2f} MiB  "
            f"neighbours {row['neighbours'] / 2**20:8.2f} MiB  gather {row['gather'] / 2**20:8.1f} MiB  "
            f"{row['way']:10s} {100 * row['ratio']:6.2f} %"
        )
    result = {
        "question": "bytes that one manifold step hands to collectives and messages on each rank, sharded and gathered",
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
