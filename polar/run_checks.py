"""What can be checked about a run before anything is loaded: every problem is one line that names value and fix."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar.commonsense import TASKS as COMMONSENSE_TASKS
from polar.compatibility import check_supported
from polar.config_parser import checked
from polar.errors import UserError
from polar.glue import TASKS as GLUE_TASKS
from polar.glue_settings import check_glue
from polar.rows import check_source
from polar.run_ranks import ranks_setting
from polar.templates import load_template

if TYPE_CHECKING:
    from polar.run_config import (
        AdapterArguments,
        DataArguments,
        ManifoldArguments,
        ModelArguments,
        RunConfig,
    )
    from polar.training_config import PolarTrainingConfig

TASK_NAMES = (*COMMONSENSE_TASKS, *GLUE_TASKS)
_COLUMN_KEYS = ("prompt_column", "input_column", "response_column")


def check_run(config: RunConfig, world_size: int) -> None:
    """Check `config` for a run of `world_size` processes; reads the file system, writes nothing.

    Raises:
        UserError: at the first problem.
    """
    _check_batch(config.training, world_size)
    _check_model(config.model)
    if config.glue_task is not None:
        check_glue(config.glue_task, config.data, config.training)
    else:
        _check_data(config.data)
    if config.data.max_train_rows is not None and config.data.max_train_rows < 1:
        raise UserError(f"max_train_rows is {config.data.max_train_rows}: give at least 1, or null for all rows")
    ranks_setting(config.adapter.adapter)
    adapter = make_adapter_config(config.adapter, config.task_type)
    _check_manifold(config.manifold)
    _check_backward_field(adapter, config)
    _check_training(config.training, has_validation=has_validation(config))
    check_engine(config)
    _check_output(config.training)


def has_validation(config: RunConfig) -> bool:
    """Whether the run validates: GLUE's tasks have validation rows of their own."""
    return bool(config.glue_task or config.data.val_dataset or config.data.val_split)


def engine_of(training: PolarTrainingConfig) -> str:
    """The engine of a run, as `polar.compatibility` names it."""
    plugin = training.deepspeed_plugin
    if plugin is not None:
        return f"ZeRO-{plugin.zero_stage}"
    if training.engine == "fsdp2":
        return "FSDP2"
    return "DDP" if training.world_size > 1 else "one process"


def check_engine(config: RunConfig) -> None:
    """Refuse an optimizer or a base that the engine cannot train, and one that accelerate would replace.

    Raises:
        UserError: names both and what to use instead.
    """
    training, model = config.training, config.model
    _check_fsdp2(training, quantised=model.load_in_4bit or model.load_in_8bit)
    per_factor = config.manifold.second_moment == "per_factor" and config.adapter.peft_type == "POLAR"
    name = training.optim.value if hasattr(training.optim, "value") else str(training.optim)
    optimizer = "StiefelAdamW" if per_factor else "AdamW8bit" if "8bit" in name else "SGD" if name == "sgd" else "AdamW"
    base = "4-bit" if model.load_in_4bit else "8-bit" if model.load_in_8bit else "full"
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    check_supported(engine_of(training), optimizer, precision, base)
    plugin = training.deepspeed_plugin
    if plugin is None or optimizer == "AdamW":
        return
    deepspeed = plugin.deepspeed_config
    offload = deepspeed.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and deepspeed.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"{optimizer} with offload_optimizer: accelerate would replace it by DeepSpeedCPUAdam without a word: set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed config, or use AdamW'
        )


def _check_fsdp2(training: PolarTrainingConfig, *, quantised: bool) -> None:
    if training.engine != "fsdp2":
        if training.fsdp_shard_size is not None:
            raise UserError(
                f"fsdp_shard_size is {training.fsdp_shard_size}, but engine is {training.engine}: it goes with fsdp2"
            )
        return
    if training.deepspeed:
        raise UserError(f"engine fsdp2 and deepspeed {training.deepspeed} are both set: choose one")
    if "RANK" not in os.environ:
        raise UserError("engine fsdp2 needs a launcher: torchrun --nproc_per_node N -m polar.train ..., N may be 1")
    if training.fp16:
        raise UserError("engine fsdp2 with dtype float16: its loss scale is not supported: use bfloat16")
    if quantised:
        raise UserError("engine fsdp2 with a quantised base is not supported: use --deepspeed ds_configs/zero3.json")
    size, processes = training.fsdp_shard_size, training.world_size
    if size is not None and (size < 1 or processes % size):
        fitting = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        raise UserError(f"fsdp_shard_size {size} does not divide {processes} processes: use one of {fitting}")


