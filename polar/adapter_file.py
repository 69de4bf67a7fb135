"""A saved PoLAR adapter: find it, read it, and refuse it with one clear line when something is wrong with it.

The folder is PEFT's: `adapter_config.json` (`"peft_type": "POLAR"`) and `adapter_model.safetensors` with the keys
`base_model.model.<module>.polar_X | polar_Theta | polar_Y`. Folders of the paper's own code are read as well
(`polar.upstream`). Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from polar.base_checkpoint import BaseModel, describe_base
from polar.errors import UserError
from polar.upstream import as_polar, is_upstream

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
THETA_KINDS = ("full", "diagonal", "identity")
# Exact factors in fp32 stay below 1e-5; the bf16 copies that another tool may have saved lie near 2e-2 at r = 32.
ORTHONORMALITY_NOTE = 1e-2

# Names change between transformers versions and between the text-only and the multimodal class of one model family, so
# an adapter may be written under one name and used under another: (adapter's prefix, base's prefix).
PREFIX_RENAMINGS = (
    ("language_model.model.", "model.language_model."),  # multimodal classes before transformers 4.52
    ("model.", "model.language_model."),  # trained on the text-only class, used on the multimodal one
    ("model.language_model.", "model."),  # the other way round
    ("language_model.model.", "model."),
)


@dataclass(frozen=True)
class AdapterModule:
    """The three factors of one layer: X (d_out, r), Y (d_in, r), Theta (r, r), (r,) or None (identity), and s."""

    X: torch.Tensor
    Theta: torch.Tensor | None
    Y: torch.Tensor
    scaling: float

    @property
    def r(self) -> int:
        return self.X.shape[1]

    @property
    def d_out(self) -> int:
        return self.X.shape[0]

    @property
    def d_in(self) -> int:
        return self.Y.shape[0]

    def core(self) -> torch.Tensor:
        """Return s Theta as a whole (r, r) matrix in float64."""
        if self.Theta is None:
            return self.scaling * torch.eye(self.r, dtype=torch.float64)
        Theta = self.Theta.double()
        return self.scaling * (torch.diag(Theta) if Theta.ndim == 1 else Theta)

    def delta_norm(self) -> float:
        """Return norm(dW)_F from r x r products only: tr(C^T (X^T X) C (Y^T Y)) with C = s Theta."""
        X, Y, C = self.X.double(), self.Y.double(), self.core()
        return math.sqrt(max(torch.trace(C.T @ (X.T @ X) @ C @ (Y.T @ Y)).item(), 0.0))

    def orthonormality_error(self) -> float:
        """Return the larger of norm(X^T X - I)_F and norm(Y^T Y - I)_F."""
        identity = torch.eye(self.r, dtype=torch.float64)
        return max(torch.linalg.norm(M.double().T @ M.double() - identity).item() for M in (self.X, self.Y))


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter.

    `config` is adapter_config.json, `tensors` the file's tensors under their own keys, `modules` the factors by module
    name (the names of the base, where one was given), `other_tensors` what belongs to modules_to_save or bias, keyed
    by parameter name, and `notes` are remarks that do not stop anything. `renamed` says that the base calls the modules
    otherwise than the file does.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    modules: dict[str, AdapterModule]
    other_tensors: dict[str, torch.Tensor]
    sha256: str
    notes: list[str] = field(default_factory=list)
    renamed: bool = False


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Return the adapter folder of a run folder or of an adapter folder.

    Raises:
        UserError: neither; the message names what is there instead.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"adapter {path}: no such folder; pass a run folder or an adapter folder")
    if folder.is_file():
        raise UserError(f"adapter {path}: is a file; pass the folder that holds {CONFIG_NAME}")
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda entry: _trailing_number(entry.name))
    if checkpoints:
        raise UserError(
            f"adapter {path}: the run holds no finished adapter; use its last checkpoint, {checkpoints[-1]}"
        )
    raise UserError(
        f"adapter {path}: neither {CONFIG_NAME} nor adapter/{CONFIG_NAME} in it; pass a run or adapter folder"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, of any PEFT method."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: not readable as JSON ({error}); copy the adapter again") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{folder / CONFIG_NAME}: no peft_type in it; this is not a PEFT adapter")
    return config


def read_adapter(path: str | os.PathLike[str], base: str | BaseModel | None = None) -> AdapterFile:
    """Read a PoLAR adapter, ours or of the paper's code, and check all that can be checked without the base's weights.

    Args:
        path: run folder or adapter folder.
        base: a model folder, hub id or `BaseModel`; when given, the adapter's modules must be exactly those that its
            config selects there, with the same sizes. Names are translated where only the class differs (Gemma-3 text
            and multimodal).

    Raises:
        UserError: one line with the value and the fix.
    """
    folder = find_adapter(path)
    config = read_config(folder)
    tensors = {} if config["peft_type"] not in ("POLAR", "LORA") else read_tensors(folder)
    if is_upstream(config, tensors):
        config, tensors = as_polar(config, tensors, str(folder))
    _check_config(config, folder)
    modules, other_tensors = _group(tensors, config, folder)
    notes = _check_factors(modules, folder)
    is_renamed = False
    if base is not None:
        if isinstance(base, str):
            base = describe_base(base, task_type=config.get("task_type"))
        renamed = match_base(modules, config, base)
        other_tensors = {_rename_parameter(name, modules, renamed): value for name, value in other_tensors.items()}
        is_renamed = any(name != new for name, new in renamed.items())
        modules = {renamed[name]: module for name, module in modules.items()}
    digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    return AdapterFile(folder, config, tensors, modules, other_tensors, digest, notes, is_renamed)


def module_r(config: Mapping[str, Any], name: str) -> int:
    """Return the rank that `config` gives to module `name`, by PEFT's own pattern rule."""
    return int(_by_pattern(config.get("rank_pattern"), name, config["r"]))


