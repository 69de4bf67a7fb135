"""The PoLAR tuner: which modules get an adapter, and what is refused before a model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, PeftWarning
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from polar.errors import UserError
from polar.tuner.config import PolarConfig
from polar.tuner.layer import PolarLayer, PolarLinear, check_rank
from polar.tuner.quantized import find_backend
from polar.tuner.weighted import add_weighted_adapter


class NoMatchingModule(UserError, NoMatchingPeftModuleError):
    """target_modules, exclude_modules and layers_to_transform together select no module of the model."""


class PolarModel(BaseTuner):
    """A model whose linear layers carry PoLAR adapters: W = W0 + s X Theta Y^T.

    Args:
        model: the base model.
        config: a `PolarConfig`, or one per adapter name.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: leave the factors on the meta device, to be loaded.
    """

    prefix: str = "polar_"
    tuner_layer_cls = PolarLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to `model`.

        Raises:
            NoMatchingModule: no module is selected (a `UserError`, hence a `ValueError`).
            UserError: a selected module cannot carry the adapter.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingModule(f"{error} Linear layers of this model: {_linear_names(model)}.") from error

    def _prepare_model(self, peft_config: PolarConfig, model: nn.Module) -> None:
        # Refuse before the first module is replaced: an error halfway would leave the model with half an adapter.
        _maybe_include_all_linear_layers(peft_config, model)
        inside: tuple[str, ...] = ()
        for key, module in model.named_modules():
            if not key or key.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, key + ".")
            if self._check_target_module_exists(peft_config, key):
                self._check_target(peft_config, key, module)

    def _check_target(self, config: PolarConfig, key: str, module: nn.Module) -> tuple[int, float]:
        """Return rank and alpha for one module, or raise a UserError that names it."""
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        kind = type(base).__name__
        # nn.MultiheadAttention reads its output projection's weight and never calls it: an adapter would do nothing.
        unused = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if unused or not (isinstance(base, (nn.Linear, Conv1D)) or _is_quantized_linear(base, self.model)):
            raise UserError(
                f"module {key} ({kind}) cannot carry a PoLAR adapter, only linear layers that are called can "
                "(nn.Linear, transformers' Conv1D, quantised ones); change target_modules or add it to exclude_modules"
            )
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), key), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), key), config.alpha)
        d_in, d_out = _get_in_out_features(base)
        check_rank(r, d_in, d_out, f"module {key} ({kind})")
        return r, alpha

    def _create_and_replace(
        self,
        polar_config: PolarConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r, alpha = self._check_target(polar_config, current_key, target)
        if isinstance(target, PolarLinear):
            target.update_layer(adapter_name, r, alpha, polar_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        # The layer itself tells how its weight is stored; PEFT keeps the answer in the configuration too.
        polar_config.fan_in_fan_out = isinstance(base, Conv1D)
        new_module = PolarLinear(
            target,
            adapter_name,
            polar_config,
            r,
            alpha,
            fan_in_fan_out=polar_config.fan_in_fan_out,
            **get_quantization_kwargs(self.model),
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, new_module, target)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["svd", "cat"] = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is the weighted sum of loaded ones, with its factors on the Stiefel manifold.

        Args:
            adapters: names of loaded adapters; their ranks, scales and layers may differ.
            weights: one per adapter, of any sign.
            adapter_name: of the sum; it is not made active.
            combination_type: "cat" is exact and has the sum of the ranks (at most min(d_out, d_in)); "svd" is the best
                approximation of rank `svd_rank`.
            svd_rank: rank of "svd"; None: the largest rank of the adapters.

        Raises:
            UserError: unknown adapters, a name that is taken, a rank above the sum, another combination_type.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Always fp32: `autocast_adapter_dtype=False` asks for the base's dtype, in which factors leave the manifold.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = super()._get_adapter_state_dict(*args, **kwargs)
        # PEFT 0.21.2 warns for LoRA only; an adapter that is saved with empty tensors looks whole until it is loaded.
        factors = {key: value for key, value in tensors.items() if ".polar_X." in key or ".polar_Y." in key}
        broken = [key for key, value in factors.items() if value.dim() < 2 or value.numel() == 0]
        if broken:
            warnings.warn(
                f"{len(broken)} factors are not whole, for example {broken[0]}: {tuple(tensors[broken[0]].shape)}. "
                "DeepSpeed ZeRO-3 / FSDP shards must be gathered before save_pretrained().",
                PeftWarning,
                stacklevel=2,
            )
        return tensors

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a mixed batch to every layer for the time of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        num_beams = kwargs.get("num_beams")
        repeated = list(adapter_names)
        if isinstance(num_beams, int) and num_beams > 1:
            repeated = [name for name in adapter_names for _ in range(num_beams)]  # beams of a row are neighbours
        encoder = _encoder_of(self.model)
        in_encoder = set(encoder.modules()) if encoder is not None else set()  # an encoder sees each row once
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (PolarLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in in_encoder else repeated
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, PolarLayer) for name in layer.polar_X}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder model, None for others."""
    get_encoder: Callable[[], nn.Module] | None = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return None if encoder is model else encoder  # transformers 5 returns the model itself where there is no encoder


def _is_quantized_linear(layer: nn.Module, model: nn.Module) -> bool:
    backend = find_backend(layer, **get_quantization_kwargs(model))
    return backend is not None and backend.layer_type == "linear"


def _linear_names(model: nn.Module) -> str:
    """Return the last name parts of the linear layers, for messages."""
    modules = [
        (n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".base_layer" not in n
    ]
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in modules})
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
