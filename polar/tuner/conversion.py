"""PoLAR to LoRA, exactly: B = s X Theta, A = Y^T."""

from __future__ import annotations

import torch
from peft.tuners.lora import conversion as peft_conversion
from peft.tuners.tuners_utils import BaseTunerLayer

from polar.tuner.layer import PolarLinear
from polar.tuner.quantized import whole


@torch.no_grad()
def convert_layer(
    layer: PolarLinear, rank: int | float, adapter_name: str = "default"
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the LoRA of one layer: A, (rank, d_in), B, (d_out, rank), and its rank.

    Args:
        layer: the layer.
        rank: an integer: the rank wanted. From r on upwards the result is exact (padded with zeros above r), below it
            is the best approximation of that rank. A float in (0, 1]: the smallest rank that keeps this share of
            ||dW||_F^2.
        adapter_name: which adapter.

    Raises:
        ValueError: an integer rank above min(d_in, d_out).
    """
    with whole(layer.parameters_of(adapter_name)):
        B, A = layer.lora_factors(adapter_name)
    limit = min(layer.in_features, layer.out_features)
    if isinstance(rank, int) and rank > limit:
        raise ValueError(
            f"The chosen rank {rank} is larger than the weight shape ({limit}), please choose a lower rank."
        )
    r = layer.r[adapter_name]
    if isinstance(rank, int) and rank >= r:
        A = torch.cat([A, A.new_zeros(rank - r, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - r)], dim=1)
        return A.contiguous(), B.contiguous(), rank
    # The singular values of B A are those of the r x r product of the triangular factors: no d_out x d_in matrix.
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    k = rank if isinstance(rank, int) else peft_conversion._find_cutoff_index(S, threshold=rank)
    B, A = Q_B @ (U[:, :k] * S[:k]), Vh[:k] @ Q_A.mT
    return A.contiguous(), B.contiguous(), k


def extend_peft_conversion() -> None:
    """Let `peft.convert_to_lora` and `save_as_lora` use `convert_layer` for our layers.

    PEFT 0.21.2 has no hook for this: it takes an SVD of every dense d_out x d_in delta (hours for 27B) and knows one
    exception by its class. So its function for one layer is wrapped; other tuners' layers go to the original.
    """
    current = peft_conversion._convert_module_to_lora
    original = getattr(current, "wrapped_by_polar", current)  # a second import must not wrap the wrapper

    def convert_module(
        module: BaseTunerLayer, rank: int | float, adapter_name: str = "default"
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        if isinstance(module, PolarLinear):
            return convert_layer(module, rank, adapter_name)
        return original(module, rank, adapter_name)

    convert_module.wrapped_by_polar = original  # type: ignore[attr-defined]
    peft_conversion._convert_module_to_lora = convert_module
