"""A recipe: a YAML file of settings, with named variants that change some of them.

    learning_rate: 4e-3
    adapter: {peft_type: POLAR, r: 16, alpha: 32}
    variants:
      lora:
        learning_rate: 4e-4
        adapter: {peft_type: LORA, r: 16, lora_alpha: 32}   # has a peft_type: replaces the adapter block as a whole
      wide:
        adapter: {r: 64}                                    # has none: changes fields of the block

`--variant lora --variant tiny` applies both in this order; the command line's other options come after them. The run
folder's config.yaml holds the settings that result, and no variants.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polar.errors import UserError

Settings = dict[str, Any]


def split_recipe(content: Mapping[str, Any], path: str) -> tuple[Settings, dict[str, Settings]]:
    """Return (the recipe's own settings, its variants by name), unchecked as settings.

    Raises:
        UserError: `variants` is not a mapping of mappings.
    """
    variants = content.get("variants", {})
    if not isinstance(variants, dict):
        raise UserError(f"{path}: variants must map names to settings, found {type(variants).__name__}")
    for name, changes in variants.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: variants: {name!r} is not text: write the name in quotes")
        if not isinstance(changes, dict) or not changes:
            raise UserError(f"{path}: variants.{name} must hold `key: value` lines, found {changes!r}")
        if "variants" in changes:
            raise UserError(f"{path}: variants.{name}.variants: variants hold no variants: name both on the command")
    return {key: value for key, value in content.items() if key != "variants"}, variants


def read_recipe(
    content: Mapping[str, Any],
    path: str,
    names: Sequence[str],
    check: Callable[[Mapping[str, Any], str], Settings],
) -> Settings:
    """Return the settings of a recipe with some of its variants.

    Args:
        content: the file's mapping.
        path: the file, for messages.
        names: variants in the order in which they apply.
        check: (settings, start of a message) -> checked settings; called for every variant, also those not asked for,
            so that a mistake in one shows before somebody needs it.

    Raises:
        UserError: a variant that does not exist (names those that do), or a setting that `check` refuses.
    """
    own, variants = split_recipe(content, path)
    values = check(own, f"{path}: ")
    checked = {name: check(changes, f"{path}: variants.{name}: ") for name, changes in variants.items()}
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