def module_scaling(config: Mapping[str, Any], name: str) -> float:
    """Return s = alpha / r, or alpha / sqrt(r) with rsLoRA scaling."""
    r = module_r(config, name)
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["alpha"]))
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def match_base(modules: Mapping[str, AdapterModule], config: Mapping[str, Any], base: BaseModel) -> dict[str, str]:
    """Return the base's name of each adapter module; raise where the adapter belongs to another base."""
    renamed = _translate(modules, base)
    for name, module in modules.items():
        linear = base.linears[renamed[name]]
        if (module.d_out, module.d_in) != (linear.d_out, linear.d_in):
            raise UserError(
                f"the adapter was made for another base: {name} is ({module.d_out}, {module.d_in}) in the adapter and"
                f" ({linear.d_out}, {linear.d_in}) in {base.name}; pass the base it was trained on"
                f" ({config.get('base_model_name_or_path')})"
            )
    if all(name == new for name, new in renamed.items()):
        selected = selected_modules(config, base)
        absent = sorted(selected - set(modules))
        if absent:
            raise UserError(
                f"the adapter does not cover {base.name}: target_modules select {len(selected)} layers there,"
                f" the file has {len(modules)}, e.g. {absent[0]} is missing; pass the base it was trained on"
                f" ({config.get('base_model_name_or_path')}) or save the adapter again"
            )
        extra = sorted(set(modules) - selected) if selected else []
        if extra:
            raise UserError(
                f"the adapter holds {len(extra)} modules that its target_modules do not select, e.g. {extra[0]}:"
                " PEFT would leave them out; config and file do not match, save the adapter again"
            )
    return renamed


