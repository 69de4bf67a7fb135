"""`polar convert`: any low-rank adapter as a PoLAR adapter with factors on the Stiefel manifold, or one of lower rank.

    dW = U S V^T  (polar.low_rank, from the factors)    ->    X = U,  Theta = S / s,  Y = V

LoRA becomes PoLAR exactly up to rounding, and so does an adapter of the paper's code, whose factors only lie near the
manifold. With a rank or a share of norm(dW)_F^2 the result is the best approximation, and its error is known from the
singular values that are left out. The way back is `polar export`, which is exact too.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polar.adapter_file import KEY_PREFIX, WEIGHTS_NAME, AdapterFile, AdapterModule, read_adapter, read_config
from polar.adapter_formats import LORALIB, check_low_rank, method_of, read_any_adapter
from polar.errors import UserError
from polar.export import check_output
from polar.files import atomic_directory, write_json
from polar.low_rank import ThinSvd, rank_for_energy, thin_svd, truncation_error
from polar.rank_file import pattern_keys
from polar.run_folder import installed_version
from polar.spectrum import ORTHONORMAL_TOLERANCE
from polar.templates import trained_template

# Fields that PoLAR and LoRA call by the same name: which modules of which base are adapted.
TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
BASE_FIELDS = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "fan_in_fan_out")


@dataclass(frozen=True)
class Reduced:
    """One module after a change of rank: its new factors, and norm(dW)_F before and of what was left out."""

    module: AdapterModule
    norm: float
    lost: float


def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    r: int | None = None,
    energy: float | None = None,
    lora_alpha: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an adapter as PoLAR, of rank `r` or of the smallest ranks that keep `energy` where one is given.

    Args:
        adapter: run folder, adapter folder or loralib file, see `polar.adapter_formats`.
        out: the new folder.
        r: largest rank of the result; modules of lower rank keep theirs. None: all of it.
        energy: share of norm(dW)_F^2 that each module keeps, in (0, 1].
        lora_alpha: alpha of a loralib file.
        overwrite: replace an existing `out`.

    Returns:
        What `polar_convert.json` in the folder holds.

    Raises:
        UserError: a broken adapter, one that is more than base + dW, a rank above the adapter's, nothing to do.
    """
    target = check_output(out, adapter, None, overwrite)
    source = read_any_adapter(Path(adapter), lora_alpha)
    check_low_rank(source)
    if source.config["peft_type"] == LORALIB and lora_alpha is None:
        raise UserError(f"{adapter}: alpha is not in the file; give the lora_alpha of its training with --alpha")
    _check_rank(source, r, energy)
    keeps_rank = r is None and energy is None
    is_on_manifold = all(m.orthonormality_error() < ORTHONORMAL_TOLERANCE for m in source.modules.values())
    if keeps_rank and is_on_manifold and read_config(source.folder)["peft_type"] == "POLAR":
        raise UserError(f"{source.folder}: is a PoLAR adapter on the manifold already; give --r or --energy")
    if keeps_rank and is_on_manifold and method_of(source) == "PoLAR":
        modules, theta, error = source.modules, source.config["theta"], 0.0
    else:
        reduced = {
            name: truncate(thin_svd(m.X, m.core(), m.Y), m.scaling, r, energy) for name, m in source.modules.items()
        }
        modules, theta = {name: item.module for name, item in reduced.items()}, "full"
        error = relative_error(reduced.values())
    ranks = [module.r for module in modules.values()]
    report = {
        "source": {"adapter": source.folder.name, "method": method_of(source), "sha256": source.sha256},
        "template": trained_template(source.folder),
        "num_modules": len(modules),
        "r": {"min": min(ranks), "max": max(ranks)},
        "relative_error": error,
        "notes": source.notes,
        "versions": {name: installed_version(name) for name in ("polar", "torch", "peft", "safetensors")},
    }
    with atomic_directory(target) as folder:
        write_polar(folder, modules, settings_of(source), source.other_tensors, theta)
        write_json(folder / "polar_convert.json", report)
    return report


def truncate(svd: ThinSvd, scaling: float, r: int | None = None, energy: float | None = None) -> Reduced:
    """Return a delta weight with X, Y in St(n, k) and a diagonal, full-shaped Theta: the best approximation of rank k.

    Args:
        svd: dW.
        scaling: s of the result.
        r: k is at most this.
        energy: k is the smallest rank that keeps this share of norm(dW)_F^2; with neither, k is all that there is.
    """
    k = svd.S.numel() if r is None else min(r, svd.S.numel())
    if energy is not None:
        k = min(k, rank_for_energy(svd.S, energy))
    norm = torch.linalg.vector_norm(svd.S).item()
    return Reduced(on_manifold(svd, k, scaling), norm, norm * truncation_error(svd.S, k))