def holds_run(folder: Path) -> bool:
    """Tell whether `folder` holds files of a run; other files, such as a job's log, do not count."""
    names = ("config.yaml", "provenance.json", "metrics.jsonl", "adapter", "data_report.json")
    return any((folder / name).exists() for name in names) or any(folder.glob("checkpoint-*"))


def make_adapter_config(arguments: AdapterArguments, task_type: str = "CAUSAL_LM") -> Any:
    """Return the PEFT config object that `arguments` describe.

    Args:
        arguments: peft_type and fields.
        task_type: PEFT's name of what the model does: CAUSAL_LM or SEQ_CLS.

    Raises:
        UserError: unknown `peft_type`, unknown field, wrong type, or a value that the method refuses.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import polar.tuner  # noqa: F401  registers POLAR in PEFT's table

    known = {str(getattr(name, "value", name)): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if arguments.peft_type not in known:
        near = difflib.get_close_matches(arguments.peft_type, known, n=1)
        raise UserError(
            f"adapter.peft_type: {arguments.peft_type!r} is not a method of PEFT {peft.__version__}: "
            + (f"did you mean {near[0]}?" if near else "POLAR, LORA, ...")
        )
    config_class = known[arguments.peft_type]
    hints = _hints(config_class)
    fields = {f.name for f in dataclasses.fields(config_class) if f.init}
    values: dict[str, Any] = {"task_type": task_type}
    for key, value in arguments.fields().items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            fix = f"did you mean adapter.{near[0]}?" if near else f"its fields are {', '.join(sorted(fields))}"
            raise UserError(f"adapter.{key}: unknown field of {config_class.__name__}: {fix}")
        values[key] = (
            checked(key, value, hints[key], origin="adapter.") if key in hints.keys() & arguments.adapter else value
        )
        if key in ("target_modules", "exclude_modules") and isinstance(value, str):
            _check_expression(f"adapter.{key}", value)
    rank = values.get("r")
    if isinstance(rank, int) and rank <= 0:
        raise UserError(f"adapter.r is {rank}: the rank must be at least 1")
    try:
        return config_class(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"adapter ({arguments.peft_type}): {' '.join(str(error).split())}") from error


def _check_expression(key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise UserError(
            f"{key}: {expression!r} is no regular expression ({error}): mend it, or give a list of names"
        ) from None


def _hints(config_class: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config_class)
    except (NameError, TypeError):  # some PEFT configs annotate with names that are imported only for type checkers
        return {}


def _check_batch(training: PolarTrainingConfig, world_size: int) -> None:
    accumulation = training.gradient_accumulation_steps or 1
    product = training.per_device_train_batch_size * world_size * accumulation
    if product != training.global_batch_size:
        raise UserError(
            f"global_batch_size {training.global_batch_size} was derived for WORLD_SIZE="
            f"{os.environ.get('WORLD_SIZE', '1')}, but {world_size} processes run: start with torchrun or deepspeed"
        )


def _check_model(model: ModelArguments) -> None:
    path = model.model_name_or_path
    if not path:
        raise UserError("model_name_or_path is not set: give a folder with config.json or a hub name")
    if model.load_in_4bit and model.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit are both true: choose one")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            kind = "it is an adapter; give its base model" if adapter else "give the folder of a saved model"
            raise UserError(f"model_name_or_path {path}: the folder holds no config.json: {kind}")
    elif folder.exists():
        raise UserError(f"model_name_or_path {path} is a file: give the folder that holds config.json")
    elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path):
        raise UserError(f"model_name_or_path {path}: no such folder, and not a hub name like google/gemma-3-27b-pt")


def _check_data(data: DataArguments) -> None:
    if data.task and data.task not in COMMONSENSE_TASKS:
        near = difflib.get_close_matches(data.task, TASK_NAMES, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASK_NAMES)}"
        raise UserError(f"task {data.task!r} is unknown: {fix}")
    if not data.train_dataset:
        raise UserError("train_dataset is not set: give a .json, .jsonl or .parquet file or a hub name, or a task")
    check_source(data.train_dataset, "train_dataset")
    if data.val_dataset:
        if data.val_split:
            raise UserError(f"val_dataset {data.val_dataset} and val_split {data.val_split:g} are both set: choose one")
        check_source(data.val_dataset, "val_dataset")
    if data.val_split < 0 or (data.val_split >= 1 and data.val_split != int(data.val_split)):
        raise UserError(f"val_split is {data.val_split:g}: give a share below 1, a whole number of rows, or 0 for none")
    if data.task:
        own = [key for key in ("template", *_COLUMN_KEYS) if getattr(data, key)]
        own += ["dataset_format"] * (data.dataset_format != "auto")
        if own:
            raise UserError(f"{own[0]} is {getattr(data, own[0])}: task {data.task} has its own reading: leave it out")
    elif not data.template:
        raise UserError("template is null: it goes with a task; use alpaca, or plain for the rows' own text")
    else:
        load_template(data.template)


def _check_manifold(manifold: ManifoldArguments) -> None:
    goes_with = {"landing_penalty": ("landing", "euclidean_penalty"), "landing_convention": ("landing",)}
    for name, steps in goes_with.items():
        value = getattr(manifold, name)
        if value is not None and manifold.manifold_step not in steps:
            raise UserError(
                f"{name} is {value}, but manifold_step is {manifold.manifold_step}: it goes with {' or '.join(steps)}"
            )
    if manifold.landing_penalty is not None and not manifold.landing_penalty > 0:
        raise UserError(f"landing_penalty is {manifold.landing_penalty:g}: it must be above 0")


def _check_backward_field(adapter: Any, config: RunConfig) -> None:
    """Compare a field in the layers' backward with the manifold step and with the loop that it cannot see."""
    from polar.tuner.backward_field import check_goes_with

    field: Any = getattr(adapter, "backward_field", "none")
    check_goes_with(field, config.manifold.manifold_step, "adapter")
    accumulation = config.training.gradient_accumulation_steps
    if field == "landing" and adapter.gradient_accumulation_steps != accumulation:
        raise UserError(
            f"adapter.gradient_accumulation_steps is {adapter.gradient_accumulation_steps}, but a step of this run has "
            f"{accumulation} micro batches: set it to {accumulation}, or leave the field to manifold_step landing"
        )


