"""What a run will do, in lines that a person reads before it starts: `--dry_run` prints them and stops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polar.run_checks import engine_of
from polar.run_folder import installed_version

if TYPE_CHECKING:
    from polar.build_model import ModelPlan
    from polar.run_config import RunConfig

GIB = 2.0**30
FP32_BYTES = 4


@dataclass(frozen=True)
class StepPlan:
    """Steps of a run, counted as the Trainer counts them.

    Attributes:
        per_epoch: optimizer steps in one pass over the rows.
        total: optimizer steps of the run.
        epochs: passes over the rows, fractional where max_steps ends the run in the middle of one.
    """

    per_epoch: int
    total: int
    epochs: float


def plan_steps(config: RunConfig, num_rows: int) -> StepPlan:
    """Count steps for `num_rows` training rows. With packing, rows are sequences before packing: an upper bound."""
    training = config.training
    batches = math.ceil(math.ceil(num_rows / training.per_device_train_batch_size) / training.world_size)
    per_epoch = max(math.ceil(batches / (training.gradient_accumulation_steps or 1)), 1)
    if training.max_steps > 0:
        return StepPlan(per_epoch, training.max_steps, training.max_steps / per_epoch)
    return StepPlan(per_epoch, math.ceil(training.num_train_epochs * per_epoch), training.num_train_epochs)


def engine_name(config: RunConfig) -> str:
    """Return the engine in words: one process, DDP, or the ZeRO stage."""
    engine = engine_of(config.training)
    return f"DeepSpeed {engine}" if engine.startswith("ZeRO") else engine


def memory_estimate_gib(config: RunConfig, plan: ModelPlan, longest_row: int) -> dict[str, float]:
    """Estimate GiB per process; a lower bound, because the working set of one layer and the loss come on top.

    Args:
        config: the run.
        plan: the counted model.
        longest_row: tokens of the longest training row; with packing, rows are max_length tokens long.

    Returns:
        `weights` of the base, `adapter` (fp32 values, gradients and two Adam moments), `activations` (the input of each
        layer in the compute dtype, which is all that checkpointing keeps; without checkpointing it is several times
        that).
    """
    training = config.training
    plugin = training.deepspeed_plugin
    shards = training.world_size if plugin is not None and plugin.zero_stage == 3 else 1
    if training.engine == "fsdp2":
        shards = training.fsdp_shard_size or training.world_size
    length = training.max_length if training.packing and training.max_length else longest_row
    tokens = training.per_device_train_batch_size * length
    element = FP32_BYTES if config.model.dtype == "float32" else FP32_BYTES // 2
    copy = plan.num_trainable * element if plugin is not None else 0  # compute copy beside the fp32 master
    return {
        "weights": plan.base_bytes / shards / GIB,
        "adapter": (4 * FP32_BYTES * plan.num_trainable / shards + copy) / GIB,
        "activations": plan.num_layers * tokens * plan.hidden_size * element / GIB,
    }


def describe_run(config: RunConfig, plan: ModelPlan, data: Any, steps: StepPlan) -> str:
    """Return the run in words: engine, model, adapter, data, batch arithmetic, steps, memory, output."""
    training = config.training
    lines = [
        *([_line("recipe", config.recipe)] if config.recipe else []),
        _line("run", f"{_engine(config)} on {training.device.type}"),
        _line("", ", ".join(f"{n} {installed_version(n) or '(source tree)'}" for n in _packages(config))),
        _line("model", f"{config.model.model_name_or_path}: {plan.architecture}, {_count(plan.num_base)} parameters"),
        _line("", _storage(config)),
        *_adapter_lines(config, plan),
        *_data_lines(data),
        _line("batch", _batch(config)),
        _line("steps", _steps(config, data, steps)),
        _line("memory", _memory(config, plan, data)),
        *_notes(config, plan),
        _line("output", f"{training.output_dir}"),
    ]
    if training.dry_run:
        lines.append("dry run: everything was checked, no weights were loaded, nothing was written")
    return "\n".join(lines)


def _line(title: str, text: str) -> str:
    return f"{title:9}{text}"


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _engine(config: RunConfig) -> str:
    name, processes = engine_name(config), _processes(config.training.world_size)
    return name if name == "one process" else f"{name}, {processes}"


def _packages(config: RunConfig) -> list[str]:
    packages = ["polar", "torch", "transformers", "peft", "trl"]
    return [*packages, "deepspeed"] if config.training.deepspeed_plugin is not None else packages


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"


def _storage(config: RunConfig) -> str:
    model = config.model
    quantised = "NF4 4-bit, computes in " if model.load_in_4bit else "int8, computes in " if model.load_in_8bit else ""
    checkpointing = ", activation checkpointing" if config.training.gradient_checkpointing else ""
    return f"{quantised}{model.dtype}, {model.attn_implementation} attention{checkpointing}"


def _adapter_lines(config: RunConfig, plan: ModelPlan) -> list[str]:
    adapter = config.adapter
    fields = ", ".join(f"{k} {v}" for k, v in adapter.adapter.items() if k not in ("peft_type", "ranks"))
    share = 100 * plan.num_trainable / max(plan.num_base, 1)
    lines = [
        _line("adapter", f"{adapter.peft_type}{': ' + fields if fields else ''}"),
        _line("", f"{plan.num_trainable:,} trainable parameters ({share:.3g} % of the base)"),
    ]
    if adapter.ranks is not None:
        lines.append(_line("", f"ranks {adapter.ranks.origin}"))
    if plan.num_factors:
        manifold = config.manifold
        lines.append(_line("", f"{plan.num_factors} Stiefel factors, {manifold.manifold_step}"))
    width = max(len(kind) for kind in plan.modules)
    for kind, modules in plan.modules.items():
        lines.append(_line("", f"  {kind:{width}}  {modules.num_modules:4} modules  {modules.num_parameters:>13,}"))
    return lines


def _data_lines(data: Any) -> list[str]:
    first, *rest = data.summary().splitlines()
    return [_line("data", first), *(_line("", text) for text in rest)]


def _batch(config: RunConfig) -> str:
    training = config.training
    return (
        f"{training.global_batch_size} rows per step = {training.per_device_train_batch_size} per process x "
        f"{_processes(training.world_size)} x {training.gradient_accumulation_steps} accumulated"
    )


def _steps(config: RunConfig, data: Any, steps: StepPlan) -> str:
    tokens = data.report["train"].get("tokens")
    total = f", about {_count(tokens * steps.epochs)} tokens" if isinstance(tokens, int | float) else ""
    bound = "at most " if config.training.packing else ""
    return f"{bound}{steps.total} = {steps.epochs:.3g} epochs x {steps.per_epoch}{total}"


def _memory(config: RunConfig, plan: ModelPlan, data: Any) -> str:
    parts = memory_estimate_gib(config, plan, data.report["train"]["length_tokens"]["longest"])
    listed = ", ".join(f"{name} {_gib(value)}" for name, value in parts.items())
    return f"at least {_gib(sum(parts.values()))} per process: {listed}"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB" if value >= 0.1 else f"{1024 * value:.2f} MiB"


def _notes(config: RunConfig, plan: ModelPlan) -> list[str]:
    plugin = config.training.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        return []
    threshold = plugin.deepspeed_config["zero_optimization"].get("stage3_param_persistence_threshold")
    if not isinstance(threshold, int | float) or threshold >= plan.largest_factor:
        return []
    return [
        _line(
            "note",
            f"stage3_param_persistence_threshold {threshold:,.0f} is below the largest factor ({plan.largest_factor:,} "
            "elements): ZeRO-3 will gather factors one by one in every pass",
        )
    ]
