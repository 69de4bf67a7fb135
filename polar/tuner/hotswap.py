"""PEFT's `hotswap_adapter` for PoLAR: another adapter under the same name, in place, without loading the model again.

PEFT 0.21.2 keeps a closed table of methods that can be swapped and splits the keys of LoRA's form, so its function for
tensors is wrapped, and the table gets our entry. Whoever imported `hotswap_adapter` before polar gets both.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import PeftType
from peft.utils import hotswap as peft_hotswap
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from polar.errors import UserError
from polar.tuner.config import PolarConfig
from polar.tuner.layer import PolarLinear

# What may not differ between the two adapters; ranks, alphas and rsLoRA may: factors and scales are swapped.
SAME_FIELDS = ["dropout", "theta"]
PREFIX = "base_model.model."


@torch.no_grad()
def swap(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, config: PolarConfig) -> None:
    """Put the factors of another adapter in place of those of `adapter_name`.

    Tensors of equal shape are written in place, so that a compiled model stays compiled; others become new parameters.
    Layers that the new adapter lacks get Theta = 0.

    Args:
        model: a PeftModel with PoLAR layers, compiled or not.
        tensors: factors by their full parameter name.
        adapter_name: the adapter that is replaced.
        config: of the new adapter.

    Raises:
        UserError: a layer that the model does not adapt, a shape that does not fit, or a merged adapter; nothing is
            changed then.
    """
    layers = {_plain(name): module for name, module in model.named_modules() if isinstance(module, PolarLinear)}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.polar_X}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, part = key.removesuffix(f".{adapter_name}").rsplit(".", 1)
        if name not in layers:
            raise UserError(f"hotswap: the adapter {adapter_name} has no {name}; load the new one with load_adapter")
        found.setdefault(name, {})[part] = value
    for name, factors in found.items():
        _check(name, layers[name], factors, adapter_name)
    missing = [name for name in layers if name not in found]
    if missing and config.theta == "identity":
        raise UserError(f"hotswap: the new adapter lacks {missing[0]}, and theta: identity has no zero; load it")
    for name in missing:
        layers[name].polar_Theta[adapter_name].zero_()
    for name, factors in found.items():
        _replace(layers[name], factors, adapter_name, name.removeprefix(PREFIX), config)
    inner: Any = getattr(model, "_orig_mod", model)
    if adapter_name in getattr(inner, "peft_config", {}):
        inner.peft_config[adapter_name] = config


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")  # torch.compile


def _check(name: str, layer: PolarLinear, factors: dict[str, Tensor], adapter: str) -> None:
    present = {part for part in layer.adapter_layer_names if adapter in getattr(layer, part)}
    if set(factors) != present:
        raise UserError(f"hotswap: {name} has {', '.join(sorted(factors))}, needs {', '.join(sorted(present))}")
    r = factors["polar_X"].shape[-1]
    wanted = {"polar_X": (layer.out_features, r), "polar_Y": (layer.in_features, r)}
    for part, shape in wanted.items():
        if tuple(factors[part].shape) != shape:
            raise UserError(f"hotswap: {name}.{part} is {tuple(factors[part].shape)}, the base needs {shape}")
    if adapter in layer.merged_adapters:
        raise UserError(f"hotswap: {adapter} is merged into the base; call unmerge_adapter() first")


def _replace(layer: PolarLinear, factors: dict[str, Tensor], adapter: str, name: str, config: PolarConfig) -> None:
    for part, value in factors.items():
        container = getattr(layer, part)
        old = container[adapter]
        if old.shape == value.shape:
            old.copy_(value)
        else:
            new = value.to(old.device, old.dtype).contiguous()
            container[adapter] = nn.Parameter(new, requires_grad=old.requires_grad)
    r = factors["polar_X"].shape[1]
    alphas = config.alpha_pattern or {}
    layer.r[adapter] = r
    layer.alpha[adapter] = alphas.get(get_pattern_key(list(alphas), name), config.alpha)
    layer.scaling[adapter] = config.scaling(r, layer.alpha[adapter])


def extend_peft_hotswap() -> None:
    """Let PEFT's `hotswap_adapter` swap PoLAR adapters; doing so again changes nothing."""
    peft_hotswap.CONFIG_KEYS_TO_CHECK[PeftType["POLAR"]] = SAME_FIELDS
    current = peft_hotswap.hotswap_adapter_from_state_dict
    original = getattr(current, "wrapped_by_polar", current)  # a second import must not wrap the wrapper

    def swap_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        if config.peft_type == PeftType["POLAR"]:
            swap(model, state_dict, adapter_name, config)
        else:
            original(model, state_dict, adapter_name, config, parameter_prefix)

    swap_state_dict.wrapped_by_polar = original  # type: ignore[attr-defined]
    peft_hotswap.hotswap_adapter_from_state_dict = swap_state_dict
