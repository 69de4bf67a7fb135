"""One picture of what `polar ranks` found: ranks, exponents and spikes by layer, and the spectra behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from polar.plotting import MARKERS, colour_of, new_figure, save_figure, tidy
from polar.rank_file import LAYER_NUMBER

if TYPE_CHECKING:
    from polar.ranks import LayerMeasure

Value = TypeVar("Value")
MAX_CELL_TEXT = 32  # columns up to which a cell has room for its number


def plot_ranks(ranks: dict[str, Any], measures: Sequence[LayerMeasure], path: Path) -> None:
    """Draw a rank file and the spectra behind it as PNG.

    Args:
        ranks: content of a rank file.
        measures: what `compute_ranks` returned with it.
        path: where to; its folder is made.
    """
    figure = new_figure(13, 8.5, dpi=110)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    types = by_type({measure.size.name: measure for measure in measures})
    draw_rank_map(figure, top_left, ranks)
    _draw_lines(top_right, types, lambda measure: measure.power_law.alpha, "alpha_hill (low: heavy tail)")
    _draw_lines(bottom_left, types, lambda measure: measure.num_spikes, "spikes above the Marchenko-Pastur edge")
    _draw_spectra(bottom_right, types)
    handles, labels = top_right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    number = sum(value["selected"] for value in ranks["modules"].values())
    figure.suptitle(
        f"{ranks['provenance']['model']}: {number} of {len(measures)} layers adapted,"
        f" {ranks['num_parameters']:,} {ranks['settings']['method']} parameters"
    )
    save_figure(figure, path)


def by_type(layers: Mapping[str, Value]) -> dict[str, dict[int, Value]]:
    """Sort what belongs to layers by their type and number.

    Args:
        layers: full name of the layer -> anything.

    Returns:
        Name without its layer number, shortened -> layer number -> the same; layers without a number count from 0.
    """
    types: dict[str, dict[int, Value]] = {}
    for full_name, value in layers.items():
        match = LAYER_NUMBER.fullmatch(full_name)
        name, layer = (match[3].lstrip("."), int(match[2])) if match else (full_name, 0)
        short = name.removesuffix("_proj").rpartition(".")[2] if match else name.rpartition(".")[2]
        key = short
        while layer in types.get(key, {}):  # another module of the same ending, such as a second tower
            key = f"{key}'"
        types.setdefault(key, {})[layer] = value
    return types


def draw_rank_map(figure: Any, axes: Any, ranks: dict[str, Any]) -> None:
    """Draw the ranks of a rank file: a row per type of layer, a column per layer number."""
    types = by_type({name: entry["r"] for name, entry in ranks["modules"].items()})
    layers = sorted({layer for found in types.values() for layer in found})
    values = torch.full((len(types), len(layers)), float("nan"))
    for row, found in enumerate(types.values()):
        for layer, r in found.items():
            if r is not None:
                values[row, layers.index(layer)] = r
    axes.set_facecolor("#e8e8e8")
    image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="adapter rank r")
    low, high = image.get_clim()
    for row, column in values.isfinite().nonzero().tolist() if len(layers) <= MAX_CELL_TEXT else []:
        value = values[row, column].item()
        # Near black and white: a page in dark colours may turn the exact ones around.
        colour = "#111111" if value > (low + high) / 2 else "#fdfdfd"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(types)), list(types))
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(title="ranks (grey: no adapter)", xlabel="layer")


def _draw_lines(axes: Any, types: dict[str, dict[int, LayerMeasure]], value: Any, label: str) -> None:
    for index, (name, found) in enumerate(types.items()):
        layers = sorted(found)
        axes.plot(
            layers,
            [value(found[layer]) for layer in layers],
            color=colour_of(index),
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    axes.set(title=label, xlabel="layer")
    axes.locator_params(axis="x", integer=True)
    if all(isinstance(value(measure), int) for found in types.values() for measure in found.values()):
        axes.locator_params(axis="y", integer=True)
    tidy(axes, "both")


def _draw_spectra(axes: Any, types: dict[str, dict[int, LayerMeasure]]) -> None:
    """Share of eigenvalues above x against x, by weight: a power law is a straight line of slope 1 - alpha."""
    for index, found in enumerate(types.values()):
        for measure in found.values():
            values = measure.spectrum.eigenvalues
            values = values[values > 0] / values.mean()
            share = torch.arange(values.numel(), 0, -1) / values.numel()
            axes.plot(values.numpy(), share.numpy(), color=colour_of(index), linewidth=0.8, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="eigenvalue of WᵀW / mean", title="share of eigenvalues above x")
    axes.set_xlim(left=1e-3)
    tidy(axes, "both")
