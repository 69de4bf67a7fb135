"""The weight of a base layer, however it is kept: plain, partitioned by ZeRO-3, or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D


def find_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """Return PEFT's backend for a quantised layer (bitsandbytes 4-bit and 8-bit, HQQ, ...), None for a plain one.

    Args:
        base_layer: the layer that is adapted.
        **kwargs: what `peft.utils.quantization_utils.get_quantization_kwargs` found on the model.
    """
    # PEFT's lookup imports every quantisation library that is installed, which takes seconds: not for plain layers.
    weight = getattr(base_layer, "weight", None)
    if (
        type(base_layer) in (nn.Linear, Conv1D)
        and isinstance(weight, nn.Parameter)
        and type(weight.data) is torch.Tensor
    ):
        return None
    return resolve_quantization_backend(base_layer, **kwargs)


@contextmanager
def whole(parameters: Iterable[torch.Tensor], *, writing: bool = False) -> Iterator[None]:
    """Hold ZeRO-3 parameters whole inside the block; does nothing for others.

    A collective: every rank enters. With `writing`, what rank 0 left in the parameters is kept on all ranks.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    # PEFT's gather_params_ctx does nothing unless transformers' HfDeepSpeedConfig is alive, which a user's own loop
    # need not have. A parameter with a ds_id was made by deepspeed, so it is installed and imported already.
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writing else None):
        yield
