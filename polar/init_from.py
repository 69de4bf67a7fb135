"""`adapter.init_from` of a run: start from the values of a saved adapter, with a fresh optimizer and schedule.

    adapter: {r: 16, alpha: 32, target_modules: [q_proj, v_proj], init_from: runs/first}

The adapter must be what the run's own block describes: the same method, modules, ranks and scales. `--resume` is for a
run that was stopped; this is for training on other data, with other settings, from where an adapter has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polar.adapter_file import (
    CONFIG_NAME,
    KEY_PREFIX,
    ORTHONORMALITY_NOTE,
    check_values,
    find_adapter,
    module_scaling,
    read_adapter,
    read_config,
    read_tensors,
)
from polar.engine_state import whole_shape
from polar.errors import UserError
from polar.tuner.quantized import whole
from polar.upstream import holds_polar

# Fields that PoLAR or LoRA have, in the order in which a difference is told.
COMPARED = ("r", "alpha", "lora_alpha", "theta", "use_rslora", "use_dora")


@torch.no_grad()
def start_from(model: nn.Module, path: str, adapter_name: str = "default") -> None:
    """Give the trainable parameters of a fresh adapter the values of a saved one; on the meta device only check them.

    Args:
        model: a PeftModel that was just made. Collective where ZeRO-3 has partitioned its parameters.
        path: run folder or adapter folder, of the same method.
        adapter_name: the adapter.

    Raises:
        UserError: a broken adapter, or one that is not what the run describes; names the difference and the fix.
    """
    peft_config: Any = model.peft_config
    config = peft_config[adapter_name].to_dict()
    saved, tensors = _read(path, str(getattr(config["peft_type"], "value", config["peft_type"])))
    for key in COMPARED:
        if key in config and saved.get(key, config[key]) != config[key]:
            raise UserError(
                f"adapter.init_from {path}: its {key} is {saved[key]}, the run's adapter.{key} is {config[key]}: set"
                f" the run's to {saved[key]}, or change the adapter with polar convert"
            )
    parameters = {_saved_key(n, adapter_name): p for n, p in model.named_parameters() if p.requires_grad}
    _check_keys(path, parameters, tensors)
    _check_scales(path, model, saved, adapter_name)
    for key, parameter in parameters.items():
        if not parameter.is_meta:
            with whole([parameter], writing=True):
                parameter.copy_(tensors[key])


def _read(path: str, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = find_adapter(path)
    if method != "POLAR":
        config = read_config(folder)
        kind = "POLAR" if holds_polar(folder) else config["peft_type"]
        if kind != method:
            raise UserError(
                f"adapter.init_from {path}: holds a {kind} adapter, the run trains {method}: set adapter.peft_type, or"
                " export the adapter with polar export"
            )
        tensors = read_tensors(folder)
        for key, value in tensors.items():
            check_values(value, f"{folder}: {key}")
        return config, tensors
    if not holds_polar(folder):
        kind = read_config(folder)["peft_type"]
        raise UserError(
            f"adapter.init_from {path}: holds a {kind} adapter, the run trains POLAR: convert it with polar convert"
        )
    adapter = read_adapter(folder)
    error = max(module.orthonormality_error() for module in adapter.modules.values())
    if error > ORTHONORMALITY_NOTE:
        raise UserError(
            f"adapter.init_from {path}: its factors are off the manifold, norm(X^T X - I)_F = {error:.2g}: bring them"
            f" back, exactly, with polar convert {path} OUT"
        )
    return adapter.config, adapter.tensors


def _saved_key(name: str, adapter_name: str) -> str:
    """The key under which PEFT saves a parameter, from its name in the model."""
    key = name.replace(f".modules_to_save.{adapter_name}.", ".").replace(f".{adapter_name}.", ".")
    key = key.removesuffix(f".{adapter_name}")
    return key.removesuffix(".weight") if ".lora_magnitude_vector." in key else key


def _check_keys(path: str, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    lacks, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if lacks or extra:
        what = f"lacks {lacks[0]}" if lacks else f"has {extra[0]}, which the run does not train"
        raise UserError(
            f"adapter.init_from {path}: {what} ({len(tensors)} tensors, {len(parameters)} in the run): take"
            f" target_modules and the other fields from its {CONFIG_NAME}"
        )
    for key, parameter in parameters.items():
        shape, found = tuple(whole_shape(parameter)), tuple(tensors[key].shape)
        if shape != found:
            raise UserError(
                f"adapter.init_from {path}: {key} is {found}, in the run {shape}: use the same base, ranks and theta"
            )


def _check_scales(path: str, model: nn.Module, saved: Mapping[str, Any], adapter_name: str) -> None:
    config = {**saved, "alpha": saved.get("alpha", saved.get("lora_alpha"))}
    if config["alpha"] is None or "r" not in config:
        return  # a method without a scale of this kind
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter_name in scaling:
            wanted = module_scaling(config, name.removeprefix(KEY_PREFIX))
            if abs(scaling[adapter_name] - wanted) > 1e-6 * wanted:
                raise UserError(
                    f"adapter.init_from {path}: {name.removeprefix(KEY_PREFIX)} has the scale {wanted:g}, in the run"
                    f" {scaling[adapter_name]:g}: take rank_pattern and alpha_pattern from its {CONFIG_NAME}"
                )
