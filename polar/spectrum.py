"""Singular values and stable rank of every delta weight of a saved adapter, without ever forming a delta weight.

PoLAR: dW = X C Y^T with C = s Theta. While X and Y have orthonormal columns the singular values of dW are those of
the r x r matrix C. Otherwise, and for LoRA's dW = s B A, thin QR of both outer factors leaves an r x r core with the
same singular values. All arithmetic is in float64; the cost per module is O((d_out + d_in) r^2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from polar.adapter_file import KEY_PREFIX, WEIGHTS_NAME, find_adapter, module_scaling, read_adapter, read_config
from polar.errors import UserError

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


def stable_rank(singular_values: torch.Tensor) -> float:
    """Return sum(sigma^2) / max(sigma)^2 of (k,) singular values in any order; 0.0 if all are zero."""
    largest = singular_values.max().item()
    # Scaled first, so that tiny delta weights do not underflow when squared.
    return ((singular_values.double() / largest) ** 2).sum().item() if largest > 0 else 0.0


def product_singular_values(left: torch.Tensor, core: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the singular values of left core right^T.

    Args:
        left: (m, r), any dtype; neither orthonormal nor of full rank. m < r is allowed.
        core: (r, r).
        right: (n, r), like left.

    Returns:
        (r,) float64, descending, padded with zeros where min(m, n) < r.
    """
    r = core.shape[0]
    left_R = torch.linalg.qr(left.double(), mode="r").R
    right_R = torch.linalg.qr(right.double(), mode="r").R
    values = torch.linalg.svdvals(left_R @ core.double() @ right_R.T)
    return torch.nn.functional.pad(values, (0, r - values.numel()))


def adapter_spectrum(path: str | os.PathLike[str]) -> list[ModuleSpectrum]:
    """Return the spectrum of every adapted module of a saved PoLAR or LoRA adapter, in the order of their names.

    Args:
        path: a run folder or an adapter folder.

    Raises:
        UserError: no adapter there, a broken file, or a PEFT method other than POLAR and LORA.
    """
    folder = find_adapter(path)
    config = read_config(folder)
    if config["peft_type"] == "POLAR":
        spectra = _polar_spectra(folder)
    elif config["peft_type"] == "LORA":
        spectra = _lora_spectra(folder, config)
    else:
        raise UserError(f"{folder}: peft_type {config['peft_type']} has no spectrum here; pass a POLAR or LORA adapter")
    return sorted(spectra, key=lambda spectrum: spectrum.name)


def _polar_spectra(folder: Path) -> list[ModuleSpectrum]:
    spectra = []
    for name, module in read_adapter(folder).modules.items():
        if module.orthonormality_error() < ORTHONORMAL_TOLERANCE:
            values = torch.linalg.svdvals(module.core())
        else:
            values = product_singular_values(module.X, module.core(), module.Y)
        spectra.append(ModuleSpectrum(name, (module.d_out, module.d_in), values))
    return spectra


def _lora_spectra(folder: Path, config: dict[str, Any]) -> list[ModuleSpectrum]:
    if config.get("use_dora"):
        raise UserError(f"{folder}: use_dora rescales the whole weight, so its delta weight is not low-rank; pass LoRA")
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_NAME}: not readable ({error}); save the adapter again") from error
    suffix = ".lora_A.weight"
    spectra = []
    for key in (key for key in tensors if key.endswith(suffix)):
        stem = key.removesuffix(suffix)
        if f"{stem}.lora_B.weight" not in tensors:
            raise UserError(f"{folder / WEIGHTS_NAME}: {key} has no lora_B beside it; save the adapter again")
        A, B = tensors[key], tensors[f"{stem}.lora_B.weight"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
            raise UserError(f"{folder / WEIGHTS_NAME}: {stem} has {shapes}; need (r, d_in) and (d_out, r)")
        name = stem.removeprefix(KEY_PREFIX)
        scaling = module_scaling({**config, "alpha": config["lora_alpha"]}, name)
        values = scaling * product_singular_values(B, torch.eye(A.shape[0], dtype=torch.float64), A.T)
        spectra.append(ModuleSpectrum(name, (B.shape[0], A.shape[1]), values))
    if not spectra:
        raise UserError(f"{folder / WEIGHTS_NAME}: no lora_A tensors in it; save the adapter again")
    return spectra