def selected_modules(config: Mapping[str, Any], base: BaseModel) -> set[str]:
    """Return the linear layers of `base` that a PEFT config selects (target, exclude, layers), by PEFT's own rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "target_parameters",
    )
    view = SimpleNamespace(**{name: config.get(name) for name in fields})
    if view.target_modules is None or view.target_modules == "all-linear":
        return set()
    try:
        return {name for name in base.linears if check_target_module_exists(view, name)}
    except (re.error, TypeError) as error:
        raise UserError(
            f"{CONFIG_NAME}: target_modules {view.target_modules!r}, exclude_modules {view.exclude_modules!r} and the"
            f" layer fields select nothing that can be read ({error}); restore the file"
        ) from error


def _translate(modules: Mapping[str, AdapterModule], base: BaseModel) -> dict[str, str]:
    if all(name in base.linears for name in modules):
        return {name: name for name in modules}
    for old, new in PREFIX_RENAMINGS:
        renamed = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in modules}
        if all(name in base.linears for name in renamed.values()):
            return renamed
    unknown = sorted(name for name in modules if name not in base.linears)
    raise UserError(
        f"the adapter was made for another base: {len(unknown)} of its {len(modules)} modules are not in {base.name},"
        f" e.g. {unknown[0]}"
    )


def _rename_parameter(parameter: str, modules: Mapping[str, AdapterModule], renamed: Mapping[str, str]) -> str:
    for old, new in PREFIX_RENAMINGS:
        changed = [name for name in modules if renamed[name] != name]
        if (
            changed
            and all(renamed[name] == new + name.removeprefix(old) for name in changed)
            and parameter.startswith(old)
        ):
            return new + parameter.removeprefix(old)
    return parameter


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config["peft_type"] != "POLAR":
        raise UserError(f"{folder}: holds a {config['peft_type']} adapter; this needs one with peft_type POLAR")
    if config.get("theta", "full") not in THETA_KINDS:
        raise UserError(f"{folder / CONFIG_NAME}: theta {config['theta']!r} is none of {', '.join(THETA_KINDS)}")
    check_numbers(config, folder)


def check_numbers(config: Mapping[str, Any], folder: Path, alpha: str = "alpha") -> None:
    """Raise UserError unless r, alpha (under the name that the method has for it) and their patterns can be used."""
    for key, pattern, kind in (("r", "rank_pattern", "integer"), (alpha, "alpha_pattern", "number")):
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise UserError(
                f"{folder / CONFIG_NAME}: {pattern} = {patterns!r} must map names to numbers; restore the file"
            )
        for name, value in {key: config.get(key), **{f"{pattern}[{k!r}]": v for k, v in patterns.items()}}.items():
            fits = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
            if not fits or value <= 0 or not math.isfinite(value):
                raise UserError(
                    f"{folder / CONFIG_NAME}: {name} = {value!r} must be a positive {kind}; restore the file"
                )


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter folder, of any PEFT method.

    Raises:
        UserError: no safetensors file there, or a broken one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_NAME
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]}: pickles are not opened; load the adapter where it was made and save it with"
                " model.save_pretrained(folder), which writes safetensors"
            )
        raise UserError(f"{folder}: no {WEIGHTS_NAME}; copy the whole adapter folder")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: truncated or corrupt ({error}); copy or save the adapter again") from error


def _group(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, AdapterModule], dict[str, torch.Tensor]]:
    """Sort the file's tensors into factors per module and the rest; check keys, dtypes, values and shapes."""
    file = folder / WEIGHTS_NAME
    parts: dict[str, dict[str, torch.Tensor]] = {}
    other: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".")
        if not key.startswith(KEY_PREFIX) or not name:
            raise UserError(f"{file}: unexpected key {key}; keys begin with {KEY_PREFIX}<module>")
        if value.numel() == 0:
            raise UserError(
                f"{file}: {key} is empty, shape {tuple(value.shape)}: a ZeRO-3 shard saved without gathering; save"
                " the adapter through the trainer, or gather the parameters first"
            )
        check_values(value, f"{file}: {key}")
        if part in ("polar_X", "polar_Theta", "polar_Y"):
            parts.setdefault(name, {})[part] = value
        elif _is_saved_beside(key, part, config):
            other[f"{name}.{part}"] = value
        else:
            raise UserError(
                f"{file}: unexpected key {key}; an adapter holds polar_X, polar_Theta and polar_Y of each module"
            )
    if not parts:
        raise UserError(f"{file}: no polar_X in it; this is not a saved PoLAR adapter")
    return {name: _module(name, found, config, file) for name, found in sorted(parts.items())}, other


def check_values(value: torch.Tensor, what: str) -> None:
    """Raise UserError unless a tensor holds finite floating point numbers; `what` names file and key."""
    if not value.is_floating_point() or not torch.isfinite(value).all():
        problem = "holds NaN or Inf" if value.is_floating_point() else f"is {value.dtype}, not floating point"
        raise UserError(f"{what} {problem}; use an earlier checkpoint")


def _is_saved_beside(key: str, part: str, config: Mapping[str, Any]) -> bool:
    saved = config.get("modules_to_save") or []
    path = key.removeprefix(KEY_PREFIX).split(".")
    return any(name in path or f".{name}." in key for name in saved) or (
        part == "bias" and config.get("bias", "none") != "none"
    )


def _module(name: str, found: dict[str, torch.Tensor], config: Mapping[str, Any], file: Path) -> AdapterModule:
    theta = config.get("theta", "full")
    wanted = {"polar_X", "polar_Y"} | (set() if theta == "identity" else {"polar_Theta"})
    if missing := sorted(wanted - set(found)):
        raise UserError(f"{file}: {name} lacks {missing[0]} (theta: {theta}); save the adapter again")
    if extra := sorted(set(found) - wanted):
        raise UserError(
            f"{file}: unexpected key {KEY_PREFIX}{name}.{extra[0]} (theta: {theta}); config and file do not match"
        )
    r = module_r(config, name)
    for part in ("polar_X", "polar_Y"):
        shape = tuple(found[part].shape)
        if len(shape) != 2 or shape[1] != r or shape[0] < r:
            raise UserError(
                f"{file}: {name}.{part} has shape {shape}, expected (n, {r}) with n >= {r}; config and file differ"
            )
    Theta = found.get("polar_Theta")
    expected = (r, r) if theta == "full" else (r,)
    if Theta is not None and tuple(Theta.shape) != expected:
        raise UserError(
            f"{file}: {name}.polar_Theta has shape {tuple(Theta.shape)}, expected {expected}; config and file differ"
        )
    return AdapterModule(found["polar_X"], Theta, found["polar_Y"], module_scaling(config, name))


def _check_factors(modules: Mapping[str, AdapterModule], folder: Path) -> list[str]:
    errors = {name: module.orthonormality_error() for name, module in modules.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] <= ORTHONORMALITY_NOTE:
        return []
    return [
        f"{folder}: factors are not orthonormal, norm(X^T X - I)_F is {errors[worst]:.3g} in {worst}; an export is"
        " exact all the same, but spectra read from Theta are not"
    ]


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default)


def _trailing_number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
