"""YAML file + command line -> one flat mapping of checked values, keyed by dataclass field name.

TRL's `TrlParser` declares one command line option per dataclass field (and `--help`); what it does with values is
replaced here, because it passes YAML values on unchecked, treats `4e-4` as a string, matches abbreviated options,
exits the process on some errors and says nothing about which key was meant. The command line wins over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import TrlParser

from polar.errors import UserError
from polar.recipe import read_recipe
from polar.strict_yaml import load_yaml

# What people coming from other kits write first. Keys that are close to one of ours are found by spelling.
KEYS_OF_OTHER_KITS = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "dataset": "train_dataset",
    "datasets": "train_dataset",
    "dataset_name": "train_dataset",
    "dataset_path": "train_dataset",
    "data_path": "train_dataset",
    "train_file": "train_dataset",
    "validation_file": "val_dataset",
    "val_set_size": "val_split",
    "val_size": "val_split",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps (a value below 1 is a share of all steps)",
    "prompt_template": "template",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "r": "adapter: {r: ...}",
    "alpha": "adapter: {alpha: ...}",
    "peft_type": "adapter: {peft_type: ...}",
    "target_modules": "adapter: {target_modules: ...}",
    "lora_r": "adapter: {r: ...}",
    "lora_alpha": "adapter: {alpha: ...}",
    "lora_dropout": "adapter: {dropout: ...}",
    "lora_target_modules": "adapter: {target_modules: ...}",
    "env": "the shell or the job script (variables set from a config file come too late for CUDA and NCCL)",
}


class RunParser(TrlParser):
    """The options of several dataclasses as one flat set of keys.

    Args:
        dataclass_types: dataclasses whose `init` fields become keys.
            (A name that two of them share is one key.)
        refused: keys of a library dataclass that would do nothing here, with the reason that the error gives.
    """

    def __init__(self, dataclass_types: Iterable[type], refused: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(list(dataclass_types), allow_abbrev=False, conflict_handler="resolve", **kwargs)
        self.refused = dict(refused)
        for action in self._actions:
            if action.dest in self.refused:
                action.help = argparse.SUPPRESS
        # For --help only: `read` takes both before argparse sees them.
        files = self.add_argument_group("recipe")
        files.add_argument("--config", metavar="FILE", help="YAML file of settings (see configs/).")
        files.add_argument("--variant", metavar="NAME", help="A variant of that file; may be given several times.")
        self.recipe = ""  # what `read` was given: the file and its variants
        self.hints: dict[str, Any] = {}
        for dataclass_type in self.dataclass_types:
            hints = typing.get_type_hints(dataclass_type)
            for field in dataclasses.fields(dataclass_type):
                if field.init and field.name not in self.refused:
                    self.hints[field.name] = hints[field.name]
        self.mappings = {key for key, hint in self.hints.items() if _accepts_mapping(hint)}

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of printing usage and exiting, which is argparse's way."""
        raise UserError(message)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return only the keys that the config file or the command line set, with checked values.

        Args:
            argv: `[--config FILE] [--variant NAME ...] [--key value ...] [--mapping.key value ...]`, without the
                program's name.

        Raises:
            UserError: unknown key (with the nearest known one), wrong type, unreadable file.
            SystemExit: only for `-h` / `--help`, after printing it.
        """
        if "-h" in argv or "--help" in argv:
            self.print_help()
            raise SystemExit(0)
        config_path, variants, dotted, rest = self._split(list(argv))
        if variants and config_path is None:
            raise UserError(f"--variant {variants[0]}: variants are in a recipe file: add --config FILE")
        from_command_line = self._from_command_line(rest)
        values = self._from_file(config_path, variants, from_command_line.get("task")) if config_path else {}
        self.recipe = " + ".join([config_path, *variants]) if config_path else ""
        values.update(from_command_line)
        for key, entries in dotted.items():
            current = values.get(key)
            values[key] = {**(current if isinstance(current, Mapping) else {}), **entries}
        return values

    def _split(self, argv: list[str]) -> tuple[str | None, list[str], dict[str, dict[str, Any]], list[str]]:
        """Take `--config FILE`, `--variant NAME` and `--mapping.key value...` out of `argv`; the rest is argparse's."""
        config_path: str | None = None
        variants: list[str] = []
        dotted: dict[str, dict[str, Any]] = {}
        rest: list[str] = []
        while argv:
            token = argv.pop(0)
            option, has_value, value = token.partition("=")
            root, dot, key = option.removeprefix("--").partition(".")
            if option == "--config":
                if config_path is not None:
                    raise UserError("--config is given twice: one run has one file; change keys with --key value")
                if not has_value and not argv:
                    raise UserError("--config needs the path of a YAML file")
                config_path = value if has_value else argv.pop(0)
            elif option == "--variant":
                if not has_value and (not argv or argv[0].startswith("--")):
                    raise UserError("--variant needs the name of a variant in the recipe, as in --variant lora")
                variants.append(value if has_value else argv.pop(0))
            elif option.startswith("--") and dot:
                if root not in self.mappings:
                    raise UserError(f"unknown option {option}: {self._suggest(root, prefix='--')}")
                words = [value] if has_value else []
                while not has_value and argv and not argv[0].startswith("--"):
                    words.append(argv.pop(0))
                if not words or not key:
                    raise UserError(f"{option} needs a value, as in {option or '--adapter.r'} 8")
                parsed = [load_yaml(word, f"the value of {option}") for word in words]
                dotted.setdefault(root, {})[key] = parsed[0] if len(parsed) == 1 else parsed
            else:
                rest.append(token)
        return config_path, variants, dotted, rest

    def _from_file(self, path: str, variants: Sequence[str], task: str | None) -> dict[str, Any]:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the config file {path}: {error}") from None
        content = load_yaml(text, path)
        if not isinstance(content, dict):
            raise UserError(f"{path} must hold `key: value` lines, found {type(content).__name__}")
        return read_recipe(content, path, variants, self._checked_settings, task)

    def _checked_settings(self, settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
        for key in settings:
            if key not in self.hints:
                raise UserError(f"{origin}unknown key {key!r}: {self._suggest(str(key))}")
        return {key: checked(key, value, self.hints[key], origin=origin) for key, value in settings.items()}

    def _from_command_line(self, argv: list[str]) -> dict[str, Any]:
        for action in self._actions:
            # Only what was given, as text: conversion and its messages are the same for file and command line.
            action.default, action.required, action.type, action.choices = argparse.SUPPRESS, False, None, None
            if self.hints.get(action.dest) == bool | None:
                action.nargs, action.const = "?", True  # a bare --bf16, as for fields that are only bool
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            option = unknown[0].partition("=")[0]
            if not option.startswith("-"):
                raise UserError(f"unexpected argument {option!r}: settings are written --key value")
            raise UserError(f"unknown option {option}: {self._suggest(option.lstrip('-'), prefix='--')}")
        given = vars(namespace)
        for key in given:
            if key in self.refused:
                raise UserError(f"unknown option --{key}: {self._suggest(key)}")
        return {key: checked(key, value, self.hints[key], origin="--") for key, value in given.items()}

    def _suggest(self, key: str, prefix: str = "") -> str:
        key = key.replace("-", "_")
        if key in self.refused:
            return self.refused[key]
        if key in KEYS_OF_OTHER_KITS:
            return f"write {KEYS_OF_OTHER_KITS[key]}"
        near = difflib.get_close_matches(key, self.hints, n=1, cutoff=0.5)
        return f"did you mean {prefix}{near[0]}?" if near else "--help lists the known keys"


def checked(key: str, value: Any, hint: Any, origin: str = "") -> Any:
    """Return `value` converted to the annotation `hint`.

    Raises:
        UserError: naming key, value and the expected type.
    """
    try:
        return _convert(value, hint)
    except UserError as error:  # text that should be a YAML mapping
        raise UserError(f"{origin}{key}: {value!r}: {error}") from None
    except (TypeError, ValueError):
        hint_text = describe(hint)
        near = difflib.get_close_matches(str(value), _all_choices(hint), n=1)
        if near:
            raise UserError(f"{origin}{key}: {value!r} is unknown: did you mean {near[0]}?") from None
        advice = " (write it in quotes)" if hint_text.startswith("text") and not isinstance(value, str) else ""
        raise UserError(f"{origin}{key}: {value!r} is not {hint_text}{advice}") from None


def describe(hint: Any) -> str:
    """Say an annotation in words: `int | None` -> "an integer or null"."""
    if _is_union(hint):
        members = [m for m in typing.get_args(hint) if m is not types.NoneType]
        enums = [m for m in members if _is_enum(m)]
        words = [describe(m) for m in (enums or members)]
        return " or ".join(words + (["null"] if types.NoneType in typing.get_args(hint) else []))
    choices = _choices(hint)
    if choices is not None:
        return "one of " + ", ".join(map(str, choices))
    origin = typing.get_origin(hint) or hint
    if origin in (list, set):
        return "a list"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    return names.get(origin, f"a {getattr(origin, '__name__', origin)}")


def _convert(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if _is_union(hint):
        return _convert_union(value, typing.get_args(hint))
    choices = _choices(hint)
    if choices is not None:
        if value is False and "no" in choices:
            return "no"  # YAML 1.1 reads a bare `no` as false, as in `save_strategy: no`
        value = value.value if isinstance(value, enum.Enum) else value
        if value in choices and not (isinstance(value, bool) and value not in [c for c in choices if c is value]):
            return value
        raise ValueError
    origin = typing.get_origin(hint) or hint
    converter = _CONVERTERS.get(origin)
    if converter is not None:
        return converter(value)
    if origin in (list, set):
        return _convert_items(value, origin, typing.get_args(hint))
    if isinstance(origin, type) and isinstance(value, origin):
        return value
    raise TypeError


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    optional = types.NoneType in members
    if value is None and optional:
        return None
    if isinstance(value, str) and optional and str not in members and value.lower() in ("none", "null"):
        return None
    enums = [m for m in members if _is_enum(m)]  # `SchedulerType | str`: the text must still be one of the names
    candidates = enums or [m for m in members if m is not types.NoneType]
    exact = [m for m in candidates if type(value) is (typing.get_origin(m) or m)]
    for member in exact + candidates:
        try:
            return _convert(value, member)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _convert_items(value: Any, origin: type, item_hints: tuple[Any, ...]) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple | set):
        raise TypeError
    hint = item_hints[0] if item_hints else Any
    return origin(_convert(item, hint) for item in value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise TypeError


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value) if isinstance(value, str) else value  # `save_steps: 500` stays a count


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = load_yaml(value, "a mapping")
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_text,
    dict: _to_mapping,
}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _choices(hint: Any) -> list[Any] | None:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [member.value for member in hint] if _is_enum(hint) else None


def _all_choices(hint: Any) -> list[str]:
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    return [str(choice) for member in members for choice in _choices(member) or []]


def _accepts_mapping(hint: Any) -> bool:
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    return any((typing.get_origin(member) or member) is dict for member in members)
