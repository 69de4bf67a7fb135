"""Adaptive ranks: choose each layer's adapter rank from the spectrum of its weight (`polar ranks`).

weights -> eigenvalues -> alpha_hill and Marchenko-Pastur spikes -> composite score -> selected layers -> ranks -> a
file that PoLAR, LoRA, QLoRA, rsLoRA and DoRA take alike.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from polar.base_checkpoint import describe_base
from polar.base_spectra import Precision, SpectrumCache, WeightSpectrum, read_spectra
from polar.base_weights import find_weights
from polar.errors import UserError
from polar.files import write_json
from polar.heavy_tails import FitName, PowerLawFit, count_spikes, fit_power_law
from polar.rank_allocation import (
    LayerSize,
    RankBounds,
    composite_scores,
    num_parameters,
    rank_positions,
    ranks_by_budget,
    ranks_by_formula,
    select_layers,
    uniform_budget,
)
from polar.rank_file import FORMAT, pattern_keys, read_rank_file, target_pattern
from polar.rank_settings import RankSettings, add_setting_arguments, parse_budget
from polar.run_folder import installed_version, source_commit


@dataclass(frozen=True)
class LayerMeasure:
    """What the spectrum of one weight says."""

    size: LayerSize
    spectrum: WeightSpectrum
    power_law: PowerLawFit
    num_spikes: int


def compute_ranks(
    model: str,
    settings: RankSettings | None = None,
    *,
    revision: str | None = None,
    precision: Precision = "auto",
    device: str = "cpu",
    workers: int | None = None,
    cache: Path | None = None,
) -> tuple[dict[str, Any], list[LayerMeasure]]:
    """Measure a base model's weights and choose ranks.

    Args:
        model: a folder or a hub id, with unquantised safetensors.
        settings: how spectra become ranks.
        revision: hub branch, tag or commit.
        precision: of the Gram matrices. "auto" is float32 where that gives alpha_hill to 1e-5, else float64; the fits
            that search below the median use float64 throughout.
        device: cpu or cuda.
        workers: weights worked on at once; None: one per core on a CPU, two on a GPU (one reads, one computes).
        cache: folder of spectra; None keeps none.

    Returns:
        The content of a rank file, and the measures behind it in the order of the modules.

    Raises:
        UserError: whatever the user can fix, before anything is written.
    """
    settings = settings or RankSettings()
    workers = workers or (_num_cores() if device == "cpu" else 2)
    base = describe_base(model, revision)
    weights = find_weights(base, revision, settings.include, settings.exclude)
    sizes = [LayerSize(w.name, base.linears[w.name].d_out, base.linears[w.name].d_in) for w in weights]
    if precision == "auto" and settings.fit != "median":
        precision = "float64"
    kept = SpectrumCache(cache)
    read = read_spectra(weights, precision, device, workers, kept)
    spectra = [read.spectra[weight.name] for weight in weights]
    identity = [read.file_hashes, precision, settings.fit, [weight.name for weight in weights]]
    fits = kept.fits(identity, lambda: _fit(sizes, spectra, settings.fit, workers))
    measures = [
        LayerMeasure(size, spectrum, fit, count_spikes(spectrum.eigenvalues, size.longer, settings.tracy_widom))
        for size, spectrum, fit in zip(sizes, spectra, fits, strict=True)
    ]
    ranks = allocate(measures, settings)
    module_names = {name for name, _ in base.model.named_modules()}
    provenance = {
        "model": Path(model).name if Path(model).is_dir() else model,
        "revision": revision,
        "files_sha256": read.file_hashes,
        "precision": precision,
        "num_cached": read.num_cached,
        "versions": {name: installed_version(name) for name in ("polar", "torch", "transformers", "peft")},
        "commit": source_commit(),
    }
    return rank_file(measures, ranks, settings, module_names, provenance), measures


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fit(
    sizes: Sequence[LayerSize], spectra: Sequence[WeightSpectrum], fit: FitName, workers: int
) -> list[PowerLawFit]:
    def one(size: LayerSize, spectrum: WeightSpectrum) -> PowerLawFit:
        try:
            law = fit_power_law(spectrum.eigenvalues, fit, spectrum.rounding)
        except UserError as error:
            raise UserError(f"{size.name}: {error}: --exclude {size.name}") from error
        if law.alpha == float("inf"):
            raise UserError(f"{size.name}: all its singular values are equal, so it has no tail: --exclude {size.name}")
        return law

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, sizes, spectra))


def allocate(measures: Sequence[LayerMeasure], settings: RankSettings) -> list[int | None]:
    """Return the rank of every layer, None where it gets no adapter.

    Raises:
        UserError: bounds that cannot meet the budget.
    """
    scores = _scores(measures, settings)
    chosen = select_layers(scores, settings.fraction, settings.selection)
    positions = rank_positions([scores[i] for i in chosen], settings.mapping)
    sizes = [measures[i].size for i in chosen]
    bounds = RankBounds(settings.r_min, settings.r_max, settings.multiple_of)
    budget = budget_parameters(settings, sizes)
    if budget is None:
        ranks = ranks_by_formula(positions, sizes, bounds)
    else:
        ranks = ranks_by_budget(positions, sizes, bounds, budget, settings.method)
    by_index = dict(zip(chosen, ranks, strict=True))
    return [by_index.get(i) for i in range(len(measures))]


def budget_parameters(settings: RankSettings, sizes: Sequence[LayerSize]) -> int | None:
    """Return the budget as a number of parameters; None where there is none."""
    if settings.budget is None:
        return None
    r, parameters = parse_budget(settings.budget)
    return uniform_budget(r, sizes, settings.method) if r else parameters


def _scores(measures: Sequence[LayerMeasure], settings: RankSettings) -> list[float]:
    alphas = [measure.power_law.alpha for measure in measures]
    spikes = [measure.num_spikes for measure in measures]
    return composite_scores(alphas, spikes, settings.w_hill, settings.w_spikes)


def rank_file(
    measures: Sequence[LayerMeasure],
    ranks: Sequence[int | None],
    settings: RankSettings,
    module_names: set[str],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of a rank file. `r` and `alpha` are the largest, since servers read r and no patterns."""
    modules: dict[str, Any] = {}
    selected: dict[str, int] = {}
    total = 0
    for measure, score, r in zip(measures, _scores(measures, settings), ranks, strict=True):
        size, law = measure.size, measure.power_law
        modules[size.name] = {
            "selected": r is not None,
            "r": r,
            "alpha": None if r is None else _alpha(settings, r),
            "score": score,
            "alpha_hill": law.alpha,
            "x_min": law.x_min,
            "num_tail": law.num_tail,
            "ks_distance": law.ks_distance,
            "num_spikes": measure.num_spikes,
            "shape": [size.d_out, size.d_in],
            "precision": measure.spectrum.precision,
        }
        if r is not None:
            selected[size.name] = r
            total += num_parameters(r, size, settings.method)
    keys = pattern_keys(selected, module_names)
    sizes = [measure.size for measure in measures if measure.size.name in selected]
    return {
        "format": FORMAT,
        "r": max(selected.values()),
        "alpha": _alpha(settings, max(selected.values())),
        "target_modules": target_pattern(selected),
        "rank_pattern": {keys[name]: r for name, r in selected.items()},
        "alpha_pattern": {keys[name]: _alpha(settings, r) for name, r in selected.items()},
        "num_parameters": total,
        "budget": budget_parameters(settings, sizes),
        "settings": dataclasses.asdict(settings),
        "provenance": provenance,
        "modules": modules,
    }


