"""The PoLAR layer: a linear layer with W = W0 + s X Theta Y^T added in factored form."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import nn

from polar.errors import UserError
from polar.tuner.backward_field import BackwardField
from polar.tuner.config import PolarConfig
from polar.tuner.factors import fill_gaussian, fill_orthonormal, fill_singular, orthonormalise, was_orthonormal
from polar.tuner.quantized import find_backend, whole


class PolarLayer(BaseTunerLayer):
    """What every layer with PoLAR adapters holds, keyed by the adapter's name.

    polar_X: (d_out, r), polar_Y: (d_in, r), both on the Stiefel manifold, tall and contiguous; polar_Theta: (r, r) for
    `theta="full"`, (r,) for "diagonal", absent for "identity". All are fp32 whatever the base layer's dtype: the
    spacing of bf16 near 1 is 8e-3, far above the steps of an optimizer on the manifold.
    """

    adapter_layer_names = ("polar_X", "polar_Theta", "polar_Y")
    other_param_names = ("r", "alpha", "scaling", "backward_field", "polar_dropout")

    if TYPE_CHECKING:  # PEFT ships no types

        def get_base_layer(self) -> nn.Module: ...
        def get_base_weight(self) -> torch.Tensor: ...
        def set_base_weight(self, weight_data: torch.Tensor) -> None: ...

        active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.backward_field: dict[str, BackwardField] = {}
        self.polar_dropout = nn.ModuleDict({})
        self.polar_X = nn.ParameterDict({})
        self.polar_Theta = nn.ParameterDict({})
        self.polar_Y = nn.ParameterDict({})
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.quantization_backend = find_backend(self.get_base_layer(), **kwargs)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: PolarConfig) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its key.
            r: rank, at most min(d_in, d_out).
            alpha: numerator of the scale.
            config: everything else.

        Raises:
            UserError: the rank does not fit the layer.
        """
        check_rank(r, self.in_features, self.out_features, type(self.get_base_layer()).__name__)
        self.r[adapter_name] = r
        self.alpha[adapter_name] = alpha
        self.scaling[adapter_name] = config.scaling(r, alpha)
        self.backward_field[adapter_name] = config.make_backward_field()
        self.polar_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

        # A base layer on the meta device (a model that is only measured) gets its factors there: nothing to compute.
        weight = getattr(self.get_base_layer(), "weight", None)
        device = "meta" if weight is not None and weight.is_meta else None
        shapes: dict[str, tuple[int, ...]] = {"polar_X": (self.out_features, r), "polar_Y": (self.in_features, r)}
        if config.theta != "identity":
            shapes["polar_Theta"] = (r, r) if config.theta == "full" else (r,)
        for name, shape in shapes.items():
            value = torch.empty(shape, dtype=torch.float32, device=device)
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self.reset_polar_parameters(adapter_name, config)

        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_polar_parameters(self, adapter_name: str, config: PolarConfig) -> None:
        """Initialise an adapter as `config` says; parameters on the meta device (low_cpu_mem_usage) stay empty."""
        X, Y = self.polar_X[adapter_name], self.polar_Y[adapter_name]
        if X.is_meta:
            return
        if config.init_factors == "svd":
            fill_singular(X, Y, self._base_weight_as_matrix())
        else:
            fill = fill_orthonormal if config.init_factors == "orthonormal" else fill_gaussian
            fill(X)
            fill(Y)
        if adapter_name not in self.polar_Theta:
            return
        Theta = self.polar_Theta[adapter_name]
        if not config.init_weights:
            Theta.copy_(torch.randn(Theta.shape) / self.r[adapter_name] ** 0.5)
        elif config.init_theta == "zeros":
            Theta.zero_()
        else:
            Theta.copy_(torch.eye(self.r[adapter_name]) if Theta.dim() == 2 else torch.ones(Theta.shape))

    def _base_weight_as_matrix(self) -> torch.Tensor:
        """Return the base weight as (d_out, d_in): whole under ZeRO-3 (a collective), dequantised when quantised."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base layer's dtype, which would round the factors off the manifold.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None:
            return
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                value = parameters[adapter_name]
                if value.device != device:  # a new Parameter only where there is something to move
                    parameters[adapter_name] = nn.Parameter(value.detach().to(device), value.requires_grad)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that the adapter can become a LoRA; here exactly, see `polar.tuner.conversion`."""
        return True


