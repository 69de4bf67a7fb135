"""A recipe: a YAML file of settings, with named variants that change some of them.

    learning_rate: 4e-3
    adapter: {peft_type: POLAR, r: 16, alpha: 32}
    variants:
      lora:
        learning_rate: 4e-4
        adapter: {peft_type: LORA, r: 16, lora_alpha: 32}   # has a peft_type: replaces the adapter block as a whole
      wide:
        adapter: {r: 64}                                    # has none: changes fields of the block
    tasks:
      rte: {num_train_epochs: 50}                           # what one task of the recipe has of its own

`--variant lora --variant tiny` applies both in this order; the settings of the task come before them, the command
line's other options after them. The run folder's config.yaml holds the settings that result, no variants and no tasks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polar.errors import UserError

Settings = dict[str, Any]
PARTS = ("variants", "tasks")  # of a recipe, beside its own settings


def split_recipe(content: Mapping[str, Any], path: str) -> tuple[Settings, dict[str, Settings], dict[str, Settings]]:
    """Return (the recipe's own settings, its variants by name, its tasks by name), unchecked as settings.

    Raises:
        UserError: `variants` or `tasks` is not a mapping of mappings.
    """
    parts = {part: _named_settings(content.get(part, {}), part, path) for part in PARTS}
    return {key: value for key, value in content.items() if key not in PARTS}, parts["variants"], parts["tasks"]


def _named_settings(found: Any, part: str, path: str) -> dict[str, Settings]:
    if not isinstance(found, dict):
        raise UserError(f"{path}: {part} must map names to settings, found {type(found).__name__}")
    for name, changes in found.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {part}: {name!r} is not text: write the name in quotes")
        if not isinstance(changes, dict) or not changes:
            raise UserError(f"{path}: {part}.{name} must hold `key: value` lines, found {changes!r}")
        if inner := next((key for key in PARTS if key in changes), None):
            raise UserError(f"{path}: {part}.{name}.{inner}: {part} hold no {inner}: name both on the command")
    return found


def read_recipe(
    content: Mapping[str, Any],
    path: str,
    names: Sequence[str],
    check: Callable[[Mapping[str, Any], str], Settings],
    task: str | None = None,
) -> Settings:
    """Return the settings of a recipe with those of a task and some of its variants.

    Args:
        content: the file's mapping.
        path: the file, for messages.
        names: variants in the order in which they apply.
        check: (settings, start of a message) -> checked settings; called for every variant, also those not asked for,
            so that a mistake in one shows before somebody needs it.
        task: the task that the command line names, None for the one that the recipe names.

    Raises:
        UserError: a variant or task that does not exist (names those that do), no task where the recipe has several,
            or a setting that `check` refuses.
    """
    own, variants, tasks = split_recipe(content, path)
    values = check(own, f"{path}: ")
    checked = {name: check(changes, f"{path}: variants.{name}: ") for name, changes in variants.items()}
    of_tasks = {name: check(changes, f"{path}: tasks.{name}: ") for name, changes in tasks.items()}
    task = task or values.get("task")
    if tasks:
        if task is None:
            raise UserError(f"{path} has several tasks: choose one with --task: {', '.join(tasks)}")
        if task not in tasks:
            raise UserError(f"{path} has no task {task!r}: {_suggest(task, list(tasks))}")
        values = merge(values, of_tasks[task])
    for name in names:
        if name not in checked:
            raise UserError(f"{path} has no variant {name!r}: {_suggest(name, list(checked))}")
        values = merge(values, checked[name])
    return values


def merge(values: Settings, changes: Settings) -> Settings:
    """Return `values` with `changes`; an adapter block without peft_type changes fields, every other value replaces."""
    merged = values | changes
    adapter = changes.get("adapter")
    if isinstance(adapter, dict) and "peft_type" not in adapter:
        merged["adapter"] = {**values.get("adapter", {}), **adapter}
    return merged


def _suggest(name: str, known: list[str]) -> str:
    if not known:
        return "it has none: leave --variant out"
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"It has {', '.join(known)}"