def on_manifold(svd: ThinSvd, k: int, scaling: float) -> AdapterModule:
    """Return the k leading directions of a delta weight as factors on the manifold, in fp32.

    Args:
        svd: dW.
        k: rank.
        scaling: s, which is kept through alpha = s k, so that Theta keeps its size.
    """
    alpha = _alpha(scaling, k)
    Theta = torch.diag(svd.S[:k] / (alpha / k))
    factors = (svd.U[:, :k], Theta, svd.V[:, :k])
    X, Theta, Y = (factor.float().contiguous() for factor in factors)
    return AdapterModule(X, Theta, Y, alpha / k)


def relative_error(reduced: Collection[Reduced]) -> float:
    """Return norm(dW - dW_r)_F / norm(dW)_F over all modules together."""
    norm, lost = (math.hypot(*(getattr(item, part) for item in reduced)) for part in ("norm", "lost"))
    return lost / norm if norm > 0 else 0.0


def write_polar(
    folder: Path,
    modules: Mapping[str, AdapterModule],
    settings: Mapping[str, Any],
    other_tensors: Mapping[str, torch.Tensor],
    theta: str,
) -> None:
    """Write a PoLAR adapter into an existing folder and read it back.

    Args:
        folder: where to.
        modules: factors by module name; ranks and scales may differ.
        settings: further fields of its PolarConfig.
        other_tensors: modules_to_save, by parameter name.
        theta: full, diagonal or identity.

    Raises:
        UserError: the result is no valid adapter.
    """
    from safetensors.torch import save_file

    from polar.tuner import PolarConfig

    ranks = {name: module.r for name, module in modules.items()}
    alphas = {name: _alpha(module.scaling, module.r) for name, module in modules.items()}
    r = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    keys = pattern_keys(modules, list(modules))
    PolarConfig(
        r=r,
        alpha=alpha,
        theta=theta,  # type: ignore[arg-type]
        rank_pattern={keys[name]: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={keys[name]: value for name, value in alphas.items() if value != alpha},
        inference_mode=True,
        **settings,
    ).save_pretrained(str(folder))
    tensors = {KEY_PREFIX + name: value.contiguous() for name, value in other_tensors.items()}
    for name, module in modules.items():
        tensors |= {f"{KEY_PREFIX}{name}.polar_X": module.X, f"{KEY_PREFIX}{name}.polar_Y": module.Y}
        if module.Theta is not None:
            tensors[f"{KEY_PREFIX}{name}.polar_Theta"] = module.Theta
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS_NAME, {"format": "pt"})
    read_adapter(folder)


def settings_of(source: AdapterFile) -> dict[str, Any]:
    """Return what a PolarConfig takes over from an adapter of another method: targets, base, dropout."""
    config = source.config
    found = {name: config[name] for name in (*TARGET_FIELDS, *BASE_FIELDS) if config.get(name) is not None}
    return found | {"dropout": config.get("dropout", config.get("lora_dropout")) or 0.0}


def _check_rank(source: AdapterFile, r: int | None, energy: float | None) -> None:
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy {energy:g}: must be above 0 and at most 1, the share of norm(dW)_F^2 to keep")
    available = max(module.r for module in source.modules.values())
    if r is not None and not 1 <= r <= available:
        raise UserError(
            f"--r {r}: {source.folder} has rank {available}; give 1 to {available}, or leave --r out to keep all of it"
        )


def _alpha(scaling: float, r: int) -> int | float:
    """alpha = s r, as an integer where it is one up to rounding."""
    alpha = scaling * r
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar convert`."""
    text = "run or adapter folder: PoLAR (ours or the paper's code), LoRA, rsLoRA; or a loralib .bin file"
    parser.add_argument("adapter", metavar="ADAPTER", help=text)
    parser.add_argument("out", metavar="OUT", help="new folder, a PoLAR adapter; `polar export` makes LoRA of it")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--r", type=int, metavar="R", help="largest rank of the result (default: nothing is left out)")
    text = "keep the smallest ranks with this share of norm(dW)_F^2, module by module"
    choice.add_argument("--energy", type=float, metavar="SHARE", help=text)
    parser.add_argument("--alpha", type=float, metavar="A", help="lora_alpha of a loralib file, which does not say it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run(args: argparse.Namespace) -> None:
    """Run `polar convert` with parsed arguments."""
    report = convert(
        args.adapter, args.out, r=args.r, energy=args.energy, lora_alpha=args.alpha, overwrite=args.overwrite
    )
    print(f"{args.out}: PoLAR, {report['num_modules']} modules, r = {describe_ranks(report['r'])}")
    error = report["relative_error"]
    kept = "exact up to the rounding of fp32" if error == 0 else f"norm(dW - dW_r)_F is {error:.3g} of norm(dW)_F"
    print(f"from {report['source']['method']}: {kept}")
    for note in report["notes"]:
        print(f"note: {note}")


def describe_ranks(ranks: Mapping[str, int]) -> str:
    """Return `4` or `2 to 8`."""
    return f"{ranks['min']}" if ranks["min"] == ranks["max"] else f"{ranks['min']} to {ranks['max']}"
