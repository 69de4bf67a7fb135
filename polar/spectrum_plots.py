"""Plots of spectra: stable ranks as boxes and over training, singular values, subspaces, directions of rows.

Each takes plain numbers by name, so that a report can draw them from whatever it has read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from polar.plotting import MARKERS, colour_of, module_type, new_figure, ordered_types, save_figure, tidy
from polar.subspaces import DirectionMap, SubspaceOverlap

MAX_LEGEND_NAME = 40
MAX_PANELS = 6
MAX_MAPS = 12


def plot_stable_rank_boxes(series: Mapping[str, Sequence[float]], path: Path, ranks: Mapping[str, int]) -> None:
    """Save `draw_stable_rank_boxes`."""
    save_figure(draw_stable_rank_boxes(series, ranks), path)


def draw_stable_rank_boxes(
    series: Mapping[str, Sequence[float]],
    ranks: Mapping[str, int],
    width: float = 7,
    row_height: float = 0.5,
    colours: Mapping[str, str] | None = None,
) -> Any:
    """Draw the stable ranks of each adapter's modules as a box (quartiles, median, whiskers to 1.5 IQR, outliers).

    Args:
        series: stable ranks of the modules, by adapter.
        ranks: adapter rank r, the largest possible value, drawn as a dash.
        width, row_height: of the figure and of each box's row, in inches.
        colours: of the boxes; None: a colour each.
    """
    figure = new_figure(width, 1.4 + row_height * len(series))
    axes = figure.add_subplot()
    names = list(series)[::-1]  # the first adapter at the top
    boxes = axes.boxplot(
        [list(series[name]) for name in names],
        orientation="horizontal",
        patch_artist=True,
        widths=0.6,
        medianprops={"color": "black", "linewidth": 1.8},
        flierprops={"markersize": 3, "markeredgewidth": 0.6},
    )
    for index, box in enumerate(boxes["boxes"]):
        colour = colours[names[index]] if colours is not None else colour_of(len(names) - 1 - index)
        box.set(facecolor=colour, alpha=0.55, linewidth=0.8)
    for position, name in enumerate(names, 1):
        axes.plot([ranks[name]] * 2, [position - 0.3, position + 0.3], color="black", linewidth=1.2, linestyle=":")
    axes.set_yticks(range(1, len(names) + 1), [_short(name) for name in names])
    axes.set_xlim(left=min(0.8, axes.get_xlim()[0]))
    axes.set(xlabel="stable rank of dW, one value per module (dotted: adapter rank r)")
    tidy(axes, "x")
    return figure


def plot_stable_rank_evolution(series: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Save `draw_stable_rank_evolution`."""
    save_figure(draw_stable_rank_evolution(series), path)


def draw_stable_rank_evolution(
    series: Mapping[str, Mapping[int, Sequence[float]]], width: float = 7, height: float = 4
) -> Any:
    """Draw the median stable rank over training, with a band between the quartiles of the modules.

    Args:
        series: step -> stable ranks of the modules, by run.
        width, height: of the figure, in inches.
    """
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    for index, (name, by_step) in enumerate(series.items()):
        steps = sorted(by_step)
        low, middle, high = np.transpose([np.quantile(by_step[step], [0.25, 0.5, 0.75]) for step in steps])
        axes.fill_between(steps, low, high, color=colour_of(index), alpha=0.2, linewidth=0)
        marker = MARKERS[index % len(MARKERS)] if len(steps) < 40 else None
        axes.plot(steps, middle, color=colour_of(index), marker=marker, markersize=4, linewidth=1.8, label=_short(name))
    axes.set(xlabel="step", ylabel="stable rank of dW (median, quartiles)")
    axes.locator_params(axis="x", integer=True)
    tidy(axes)
    axes.legend(frameon=False)
    return figure