class PolarLinear(nn.Module, PolarLayer):
    """A linear layer (`nn.Linear`, transformers' `Conv1D`, or a quantised one) with PoLAR adapters.

    Args:
        base_layer: the layer to wrap; it stays frozen and is called as it is.
        adapter_name: name of the first adapter.
        config: its configuration.
        r: its rank in this layer.
        alpha: its alpha in this layer.
        fan_in_fan_out: whether the base weight is stored (d_in, d_out), as in Conv1D.
        **kwargs: what the quantisation backend needs.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PolarConfig,
        r: int,
        alpha: float,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        PolarLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, alpha, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return base_layer(x) + s (x Y) Theta^T X^T.

        Args:
            x: (..., d_in). The adapter computes in x's dtype, or autocast's; x itself is never cast.
            *args: passed on to the base layer.
            **kwargs: passed on, except `adapter_names`: one adapter name (or "__base__") per row of a mixed batch.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._add_mixed(result, x, adapter_names)
        if not self.merged:
            for adapter in self.active_adapters:
                if adapter in self.polar_X:
                    result = self._add_adapter(result, x, adapter)
        return result

    def _add_adapter(self, result: torch.Tensor, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return result + s (x Y) Theta^T X^T with one output-sized tensor: the sum itself."""
        x = self.polar_dropout[adapter](x)
        field = self.backward_field[adapter]
        Y = field.attach(self.polar_Y[adapter], x.dtype).to(x.dtype)
        h = self._scale(x.reshape(-1, x.shape[-1]) @ Y, adapter)  # (tokens, r)
        X = field.attach(self.polar_X[adapter], h.dtype).to(h.dtype)
        if result.dtype == h.dtype:
            # One fused product and sum, out of place: ZeRO-3 and bitsandbytes return views that must not be written.
            return torch.addmm(result.reshape(-1, result.shape[-1]), h, X.mT).view(result.shape)
        # A result of higher precision than the activations (a base that leaves autocast) keeps its precision.
        return result + F.linear(h, X).view(result.shape).to(result.dtype)

    def _scale(self, h: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return s h Theta^T for h of shape (tokens, r); s is folded into Theta, which is the smaller of the two."""
        scaling = self.scaling[adapter]
        if adapter not in self.polar_Theta:
            return h * scaling
        Theta = (self.polar_Theta[adapter] * scaling).to(h.dtype)
        return h @ Theta.mT if Theta.dim() == 2 else h * Theta

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _add_mixed(self, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Add to each row of a batch the adapter that is named for it; "__base__" and unknown names add nothing."""
        result = result.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter not in self.polar_X:
                continue
            rows = [i for i, name in enumerate(adapter_names) if name == adapter]
            result[rows] = self._add_adapter(result[rows], x[rows], adapter)
        return result

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return dW = s X Theta Y^T in the shape of the base weight.

        Args:
            adapter: its name.

        Returns:
            (d_out, d_in) for `nn.Linear`, (d_in, d_out) for Conv1D; fp32. Under ZeRO-3 a collective.
        """
        with whole(self.parameters_of(adapter)):
            B, A = self.lora_factors(adapter)
            delta = B @ A
        return delta.mT.contiguous() if self.fan_in_fan_out else delta

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B = s X Theta, (d_out, r), and A = Y^T, (r, d_in), with dW = B A; no decomposition is needed.

        Both are at least fp32. Under ZeRO-3 the caller holds the factors whole.
        """
        X, Y, *_ = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.parameters_of(adapter))
        scaling = self.scaling[adapter]
        if adapter not in self.polar_Theta:
            return X * scaling, Y.mT
        Theta = self.polar_Theta[adapter].to(X.dtype) * scaling
        return (X @ Theta if Theta.dim() == 2 else X * Theta), Y.mT

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return [X, Y, Theta] of one adapter, without Theta where it is the identity."""
        names = ("polar_X", "polar_Y", "polar_Theta")
        return [getattr(self, name)[adapter] for name in names if adapter in getattr(self, name)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight.

        Args:
            safe_merge: check the new weight for NaN and infinity before it replaces the old one.
            adapter_names: the adapters to merge; the active ones when None.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.polar_X:
                self._change_base_weight(adapter, sign=1, safe=safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.polar_X:
                self._change_base_weight(adapter, sign=-1, safe=False)

    @torch.no_grad()
    def _change_base_weight(self, adapter: str, sign: int, safe: bool) -> None:
        delta = self.get_delta_weight(adapter)
        base = self.get_base_layer()
        with whole(base.parameters(recurse=False), writing=True):
            weight = self.get_base_weight()
            if self.quantization_backend is None and not safe:
                weight.add_(delta.to(weight.device), alpha=sign)  # the sum is formed in fp32 and rounded once
                return
            changed = torch.add(weight, delta.to(weight.device), alpha=sign).to(weight.dtype)
            if safe and not torch.isfinite(changed).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if self.quantization_backend is None:
                weight.copy_(changed)
            else:
                self.set_base_weight(changed)

    def _base_weight_as_matrix(self) -> torch.Tensor:
        with whole(self.get_base_layer().parameters(recurse=False)):
            weight = self.get_base_weight().detach().float().clone()
        return weight.mT if self.fan_in_fan_out else weight

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "polar." + super().__repr__()


def check_rank(r: int, d_in: int, d_out: int, layer: str) -> None:
    """Refuse a rank that no Stiefel manifold of this layer has.

    Args:
        r: the rank.
        d_in: input features.
        d_out: output features.
        layer: the layer's name for the message.

    Raises:
        UserError: r > min(d_in, d_out).
    """
    if r > min(d_in, d_out):
        raise UserError(
            f"r={r} is larger than min(d_in, d_out)={min(d_in, d_out)} of {layer} (d_in={d_in}, d_out={d_out}); "
            f"use r <= {min(d_in, d_out)}, give this module its own rank in rank_pattern, or exclude it"
        )


@torch.no_grad()
def restore_factor_dtype(model: nn.Module) -> int:
    """Bring adapter parameters that somebody cast to 16 bits back to fp32, and factors back to the manifold.

    TRL 1.16's SFTTrainer casts every trainable parameter of a quantised base to bf16 in its constructor. Outside of
    DeepSpeed no fp32 master exists then. Call this after such a cast and before the optimizer is made. The Parameter
    objects stay the same. Factors that were not orthonormal before the cast ("gaussian") are cast only. Parameters that
    ZeRO-3 has partitioned are left alone: their fp32 masters are DeepSpeed's.

    Args:
        model: a model with PoLAR adapters, or one without.

    Returns:
        The number of Stiefel factors that were not fp32.
    """
    num_restored = 0
    for layer in (m for m in model.modules() if isinstance(m, PolarLayer)):
        for name in layer.adapter_layer_names:
            for parameter in getattr(layer, name).values():
                if parameter.dtype not in (torch.bfloat16, torch.float16) or hasattr(parameter, "ds_id"):
                    continue
                value = parameter.detach().float()
                if name != "polar_Theta":
                    num_restored += 1
                    value = orthonormalise(value) if was_orthonormal(value) else value
                parameter.grad = None  # it has the old dtype
                parameter.data = value
    return num_restored
