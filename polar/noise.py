"""Warnings of the libraries that say nothing about a run, each silenced with its reason, here and nowhere else."""

from __future__ import annotations

import logging
import warnings


def silence_known_noise() -> None:
    """Silence them. Call it once, at the start of a command; a library must not touch its user's warnings."""
    import datasets
    import transformers

    # transformers puts the accumulation into the DeepSpeed config and not into accelerate's plugin, which then takes
    # DeepSpeed's value, as it should (accelerate 1.15).
    logging.getLogger("accelerate.accelerator").addFilter(
        lambda record: "Gradient accumulation steps mismatch" not in str(record.msg)
    )

    # One bar per file of the model and per data map, on every rank; the command says what it does itself.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT 0.21.2 and TRL 1.16 read a property that transformers 5.23 renamed; nothing that we could write instead.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # torch 2.13 renamed two collectives that deepspeed 0.19.8 calls.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f"`torch.distributed.{name}` is deprecated", category=FutureWarning)