def _alpha(settings: RankSettings, r: int) -> int | float:
    """alpha_factor * r, as an integer where it is one: PEFT declares lora_alpha so."""
    alpha = settings.alpha_factor * r
    return int(alpha) if alpha == int(alpha) else alpha


def default_cache() -> Path:
    """Folder of spectra: $POLAR_CACHE/spectra, else polar/spectra in the user's cache folder."""
    if os.environ.get("POLAR_CACHE"):
        return Path(os.environ["POLAR_CACHE"]) / "spectra"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polar" / "spectra"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `polar ranks`."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of the base model, unquantised safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the rank file to write, JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw spectra and ranks by layer")
    parser.add_argument("--revision", help="hub branch, tag or commit")
    add_setting_arguments(parser)
    group = parser.add_argument_group("computation")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where Gram matrices are made")
    text = "weights worked on at once, each by a thread of its own (one per core)"
    group.add_argument("--processes", "--workers", type=int, dest="workers", metavar="N", help=text)
    text = "of the Gram matrices; auto is float32 where alpha_hill is right to 1e-5"
    group.add_argument("--precision", choices=get_args(Precision), default="auto", help=text)
    group.add_argument("--cache", type=Path, default=default_cache(), help="folder of spectra (%(default)s)")
    group.add_argument("--no_cache", action="store_const", const=None, dest="cache", help="keep no spectra")


def run(arguments: argparse.Namespace) -> None:
    """Write the rank file, and the plot where one is asked for."""
    start = time.monotonic()
    settings = RankSettings(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(RankSettings)}
    )
    _check_run(arguments)
    if arguments.plot is not None:
        from polar.plotting import require_matplotlib
        from polar.rank_plot import plot_ranks

        require_matplotlib()
    content, measures = compute_ranks(
        arguments.model,
        settings,
        revision=arguments.revision,
        precision=arguments.precision,
        device=arguments.device,
        workers=arguments.workers,
        cache=arguments.cache,
    )
    if arguments.plot is not None:
        plot_ranks(content, measures, arguments.plot)
    write_json(arguments.out, content)
    selected = [value["r"] for value in content["modules"].values() if value["selected"]]
    budget = "" if content["budget"] is None else f" of {content['budget']:,}"
    print(
        f"{len(measures)} weights ({content['provenance']['num_cached']} from the cache), {len(selected)} selected"
        f" ({settings.selection}, fraction {settings.fraction}); ranks {min(selected)} to {max(selected)},"
        f" {content['num_parameters']:,}{budget} {settings.method} parameters; {arguments.out} written"
        f" after {time.monotonic() - start:.1f} s"
    )


def _check_run(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--processes {arguments.workers}: must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    for path, kind in ((arguments.out, "rank file"), (arguments.plot, "plot")):
        if path is not None and path.is_dir():
            raise UserError(f"{kind} {path} is a folder; name a file in it")
    if arguments.out.is_file():
        read_rank_file(arguments.out)  # only a rank file is replaced
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise UserError(
            f"--plot {arguments.plot}: only PNG is drawn; name it {arguments.plot.with_suffix('.png').name}"
        )
