"""`polar combine`: a weighted sum of adapters as one PoLAR adapter, its factors on the Stiefel manifold again.

    sum_i w_i dW_i = [X_1 X_2 ...] diag(w_1 C_1, w_2 C_2, ...) [Y_1 Y_2 ...]^T        C_i = s_i Theta_i

QR of the two stacked factors and one SVD of a small core give its singular value decomposition (`polar.low_rank`). With
the sum of the ranks, the default, the result is exact; a lower rank is the best approximation, with its error reported.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polar.adapter_file import AdapterFile, AdapterModule
from polar.adapter_formats import LORALIB, check_low_rank, check_same_base, method_of, read_any_adapter
from polar.convert import TARGET_FIELDS, Reduced, describe_ranks, relative_error, settings_of, truncate, write_polar
from polar.errors import UserError
from polar.export import check_output
from polar.files import atomic_directory, write_json
from polar.low_rank import thin_svd, weighted_sum
from polar.run_folder import installed_version
from polar.templates import trained_template


def combine(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    r: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the weighted sum of adapters of one base. A module that some lack is the sum over those that have it.

    Args:
        adapters: run or adapter folders, PoLAR or LoRA, of one base model.
        out: the new folder.
        weights: one per adapter, of any sign; None: their mean.
        r: largest rank of the result; None: the sum of the ranks, at most min(d_out, d_in), which is exact.
        overwrite: replace an existing `out`.

    Returns:
        What `polar_combine.json` in the folder holds.

    Raises:
        UserError: adapters of different bases, a rank above the sum, adapters that are more than base + dW.
    """
    for adapter in adapters:
        target = check_output(out, adapter, None, overwrite)
    weights = _check_weights(adapters, weights)
    sources = [read_any_adapter(Path(adapter)) for adapter in adapters]
    check_same_base(sources)
    for source in sources:
        _check_source(source)
    if r is not None:
        _check_available(sources, r)
    reduced = {name: _sum(sources, weights, name, r) for name in _all_modules(sources)}
    ranks = [item.module.r for item in reduced.values()]
    report = {
        "sources": [
            {"adapter": source.folder.name, "weight": weight, "method": method_of(source), "sha256": source.sha256}
            for source, weight in zip(sources, weights, strict=True)
        ],
        "template": _common([trained_template(source.folder) for source in sources]),
        "num_modules": len(reduced),
        "r": {"min": min(ranks), "max": max(ranks)},
        "relative_error": relative_error(reduced.values()),
        "notes": [note for source in sources for note in source.notes],
        "versions": {name: installed_version(name) for name in ("polar", "torch", "peft", "safetensors")},
    }
    modules = {name: item.module for name, item in reduced.items()}
    with atomic_directory(target) as folder:
        write_polar(folder, modules, _settings(sources, list(modules)), {}, "full")
        write_json(folder / "polar_combine.json", report)
    return report


def _all_modules(sources: Sequence[AdapterFile]) -> list[str]:
    return sorted({name for source in sources for name in source.modules})


def _sum(sources: Sequence[AdapterFile], weights: Sequence[float], name: str, r: int | None) -> Reduced:
    found = [
        (source.modules[name], weight)
        for source, weight in zip(sources, weights, strict=True)
        if name in source.modules
    ]
    terms = [(module.X, module.core(), module.Y) for module, _ in found]
    return truncate(thin_svd(*weighted_sum(terms, [weight for _, weight in found])), found[0][0].scaling, r)


def _check_weights(adapters: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if len(adapters) < 2:
        raise UserError(f"{len(adapters)} adapter is given; combine two or more, or use polar convert for one")
    if weights is None:
        return [1 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters):
        raise UserError(f"{len(weights)} weights for {len(adapters)} adapters; give one weight for each")
    for weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"weight {weight:g}: must be a finite number other than 0; leave the adapter out instead")
    return list(weights)


def _check_source(source: AdapterFile) -> None:
    check_low_rank(source)
    if source.config["peft_type"] == LORALIB:
        raise UserError(
            f"{source.folder}: is a loralib file; make a folder of it first: polar convert FILE OUT --alpha A"
        )
    if source.other_tensors:
        raise UserError(
            f"{source.folder}: holds {next(iter(source.other_tensors))} (modules_to_save), which cannot be"
            " added; combine adapters without modules_to_save"
        )


def _check_available(sources: Sequence[AdapterFile], r: int) -> None:
    available = max(
        min(sum(s.modules[name].r for s in sources if name in s.modules), *_shape(sources, name))
        for name in _all_modules(sources)
    )
    if not 1 <= r <= available:
        raise UserError(
            f"--r {r}: the ranks sum up to {available}; give 1 to {available}, or leave --r out for the exact sum"
        )


def _shape(sources: Sequence[AdapterFile], name: str) -> tuple[int, int]:
    module: AdapterModule = next(source.modules[name] for source in sources if name in source.modules)
    return module.d_out, module.d_in


def _settings(sources: Sequence[AdapterFile], modules: list[str]) -> dict[str, Any]:
    """Those of the first adapter; the modules by full name where the adapters do not select the same ones."""
    settings = settings_of(sources[0])
    if any(settings_of(source).get(name) != settings.get(name) for source in sources for name in TARGET_FIELDS):
        settings = {key: value for key, value in settings.items() if key not in TARGET_FIELDS}
        settings["target_modules"] = modules
    return settings


def _common(values: list[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar combine`."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="run or adapter folders of one base")
    parser.add_argument("--out", required=True, metavar="OUT", help="new folder, a PoLAR adapter")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per adapter, in order (default: their mean)"
    )
    text = "largest rank of the result (default: the sum of the ranks, which is exact)"
    parser.add_argument("--r", type=int, metavar="R", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def run(args: argparse.Namespace) -> None:
    """Run `polar combine` with parsed arguments."""
    report = combine(args.adapters, args.out, args.weights, r=args.r, overwrite=args.overwrite)
    terms = " + ".join(f"{source['weight']:.4g} x {source['adapter']}" for source in report["sources"])
    print(f"{args.out}: PoLAR, {report['num_modules']} modules, r = {describe_ranks(report['r'])}: {terms}")
    error = report["relative_error"]
    print(
        "exact up to the rounding of fp32"
        if error == 0
        else f"norm(dW - dW_r)_F is {error:.3g} of the exact sum's norm(dW)_F"
    )
    for note in report["notes"]:
        print(f"note: {note}")
