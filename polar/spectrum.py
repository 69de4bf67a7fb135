"""Singular values, stable rank and effective rank of every delta weight of a saved adapter.

PoLAR: dW = X C Y^T with C = s Theta. While X and Y have orthonormal columns the singular values of dW are those of
the r x r matrix C. Otherwise, and for LoRA's dW = s B A, thin QR of both outer factors leaves an r x r core with the
same singular values (`polar.low_rank`); no delta weight is ever formed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from polar.adapter_file import AdapterFile, AdapterModule
from polar.adapter_formats import read_any_adapter
from polar.low_rank import effective_rank, singular_values, stable_rank

# Retracted fp32 factors stay below 1e-5; then the core's singular values are dW's to about the same relative error.
ORTHONORMAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ModuleSpectrum:
    """The spectrum of one module's delta weight.

    Attributes:
        name: the module's name in the base model.
        shape: (d_out, d_in).
        singular_values: (r,) float64, descending; dW's other singular values are zero.
    """

    name: str
    shape: tuple[int, int]
    singular_values: torch.Tensor

    @property
    def r(self) -> int:
        """The adapter rank."""
        return self.singular_values.numel()

    @property
    def norm(self) -> float:
        """norm(dW)_F."""
        return torch.linalg.vector_norm(self.singular_values).item()

    @property
    def stable_rank(self) -> float:
        """norm(dW)_F^2 / norm(dW)_2^2, in [1, r]; 0.0 where dW = 0, which has no stable rank."""
        return stable_rank(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised singular values, in [1, r]; 0.0 where dW = 0."""
        return effective_rank(self.singular_values)


def adapter_spectrum(path: str | os.PathLike[str], lora_alpha: float | None = None) -> list[ModuleSpectrum]:
    """Return the spectrum of every adapted module of a saved PoLAR or LoRA adapter, in the order of their names.

    Args:
        path: run folder, adapter folder, or file, as of `polar.adapter_formats.read_any_adapter`.
        lora_alpha: alpha of a file that does not say it.

    Raises:
        UserError: no adapter there, a broken file, or a method that is no low-rank update.
    """
    return spectra_of(read_any_adapter(Path(path), lora_alpha))


def spectra_of(adapter: AdapterFile) -> list[ModuleSpectrum]:
    """Return the spectrum of every module of an adapter that was read, in the order of their names."""
    return [
        ModuleSpectrum(name, (module.d_out, module.d_in), _singular_values(module))
        for name, module in sorted(adapter.modules.items())
    ]


def _singular_values(module: AdapterModule) -> torch.Tensor:
    if module.orthonormality_error() < ORTHONORMAL_TOLERANCE:
        return torch.linalg.svdvals(module.core())
    return singular_values(module.X, module.core(), module.Y)
