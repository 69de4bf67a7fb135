"""How a run trains: TRL's settings with this project's defaults, and a batch that is exact or an error."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.trainer_utils import SaveStrategy, SchedulerType
from trl import SFTConfig

from polar.errors import UserError
from polar.run_checks import check_deepspeed


@dataclass
class PolarTrainingConfig(SFTConfig):
    """TRL's SFTConfig with this project's defaults, and a global batch that is never quietly smaller."""

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows per optimizer step over all processes = per_device_train_batch_size x processes x "
            "accumulation; accumulation is derived. null: per_device_train_batch_size x processes x accumulation."
        },
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Micro batches per step. null: derived from global_batch_size, else 1."}
    )
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate of the adapter."})
    theta_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of Theta alone. null: learning_rate."}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "For Theta and other Euclidean parameters; never applied to X and Y."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Name of a transformers scheduler: cosine, linear, constant, ..."}
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: below 1 a share of all steps, from 1 on a number of steps."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Cutoff in tokens, prompt and response together. null: none. See on_too_long."}
    )
    completion_only_loss: bool | None = field(
        default=True, metadata={"help": "Loss on the response only. false: on the prompt as well."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, slower. null: off."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing; either works. null: off."}
    )
    save_strategy: SaveStrategy | str = field(default="steps", metadata={"help": "no, steps, epoch or best."})
    save_steps: float = field(
        default=500, metadata={"help": "Steps between checkpoints; below 1 a share of all steps."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "DDP's search for parameters without gradient; every adapter has one here."}
    )
    engine: Literal["auto", "fsdp2"] = field(
        default="auto",
        metadata={
            "help": "auto: one process, DDP where a launcher started several, or DeepSpeed with deepspeed: FILE. "
            "fsdp2: base and adapter cut by rows over the ranks, layer by layer (torch's fully_shard)."
        },
    )
    fsdp_shard_size: int | None = field(
        default=None,
        metadata={
            "help": "With engine fsdp2: cut within groups of so many ranks (the GPUs of a node); each group holds it "
            "all (HSDP). null: over all ranks."
        },
    )
    resume: bool = field(
        default=False,
        compare=False,
        metadata={"help": "Continue the run in output_dir from its last checkpoint; starts afresh if there is none."},
    )
    overwrite: bool = field(default=False, compare=False, metadata={"help": "Replace the run that output_dir holds."})
    dry_run: bool = field(
        default=False, compare=False, metadata={"help": "Validate everything and print what would run, then stop."}
    )

    def __post_init__(self) -> None:
        """Derive accumulation, then let SFTConfig choose the device, the process group and the engine.

        Raises:
            UserError: the batch does not divide, or deepspeed is asked for and not installed.
        """
        self._raw = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}
        if self.gradient_checkpointing is not None:  # before TrainingArguments warns that its own field is old
            if self.activation_checkpointing not in (None, self.gradient_checkpointing):
                raise UserError("gradient_checkpointing and activation_checkpointing differ: they are one switch")
            self.activation_checkpointing = self.gradient_checkpointing
        world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun, deepspeed and accelerate
        self.global_batch_size, self.gradient_accumulation_steps = resolve_batch(
            self.global_batch_size, self.per_device_train_batch_size, self.gradient_accumulation_steps, world_size
        )
        check_deepspeed(self.deepspeed)
        if not torch.accelerator.is_available():
            # Not a setting of the run, so not in `raw_values`: the same file trains on a GPU where there is one.
            self.use_cpu = True
        if self.use_cpu:
            self.dataloader_pin_memory = False  # torch warns that there is nothing to pin for
        super().__post_init__()

    def raw_values(self) -> dict[str, Any]:
        """Return each field as it was given, before TrainingArguments turned some into objects."""
        return copy.deepcopy(self._raw)


def resolve_batch(
    global_batch_size: int | None, micro_batch_size: int, accumulation: int | None, world_size: int
) -> tuple[int, int]:
    """Return (global batch, accumulation) with global = micro batch x processes x accumulation.

    Args:
        global_batch_size: rows per optimizer step over all processes, or None: whatever the rest gives.
        micro_batch_size: rows per process and forward pass.
        accumulation: forward passes per step, or None: derived.
        world_size: number of processes.

    Raises:
        UserError: a number below 1, or a global batch that does not divide; says the nearest ones that do.
    """
    for name, value in (
        ("global_batch_size", global_batch_size),
        ("per_device_train_batch_size", micro_batch_size),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    unit = micro_batch_size * world_size * (accumulation or 1)
    if global_batch_size is None:
        return unit, accumulation or 1
    product = f"per_device_train_batch_size {micro_batch_size} x {world_size} processes"
    if accumulation is not None:
        if unit != global_batch_size:
            raise UserError(
                f"global_batch_size {global_batch_size} is not {product} x gradient_accumulation_steps {accumulation} "
                f"= {unit}: leave gradient_accumulation_steps out, it is derived"
            )
        return global_batch_size, accumulation
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = " or ".join(str(n) for n in (below, below + unit) if n)
        raise UserError(f"global_batch_size {global_batch_size} does not divide by {product} = {unit}: use {nearest}")
    return global_batch_size, global_batch_size // unit
