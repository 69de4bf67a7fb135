"""What runs on what: engine x optimizer x precision x base, as one table that the README shows and start-up asks.

`tests/distributed/test_constrain.py` compares every optimizer and precision that is not refused with a float64
reference, on gloo ranks; `tests/distributed/test_quantized.py` compares quantised bases under each engine with one
process; `tests/unit/test_compatibility.py` checks that no combination is left out. `python -m benchmarks.readme` writes
the table into the README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from polar.errors import UserError

Status = Literal["exact", "close", "untested", "refused"]

# As `FactorSlice.engine` and a run name them. HSDP is FSDP2 on a mesh of two dimensions.
ENGINES = ("one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
# Variants of engines that keep optimizer states, or weights as well, on the CPU; or weights twice (ZeRO++).
VARIANTS = ("offload_optimizer", "offload_param", "hpZ")
OPTIMIZERS = ("AdamW", "SGD", "StiefelAdamW", "DeepSpeedCPUAdam", "AdamW8bit")
PRECISIONS = ("fp32", "bf16", "fp16")
BASES = ("full", "4-bit", "8-bit")


@dataclass(frozen=True)
class Verdict:
    """What to expect of a combination.

    Attributes:
        status: `exact`: every value and moment as in float64, within fp32 rounding (1e-5 after five steps of 0.05).
            `close`: the whole movement points in the same direction (cosine above 0.9 in bf16, 0.99 in fp16 and with
            8-bit moments), and factors are as orthonormal as elsewhere (3e-6). `untested`: nothing speaks against it,
            and nobody has looked. `refused`: an error when training starts.
        note: why it is not exact, or what to do instead.
    """

    status: Status
    note: str = ""


@dataclass(frozen=True)
class Rule:
    """A verdict on all combinations that match; None matches everything."""

    verdict: Verdict
    engines: tuple[str, ...] | None = None
    optimizers: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    bases: tuple[str, ...] | None = None

    def matches(self, engine: str, optimizer: str, precision: str, base: str) -> bool:
        """Whether this rule speaks about the combination."""
        pairs = (
            (engine, self.engines),
            (optimizer, self.optimizers),
            (precision, self.precisions),
            (base, self.bases),
        )
        return all(allowed is None or value in allowed for value, allowed in pairs)


# The first rule that matches decides.
RULES = (
    Rule(
        Verdict("refused", "bitsandbytes steps no DTensor: use AdamW or StiefelAdamW"),
        engines=("FSDP2",),
        optimizers=("AdamW8bit",),
    ),
    Rule(
        Verdict("refused", "int8 weights cannot be cut: use load_in_4bit, or replicate the base (DDP, ZeRO-1, ZeRO-2)"),
        engines=("ZeRO-3", "FSDP2"),
        bases=("8-bit",),
    ),
    Rule(
        Verdict("refused", "its kernel reads a DTensor's memory as if it were whole: use AdamW or StiefelAdamW"),
        engines=("FSDP2",),
        optimizers=("DeepSpeedCPUAdam",),
    ),
    Rule(Verdict("close", "8-bit moments, in blocks of 256"), optimizers=("AdamW8bit",)),
    Rule(Verdict("untested"), engines=("FSDP2",), bases=("4-bit",)),
    Rule(Verdict("close", "as on one process to 1e-4; the quantised base rounds gradients"), bases=("4-bit", "8-bit")),
    Rule(
        Verdict("close", "gradients are rounded to 16 bits; factors and moments are fp32"), precisions=("bf16", "fp16")
    ),
    Rule(Verdict("exact")),
)

# Where an engine keeps factors in a way that nothing here can step, whatever the optimizer. Raised by `polar.shards`.
NO_ENGINE = {
    "FSDP1 (FullyShardedDataParallel)": "it flattens factors with other parameters: use fully_shard (FSDP2)",
    "ZeRO with NVMe offload": "the fp32 values are on disk while the optimizer steps: offload to the CPU",
    "DeepSpeed's BF16_Optimizer": 'it keeps no flat partition to step in: leave "data_types" out of the config',
}


def verdict(engine: str, optimizer: str, precision: str = "fp32", base: str = "full") -> Verdict:
    """What to expect of a combination; names as in ENGINES, OPTIMIZERS, PRECISIONS, BASES. Others count as AdamW."""
    return next(rule.verdict for rule in RULES if rule.matches(engine, optimizer, precision, base))


def check_supported(engine: str, optimizer: str, precision: str = "fp32", base: str = "full") -> None:
    """Refuse a combination that does not work.

    Raises:
        UserError: names the combination and what to use instead.
    """
    found = verdict(engine, optimizer, precision, base)
    if found.status == "refused":
        what = f"{optimizer} under {engine}" if base == "full" else f"a base in {base} under {engine}"
        raise UserError(f"{what} does not work: {found.note}")


def check_factor_dtype(factor: str, dtype: torch.dtype) -> None:
    """Refuse a factor that an optimizer would step in 16 bits: their spacing near 1 is 4e-3 to 8e-3 in bf16.

    Raises:
        UserError: names the factor and the fix.
    """
    if dtype in (torch.bfloat16, torch.float16):
        raise UserError(
            f"{factor} is stepped in {str(dtype).removeprefix('torch.')}, where no matrix is orthonormal: cast the "
            "adapter back with polar.tuner.restore_factor_dtype(model) before the optimizer is made, or call "
            "polar.constrain after what casts it"
        )


def refused_engine(engine: str, factor: str) -> UserError:
    """The error for a factor that an engine of NO_ENGINE holds."""
    return UserError(f"{factor} is held by {engine}: {NO_ENGINE[engine]}")


def table() -> list[str]:
    """Lines of the table in Markdown: a row per engine, a column per choice that differs from AdamW in fp32."""
    columns = [
        ("AdamW, SGD, StiefelAdamW", ("AdamW", "fp32", "full")),
        ("DeepSpeedCPUAdam", ("DeepSpeedCPUAdam", "fp32", "full")),
        ("8-bit AdamW", ("AdamW8bit", "fp32", "full")),
        ("bf16, fp16", ("AdamW", "bf16", "full")),
        ("4-bit base", ("AdamW", "bf16", "4-bit")),
        ("8-bit base", ("AdamW", "bf16", "8-bit")),
    ]
    notes: list[str] = []

    def cell(engine: str, choice: tuple[str, str, str]) -> str:
        found = verdict(engine, *choice)
        if found.note and found.note not in notes:
            notes.append(found.note)
        return found.status + (f" [{notes.index(found.note) + 1}]" if found.note else "")

    rows = [f"| {engine} | {' | '.join(cell(engine, choice) for _, choice in columns)} |" for engine in ENGINES]
    return [
        f"| engine | {' | '.join(name for name, _ in columns)} |",
        "|---|" + "---|" * len(columns),
        *rows,
        *(f"| {engine} | {'refused | ' * len(columns)}" for engine in NO_ENGINE),
        "",
        *(f"[{number}] {note}.  " for number, note in enumerate(notes, 1)),
        *(f"{engine}: {note}.  " for engine, note in NO_ENGINE.items()),
    ]
