"""Read an adapter back after it was written: files that look right and hold nothing have been published before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from polar.stiefel import full_precision


def check_saved_adapter(folder: Path, state: Mapping[str, Tensor], *, orthonormality_bound: float | None) -> None:
    """Compare `adapter_model.safetensors` in `folder` with the values that were to be saved.

    Args:
        folder: an adapter folder.
        state: every trainable parameter, whole, by its name in the model (with the adapter's name in it).
        orthonormality_bound: largest allowed ||X^T X - I||_F of polar_X and polar_Y, None where they need not be.

    Raises:
        RuntimeError: a tensor is missing, empty, of another shape, not finite, or off the manifold.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise RuntimeError("adapter_model.safetensors was not written")
    expected = sorted(tuple(value.shape) for value in state.values())
    found = []
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  safe_open is not a mapping
            value = file.get_tensor(key)
            found.append(tuple(value.shape))
            if value.numel() == 0:
                raise RuntimeError(f"{key} is empty")
            if not torch.isfinite(value).all():
                raise RuntimeError(f"{key} holds values that are not finite")
            if orthonormality_bound is not None and key.endswith((".polar_X", ".polar_Y")):
                error = _orthonormality_error(value)
                if error > orthonormality_bound:
                    raise RuntimeError(f"{key} is off the Stiefel manifold: ||X^T X - I||_F = {error:.2g}")
    if sorted(found) != expected:
        raise RuntimeError(f"{len(found)} tensors were saved where {len(expected)} are trained, or shapes differ")


def _orthonormality_error(factor: Tensor) -> float:
    X = factor.float()
    with full_precision():
        return torch.linalg.matrix_norm(X.mT @ X - torch.eye(X.shape[1])).item()
