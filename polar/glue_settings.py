"""Settings of a GLUE run: what follows from its task, and what can be checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar.errors import UserError
from polar.glue import HUB, GlueTask
from polar.glue_rows import find_file, validation_split
from polar.rows import check_source, is_file_name

if TYPE_CHECKING:
    from polar.run_config import DataArguments
    from polar.training_config import PolarTrainingConfig

# Settings of prompts, responses and their data sets, each with the one value that does nothing.
_WITHOUT_EFFECT: dict[str, Any] = {
    "template": None,
    "prompt_column": None,
    "input_column": None,
    "response_column": None,
    "dataset_format": "auto",
    "calculator_marks": "keep",
    "train_split": "train",
    "val_dataset_split": "test",
    "val_split": 0.0,
}


def set_glue_defaults(given: dict[str, Any], task: GlueTask) -> None:
    """Set what was not given: the hub's rows, cut at max_length, the best adapter by the task's headline."""
    given.setdefault("train_dataset", HUB)
    given.setdefault("on_too_long", "truncate")
    saves = given.get("save_strategy", "steps")
    given.setdefault("eval_strategy", saves if saves in ("steps", "epoch") else "epoch")
    if given["eval_strategy"] == "steps" and "save_steps" in given:
        given.setdefault("eval_steps", given["save_steps"])
    given.setdefault("metric_for_best_model", f"eval_{task.headline}")


def check_glue(task: GlueTask, data: DataArguments, training: PolarTrainingConfig) -> None:
    """Check the data and training settings of a GLUE run.

    Raises:
        UserError: a missing file, or a setting that would do nothing or change what is scored.
    """
    for key, neutral in _WITHOUT_EFFECT.items():
        value = getattr(data, key)
        if value != neutral:
            raise UserError(f"{key} is {value}: {task.name} has its own columns and validation rows: leave it out")
    if data.on_too_long == "drop":
        raise UserError(
            f"on_too_long is drop, but a score of {task.name} covers every validation row: write truncate or error"
        )
    if training.packing:
        raise UserError(f"packing is true: rows of {task.name} have one label each and cannot be joined: leave it out")
    chosen, known = (training.metric_for_best_model or "loss").removeprefix("eval_"), [*task.metric_names, "loss"]
    if chosen not in known:
        raise UserError(f"metric_for_best_model is {chosen}: {task.name} has {', '.join(known)}")
    _check_sources(task, data)


def _check_sources(task: GlueTask, data: DataArguments) -> None:
    """Look for the file of each split."""
    train = data.train_dataset or HUB
    train_file = _check_source(task, train, "train", "train_dataset")
    if data.val_dataset:
        _check_source(task, data.val_dataset, validation_split(task.parts[0]), "val_dataset")
    elif train_file == train:
        raise UserError(f"train_dataset {train} is one file: give val_dataset as well, or the folder that holds both")
    else:
        for part in task.parts:
            _check_source(task, train, validation_split(part), "train_dataset")


def _check_source(task: GlueTask, source: str, split: str, key: str) -> str | None:
    """Return the file of a split, None for a hub name, of which only the form is checked."""
    if is_file_name(source):
        return str(find_file(task, source, split, key))
    check_source(source, key)
    return None
