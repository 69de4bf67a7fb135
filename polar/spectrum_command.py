"""`polar spectrum`: spectra of one or several adapters, or of a run's checkpoints, as table, CSV, JSON and plots.

spectrum.csv      a line per adapter (and step) and module: norm, stable rank, effective rank
spectrum.json     the same with all singular values, overlaps with their principal angles, and what was drawn
overlap.csv       a line per module and pair of adapters
*.png             stable_rank, singular_values, directions, overlap; with --checkpoints stable_rank_evolution
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from polar.adapter_file import AdapterFile
from polar.adapter_formats import check_same_base, method_of, read_any_adapter
from polar.base_weights import matches
from polar.checkpoint import list_checkpoints, step_of
from polar.errors import UserError
from polar.export import check_output
from polar.files import atomic_directory, write_json
from polar.plotting import ordered_types, require_matplotlib
from polar.run_folder import installed_version
from polar.spectrum import ModuleSpectrum, spectra_of
from polar.subspaces import DirectionMap, SubspaceOverlap, common_modules, compare_subspaces, direction_map

ALL = "all"


@dataclass(frozen=True)
class Measured:
    """One adapter, or one checkpoint of a run.

    Attributes:
        name: of the adapter or run, unique unless `step` tells them apart.
        step: of the checkpoint, None for an adapter.
        adapter: what was read.
        spectra: of its modules.
    """

    name: str
    step: int | None
    adapter: AdapterFile
    spectra: list[ModuleSpectrum]

    @property
    def r(self) -> int:
        """Largest adapter rank."""
        return max(spectrum.r for spectrum in self.spectra)

    @property
    def moved(self) -> list[ModuleSpectrum]:
        """Modules whose delta weight is not zero; others have no stable rank."""
        return [spectrum for spectrum in self.spectra if spectrum.norm > 0]


def measure(paths: Sequence[str], lora_alpha: float | None = None) -> list[Measured]:
    """Read adapters and compute their spectra.

    Args:
        paths: run folders, adapter folders or files, of one base.
        lora_alpha: of files that do not say it.

    Raises:
        UserError: a broken adapter, or adapters of different bases or without a module in common.
    """
    adapters = [read_any_adapter(path, lora_alpha) for path in paths]
    if len(adapters) > 1:
        check_same_base(adapters)
    names = _unique_names(paths)
    return [Measured(name, None, a, spectra_of(a)) for name, a in zip(names, adapters, strict=True)]


def measure_checkpoints(paths: Sequence[str]) -> list[Measured]:
    """Read every checkpoint of runs, and the final adapter where its step is known and has none.

    Raises:
        UserError: a folder without checkpoints, or a broken adapter in one.
    """
    found = []
    for path, name in zip(paths, _unique_names(paths), strict=True):
        run = Path(path)
        if not run.is_dir():
            raise UserError(f"run {path}: no such folder; --checkpoints wants the output_dir of a run")
        folders = {step_of(folder): folder for folder in list_checkpoints(run)}
        if not folders:
            raise UserError(
                f"run {path}: no checkpoint-N in it; train with save_strategy: steps, or leave --checkpoints out"
            )
        final = _final_step(run)
        if final is not None and (run / "adapter").is_dir():
            folders.setdefault(final, run / "adapter")
        for step, folder in sorted(folders.items()):
            adapter = read_any_adapter(folder)
            found.append(Measured(name, step, adapter, spectra_of(adapter)))
    if len(paths) > 1:
        check_same_base([item.adapter for item in found])
    return found


def write_results(
    measured: Sequence[Measured],
    folder: Path,
    overlaps: Sequence[SubspaceOverlap],
    maps: Mapping[str, Mapping[str, DirectionMap]],
    settings: Mapping[str, Any],
) -> None:
    """Write tables and plots into an existing folder."""
    _write_csv(folder / "spectrum.csv", [_module_row(item, s) for item in measured for s in item.spectra])
    if overlaps:
        _write_csv(folder / "overlap.csv", [_overlap_row(item) for item in overlaps])
    content = {
        "settings": dict(settings),
        "adapters": [_adapter_entry(item) for item in measured],
        "overlaps": [_overlap_entry(item) for item in overlaps],
        "directions": [
            {"module": m, "adapter": a, "mean_distance": _finite(found.mean), "num_rows": len(found.rows),
             "rows_of_dW": found.num_rows, "num_zero": found.num_zero}
            for m, by_adapter in maps.items() for a, found in by_adapter.items()
        ],
        "versions": {name: installed_version(name) for name in ("polar", "torch", "safetensors")},
    }  # fmt: skip
    write_json(folder / "spectrum.json", content)
    _draw(measured, folder, overlaps, maps)


def _draw(
    measured: Sequence[Measured],
    folder: Path,
    overlaps: Sequence[SubspaceOverlap],
    maps: Mapping[str, Mapping[str, DirectionMap]],
) -> None:
    from polar import spectrum_plots

    moved = [item for item in measured if item.moved]
    stable = {(item.name, item.step): [s.stable_rank for s in item.moved] for item in moved}
    if any(item.step is not None for item in measured):
        series: dict[str, dict[int, list[float]]] = {}
        for (name, step), values in stable.items():
            series.setdefault(name, {})[step or 0] = values
        if series:
            spectrum_plots.plot_stable_rank_evolution(series, folder / "stable_rank_evolution.png")
        moved = list({item.name: item for item in moved}.values())  # the last checkpoint of each run
    if moved:
        last = {item.name: stable[item.name, item.step] for item in moved}
        spectrum_plots.plot_stable_rank_boxes(last, folder / "stable_rank.png", {m.name: m.r for m in moved})
        curves = {item.name: [s.singular_values for s in item.moved] for item in moved}
        spectrum_plots.plot_singular_values(curves, folder / "singular_values.png")
    if overlaps:
        spectrum_plots.plot_overlaps(overlaps, folder / "overlap.png")
    if maps:
        spectrum_plots.plot_directions(maps, folder / "directions.png")


def direction_maps(
    measured: Sequence[Measured], modules: Sequence[str], max_rows: int, seed: int
) -> dict[str, dict[str, DirectionMap]]:
    """Return module -> adapter -> distances of the rows' directions.

    Args:
        measured: adapters.
        modules: names, endings or regular expressions of modules that all adapters have; empty: those whose stable rank
            is lowest, in the middle and highest in the first adapter.
        max_rows: rows that are drawn of a larger dW.
        seed: of the draw.

    Raises:
        UserError: an expression that selects no common module.
    """
    common = common_modules([item.adapter for item in measured])
    if modules:
        chosen = [name for name in common if any(matches(pattern, name) for pattern in modules)]
        if not chosen:
            raise UserError(f"--directions {' '.join(modules)}: no common module has that name, e.g. {common[0]} does")
    else:
        ranked = sorted((s.stable_rank, s.name) for s in measured[0].moved if s.name in common)
        chosen = list(dict.fromkeys(ranked[i][1] for i in (0, len(ranked) // 2, -1))) if ranked else []
    return {
        name: {item.name: direction_map(item.adapter.modules[name], max_rows, seed) for item in measured}
        for name in chosen
    }


def describe(measured: Sequence[Measured], overlaps: Sequence[SubspaceOverlap]) -> str:
    """Return what was measured as aligned text: a line per adapter and module type, then a line per pair."""
    header = ["adapter", "method", "modules", "r", "stable rank", "(min to max)", "effective rank", "norm of dW"]
    rows = []
    for item in measured:
        label = item.name if item.step is None else f"{item.name} step {item.step}"
        kinds = ordered_types([s.name for s in item.spectra]) if item.step is None else []
        for kind in [ALL, *(kinds if len(kinds) > 1 else [])]:
            of_kind = [s for s in item.spectra if kind in (ALL, s.name.rpartition(".")[2])]
            first = [label, method_of(item.adapter)] if kind == ALL else [f"  {kind}", ""]
            rows.append([*first, *_summary_cells(of_kind)])
    text = _table(header, rows)
    if overlaps:
        pairs = dict.fromkeys((o.first, o.second) for o in overlaps)
        lines = []
        for pair in pairs:
            chosen = [o for o in overlaps if (o.first, o.second) == pair]
            cells = [
                f"{_median(getattr(o, f'{side}_{value}') for o in chosen):.3f}"
                for side in ("left", "right") for value in ("overlap", "chance")
            ]  # fmt: skip
            lines.append([f"{pair[0]} and {pair[1]}", str(len(chosen)), *cells])
        text += "\n\n" + _table(["subspaces", "modules", "columns", "by chance", "rows", "by chance"], lines)
    return text


def _summary_cells(spectra: Sequence[ModuleSpectrum]) -> list[str]:
    ranks = sorted({s.r for s in spectra})
    r = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    moved = [s for s in spectra if s.norm > 0]
    if not moved:
        return [str(len(spectra)), r, "-", "(dW = 0)", "-", "0"]
    stable = [s.stable_rank for s in moved]
    effective, norm = median(s.effective_rank for s in moved), median(s.norm for s in moved)
    spread = f"({min(stable):.2f} to {max(stable):.2f})"
    return [str(len(spectra)), r, f"{median(stable):.2f}", spread, f"{effective:.2f}", f"{norm:.3g}"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = []
    for line in [header, *rows]:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)


def _median(values: Any) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return median(finite) if finite else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _module_row(item: Measured, spectrum: ModuleSpectrum) -> dict[str, Any]:
    return {
        "adapter": item.name,
        "step": "" if item.step is None else item.step,
        "module": spectrum.name,
        "d_out": spectrum.shape[0],
        "d_in": spectrum.shape[1],
        "r": spectrum.r,
        "norm": spectrum.norm,
        "largest_singular_value": spectrum.singular_values.max().item(),
        "stable_rank": spectrum.stable_rank,
        "effective_rank": spectrum.effective_rank,
    }


def _adapter_entry(item: Measured) -> dict[str, Any]:
    modules = {
        s.name: {
            "shape": list(s.shape), "r": s.r, "norm": s.norm, "stable_rank": s.stable_rank,
            "effective_rank": s.effective_rank, "singular_values": s.singular_values.tolist(),
        }
        for s in item.spectra
    }  # fmt: skip
    return {
        "name": item.name,
        "step": item.step,
        "method": method_of(item.adapter),
        "sha256": item.adapter.sha256,
        "base_model_name_or_path": item.adapter.config.get("base_model_name_or_path"),
        "median_stable_rank": median(s.stable_rank for s in item.moved) if item.moved else None,
        "median_effective_rank": median(s.effective_rank for s in item.moved) if item.moved else None,
        "num_zero_modules": len(item.spectra) - len(item.moved),
        "notes": item.adapter.notes,
        "modules": modules,
    }


def _overlap_row(item: SubspaceOverlap) -> dict[str, Any]:
    return {
        "module": item.module, "first": item.first, "second": item.second,
        "rank_first": item.ranks[0], "rank_second": item.ranks[1],
        "column_overlap": item.left_overlap, "column_chance": item.left_chance,
        "row_overlap": item.right_overlap, "row_chance": item.right_chance,
    }  # fmt: skip


def _overlap_entry(item: SubspaceOverlap) -> dict[str, Any]:
    row = {key: _finite(value) if isinstance(value, float) else value for key, value in _overlap_row(item).items()}
    sides = {"column": item.left, "row": item.right}
    return row | {f"{name}_angles_deg": torch.rad2deg(torch.acos(cosines)).tolist() for name, cosines in sides.items()}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _unique_names(paths: Sequence[str]) -> list[str]:
    """The run's folder name of each path; the path itself where two have the same."""
    names = []
    for path in paths:
        resolved = Path(path).resolve()
        name = resolved.stem if resolved.is_file() else resolved.name
        names.append(resolved.parent.name if name == "adapter" else name)
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _final_step(run: Path) -> int | None:
    """Step of the run's final adapter, from done.json; None where it is not there."""
    try:
        step = json.loads((run / "done.json").read_text(encoding="utf-8"))["adapter_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar spectrum`."""
    text = "run or adapter folders (PoLAR, LoRA, rsLoRA, DoRA, the paper's code) or loralib .bin files, of one base"
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=text)
    parser.add_argument("--out", metavar="DIR", help="folder of the tables and plots (default: print the table only)")
    parser.add_argument("--checkpoints", action="store_true", help="follow the checkpoints of each run instead")
    text = "modules whose rows' directions are drawn: names, endings or regular expressions (default: three of them)"
    parser.add_argument("--directions", nargs="+", metavar="MODULE", default=[], help=text)
    text = "rows drawn by seed of a larger dW (default: %(default)s)"
    parser.add_argument("--rows", type=int, metavar="N", default=256, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn (default: %(default)s)")
    parser.add_argument("--alpha", type=float, metavar="A", help="lora_alpha of loralib files, which do not say it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")


def run(args: argparse.Namespace) -> None:
    """Run `polar spectrum` with parsed arguments."""
    _check_arguments(args)
    measured = measure_checkpoints(args.adapters) if args.checkpoints else measure(args.adapters, args.alpha)
    compares = not args.checkpoints and len(measured) > 1
    overlaps = compare_subspaces({item.name: item.adapter for item in measured}) if compares else []
    print(describe(measured, overlaps))
    for note in dict.fromkeys(note for item in measured for note in item.adapter.notes):
        print(f"note: {note}")
    if args.out is None:
        return
    maps = {} if args.checkpoints else direction_maps(measured, args.directions, args.rows, args.seed)
    settings = {"rows": args.rows, "seed": args.seed, "alpha": args.alpha, "checkpoints": args.checkpoints}
    with atomic_directory(Path(args.out)) as folder:
        write_results(measured, folder, overlaps, maps, settings)
        drawn = sorted(path.name for path in folder.iterdir())
    print(f"{args.out}: {', '.join(drawn)}")


def _check_arguments(args: argparse.Namespace) -> None:
    if args.rows < 2:
        raise UserError(f"--rows {args.rows}: at least 2 rows have a distance")
    if args.checkpoints and args.directions:
        raise UserError("--directions goes with adapters, not with --checkpoints; pass one checkpoint folder instead")
    if args.alpha is not None and not any(Path(path).is_file() for path in args.adapters):
        raise UserError(f"--alpha {args.alpha:g}: adapter folders say their own alpha; leave it out")
    doubled = [path for path in args.adapters if args.adapters.count(path) > 1]
    if doubled:
        raise UserError(f"adapter {doubled[0]}: is given twice; give each one once")
    if args.out is not None:
        require_matplotlib()
        for path in args.adapters:
            check_output(args.out, path, None, args.overwrite)
