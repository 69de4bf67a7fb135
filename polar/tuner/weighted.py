"""`model.add_weighted_adapter` for PoLAR: the weighted sum of loaded adapters, with its factors on the manifold."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from polar.errors import UserError
from polar.low_rank import ThinSvd, thin_svd, weighted_sum
from polar.tuner.config import PolarConfig
from polar.tuner.layer import PolarLinear
from polar.tuner.quantized import whole

if TYPE_CHECKING:
    from polar.tuner.model import PolarModel


@torch.no_grad()
def add_weighted_adapter(
    model: PolarModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Literal["svd", "cat"],
    svd_rank: int | None,
) -> None:
    """Add the adapter sum_i weights[i] dW_i. See `PolarModel.add_weighted_adapter`."""
    _check_request(model, adapters, weights, adapter_name, combination_type)
    layers = {
        name: layer
        for name, layer in model.model.named_modules()
        if isinstance(layer, PolarLinear) and any(adapter in layer.polar_X for adapter in adapters)
    }
    sums = {name: _sum(layer, adapters, weights) for name, layer in layers.items()}
    limit = None if combination_type == "cat" else svd_rank or max(
        layer.r[adapter] for layer in layers.values() for adapter in adapters if adapter in layer.r
    )  # fmt: skip
    available = max(svd.S.numel() for svd in sums.values())
    if svd_rank is not None and not 1 <= svd_rank <= available:
        raise UserError(f"svd_rank is {svd_rank}: the ranks sum up to {available}; give 1 to {available}")
    ranks = {name: min(svd.S.numel(), limit or svd.S.numel()) for name, svd in sums.items()}
    alphas = {name: _scaling(layer, adapters) * ranks[name] for name, layer in layers.items()}
    model.peft_config[adapter_name] = _config(model.peft_config[adapters[0]], ranks, alphas)
    model.inject_adapter(model.model, adapter_name)
    for name, layer in layers.items():
        k, svd = ranks[name], sums[name]
        layer.polar_X[adapter_name].copy_(svd.U[:, :k])
        layer.polar_Theta[adapter_name].copy_(torch.diag(svd.S[:k] / layer.scaling[adapter_name]))
        layer.polar_Y[adapter_name].copy_(svd.V[:, :k])


def _sum(layer: PolarLinear, adapters: Sequence[str], weights: Sequence[float]) -> ThinSvd:
    terms, found = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in layer.polar_X:
            continue
        with whole(layer.parameters_of(adapter)):
            B, A = layer.lora_factors(adapter)
            terms.append((B.double(), torch.eye(len(A), dtype=torch.float64, device=A.device), A.mT.double()))
        found.append(weight)
    return thin_svd(*weighted_sum(terms, found))


def _scaling(layer: PolarLinear, adapters: Sequence[str]) -> float:
    """s of the first of the adapters that the layer has: the sum keeps it, so that Theta keeps its size."""
    return next(layer.scaling[adapter] for adapter in adapters if adapter in layer.scaling)


def _config(first: PolarConfig, ranks: dict[str, int], alphas: dict[str, float]) -> PolarConfig:
    r = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    # Full names select exactly these layers; ^ keeps a pattern from fitting the end of a longer name.
    return replace(
        first,
        r=r,
        alpha=alpha,
        theta="full",
        init_theta="zeros",
        init_factors="orthonormal",
        use_rslora=False,
        target_modules=sorted(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={f"^{_escape(name)}": rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{_escape(name)}": value for name, value in alphas.items() if value != alpha},
    )


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _check_request(
    model: PolarModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    if combination_type not in ("svd", "cat"):
        raise UserError(
            f"combination_type {combination_type!r}: PoLAR adapters are added exactly (cat) or by their best"
            " approximation of rank svd_rank (svd); use one of these"
        )
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"{len(weights)} weights for {len(adapters)} adapters; give one weight for each")
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown:
        raise UserError(f"adapter {unknown[0]!r} is not loaded; there are {', '.join(model.peft_config)}")
    if adapter_name in model.peft_config:
        raise UserError(f"adapter {adapter_name!r} exists already; delete_adapter() it or choose another name")
    saving = [name for name in adapters if model.peft_config[name].modules_to_save]
    if saving:
        raise UserError(f"adapter {saving[0]!r} trains modules_to_save, which cannot be added; leave it out")