def plot_singular_values(series: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Draw sigma_i / sigma_1 against i: the median over the modules, with a band between their quartiles.

    Args:
        series: singular values of the modules, descending, by adapter; zero delta weights left out.
        path: PNG.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for index, (name, spectra) in enumerate(series.items()):
        r = max(len(values) for values in spectra)
        padded = np.full((len(spectra), r), np.nan)
        for row, values in zip(padded, spectra, strict=True):
            row[: len(values)] = (values / values[0]).numpy()
        low, middle, high = np.nanquantile(padded, [0.25, 0.5, 0.75], axis=0)
        x = np.arange(1, r + 1)
        axes.fill_between(x, low, high, color=colour_of(index), alpha=0.2, linewidth=0)
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(x, middle, color=colour_of(index), marker=marker, markersize=3.5, linewidth=1.6, label=_short(name))
    axes.set(xlabel="i", ylabel="σᵢ / σ₁ of dW (median, quartiles)", ylim=(0, 1.05))
    axes.locator_params(axis="x", integer=True)
    tidy(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_overlaps(overlaps: Sequence[SubspaceOverlap], path: Path) -> None:
    """Draw the overlap of each pair of adapters by module type: a dot per layer, a bar at the median, dashes at chance.

    Args:
        overlaps: what `compare_subspaces` returned; the first MAX_PANELS pairs are drawn.
        path: PNG.
    """
    pairs = list(dict.fromkeys((item.first, item.second) for item in overlaps))[:MAX_PANELS]
    types = ordered_types([item.module for item in overlaps])
    figure = new_figure(max(7, 1.2 + 2.2 * len(types) ** 0.9), 3.9)
    width = 0.75 / len(pairs)
    largest = max((v for o in overlaps for v in (o.left_overlap, o.right_overlap) if v == v), default=1.0)
    top = min(1.02, max(0.1, 1.2 * largest))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, side, title in zip(panels, ("left", "right"), ("column spaces", "row spaces"), strict=True):
        for index, pair in enumerate(pairs):
            shift = (index - (len(pairs) - 1) / 2) * width
            for position, kind in enumerate(types):
                chosen = [o for o in overlaps if (o.first, o.second) == pair and module_type(o.module) == kind]
                _draw_dots(axes, chosen, side, position + shift, width, colour_of(index))
            axes.plot([], [], "o", color=colour_of(index), label=f"{_short(pair[0])} and {_short(pair[1])}")
        axes.plot([], [], color="black", linewidth=1.3, linestyle=":", label="random spaces")
        axes.set(title=title, ylim=(0, top))
        axes.set_xticks(range(len(types)), [name.removesuffix("_proj") for name in types])
        tidy(axes)
    panels[0].set_ylabel("mean squared cosine")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2), frameon=False)
    save_figure(figure, path)


def _draw_dots(axes: Any, chosen: Sequence[SubspaceOverlap], side: str, x: float, width: float, colour: str) -> None:
    values = [getattr(item, f"{side}_overlap") for item in chosen]
    if not values:
        return
    chance = median(getattr(item, f"{side}_chance") for item in chosen)
    axes.plot([x] * len(values), values, "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
    axes.hlines(median(values), x - width / 2.5, x + width / 2.5, colour, linewidth=2.5)
    axes.hlines(chance, x - width / 2, x + width / 2, "black", linewidth=1.3, linestyle=":", zorder=4)


def plot_directions(maps: Mapping[str, Mapping[str, DirectionMap]], path: Path) -> None:
    """Draw the distances between directions of rows as heat maps: a row per module, a column per adapter.

    Args:
        maps: module -> adapter -> map; the same adapters for each module. The first MAX_MAPS modules and MAX_PANELS
            adapters are drawn; those of a single adapter one after the other.
        path: PNG.
    """
    modules = list(maps)[:MAX_MAPS]
    adapters = list(maps[modules[0]])[:MAX_PANELS]
    panels = [(module, adapter) for module in modules for adapter in adapters]
    columns = len(adapters) if len(adapters) > 1 else min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(1.4 + 2.7 * columns, 0.3 + 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (module, adapter) in zip(grid.flat, panels, strict=False):
        found = maps[module][adapter]
        image = axes.imshow(found.distances.numpy(), vmin=0, vmax=2, cmap="viridis", interpolation="nearest")
        numbers = f"stable rank {found.stable_rank:.2f}, mean distance {found.mean:.2f}"
        axes.set_title(f"{_short(adapter)}\n{_tail(module)}\n{numbers}", fontsize=8)
        axes.set_xlabel(_rows_of(found), fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(image, ax=grid, aspect=14, shrink=0.8 / rows, pad=0.02, ticks=[0, 2**0.5, 2])
    bar.ax.set_yticklabels(["0 same", "√2 orthogonal", "2 opposite"], fontsize=8)
    save_figure(figure, path)


def _rows_of(found: DirectionMap) -> str:
    looked_at = len(found.rows) + found.num_zero
    shown = f"all {looked_at:,}" if looked_at == found.num_rows else f"{looked_at:,} of {found.num_rows:,}"
    drawn = "" if looked_at == found.num_rows else " drawn by seed,"
    zero = f" {found.num_zero} zero left out," if found.num_zero else ""
    return f"{shown} rows of dW,{drawn}{zero} clustered"


def _short(name: str) -> str:
    return name if len(name) <= MAX_LEGEND_NAME else "..." + name[3 - MAX_LEGEND_NAME :]


def _tail(module: str) -> str:
    """The end of a module's name that says layer and type: layers.3.self_attn.q_proj -> 3.self_attn.q_proj."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] :]) if numbers else parts[-1]