def _check_training(training: PolarTrainingConfig, *, has_validation: bool) -> None:
    for name in ("learning_rate", "theta_learning_rate", "num_train_epochs", "max_length"):
        value = getattr(training, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}: it must be above 0")
    if training.max_steps != -1 and training.max_steps < 1:
        raise UserError(f"max_steps is {training.max_steps}: give at least 1, or -1 to count in num_train_epochs")
    if training.per_device_eval_batch_size < 1:
        raise UserError(f"per_device_eval_batch_size is {training.per_device_eval_batch_size}: it must be at least 1")
    if not 0 <= training.seed < 2**32:  # numpy's range
        raise UserError(f"seed is {training.seed}: it must be from 0 to 2^32 - 1")
    for name in ("weight_decay", "max_grad_norm"):
        value = getattr(training, name)
        if value is not None and value < 0:
            raise UserError(f"{name} is {value:g}: it must not be negative")
    if training.eval_strategy != "no" and not has_validation:
        raise UserError(
            f"eval_strategy is {training.eval_strategy.value}, but there is no validation set: "
            "give val_dataset or val_split"
        )
    if training.save_strategy == "best" and not has_validation:
        raise UserError("save_strategy is best, but there is no validation set: give val_dataset or val_split")
    if training.load_best_model_at_end and not has_validation:
        raise UserError("load_best_model_at_end needs a validation set: give val_dataset or val_split")


def check_deepspeed(deepspeed: Any) -> None:
    """Check that deepspeed is installed and its config readable, before TrainingArguments looks at either.

    Args:
        deepspeed: path of a JSON file, JSON text, a mapping, or None: no DeepSpeed.
    """
    if not deepspeed:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"deepspeed is {deepspeed!r}, but the deepspeed package is not installed: pip install 'polar[train]', or "
            "leave --deepspeed out"
        )
    if not isinstance(deepspeed, str) or deepspeed.lstrip().startswith("{"):
        return
    path = Path(deepspeed).expanduser()
    if not path.is_file():
        raise UserError(f"deepspeed {deepspeed}: no such file: give a JSON of ds_configs/")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed {deepspeed}: not valid JSON: {error}") from None


def _check_output(training: PolarTrainingConfig) -> None:
    if not training.output_dir or training.output_dir == "trainer_output":
        raise UserError("output_dir is not set: give the folder of this run, for example --output_dir runs/first")
    folder = Path(training.output_dir).expanduser()
    if training.resume and training.overwrite:
        raise UserError("--resume and --overwrite are both given: choose one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: give a folder")
    if holds_run(folder) and not (training.resume or training.overwrite):
        raise UserError(f"output_dir {folder} holds another run: add --resume, --overwrite, or choose another folder")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {existing} is not writable")
