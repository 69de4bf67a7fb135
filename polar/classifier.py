"""A base with a head that classifies or scores texts: its configuration, its weights, which of its modules are new.

The head is what transformers puts beside the base (for DeBERTa a pooler and a classifier). No published base has it, so
it is drawn from the run's seed, trained whole and saved with the adapter (PEFT's modules_to_save). PEFT's own list has
classifier and score only; a pooler left out stays as it was drawn, and nobody who loads the adapter draws it again.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from polar.errors import UserError
from polar.glue import GlueTask

PEFT_HEAD = ("classifier", "score")  # what PEFT 0.21.2 adds to modules_to_save itself for task_type SEQ_CLS
MAX_NAMED = 3  # weights named in a message


def add_head_settings(base_config: PreTrainedConfig, task: GlueTask) -> None:
    """Write into the base's configuration what the head gives out and which loss goes with it."""
    base_config.num_labels = task.num_labels
    base_config.problem_type = task.problem_type  # type: ignore[assignment]  # its type is a list of literals
    if task.labels:
        base_config.id2label = dict(enumerate(task.labels))
        base_config.label2id = {name: value for value, name in enumerate(task.labels)}


def head_modules(model: Any) -> list[str]:
    """Names of the modules with parameters that the model has beside its base."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def modules_to_save(model: Any, chosen: list[str] | None) -> list[str] | None:
    """Return what to name in an adapter's `modules_to_save`, beside what PEFT adds: the head, and what was chosen."""
    return sorted({*(chosen or []), *head_modules(model)} - {*PEFT_HEAD}) or None


def load_classifier(name: str, base_config: PreTrainedConfig, **options: Any) -> Any:
    """Load a base with a head; what the files lack of the head is drawn from torch's generator.

    Args:
        name: folder or hub name.
        base_config: with `add_head_settings`.
        **options: of `from_pretrained`.

    Raises:
        UserError: weights of the base are missing, or the files hold a head of another shape.
    """
    with without_load_report():
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, config=base_config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    head = set(head_modules(model))
    missing = sorted(key for key in loading["missing_keys"] if key.partition(".")[0] not in head)
    if missing:
        raise UserError(
            f"model_name_or_path {name}: {len(missing)} weights of {type(model).__name__} are not in its files, such "
            f"as {', '.join(missing[:MAX_NAMED])}: give a base of this architecture"
        )
    for key, found, needed in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"model_name_or_path {name}: its {key} has the shape {tuple(found)}, the task needs {tuple(needed)}: give "
            "the base without a head of another task"
        )
    return model


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Leave out transformers' table of missing and surplus weights, where a head is known to be missing."""

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


def num_labels_of(adapter: Path) -> int | None:
    """Return the outputs of the head that is saved with an adapter; None where there is none."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
            if re.search(r"\.(classifier|score)(\.out_proj)?\.weight$", key):
                return int(file.get_slice(key).get_shape()[0])
    return None


def head_to_fp32(model: nn.Module) -> None:
    """Keep the trained copy of the head in fp32, as PEFT keeps its own factors.

    Parameters that ZeRO-3 has partitioned are left alone: their fp32 masters are DeepSpeed's.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for parameter in wrapper.modules_to_save.parameters():
                if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.float()
