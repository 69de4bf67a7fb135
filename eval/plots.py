"""The report's plots. Each takes runs and returns a figure, or None when no run has the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from polar.plotting import colour_of, module_type, new_figure, ordered_types, tidy
from polar.rank_plot import by_type, draw_rank_map
from polar_eval.read_runs import Run

WIDTH, HEIGHT = 5.2, 3.4  # inches: a phone shows the text of such a figure at a size that can be read
MAX_CURVES = 8  # as many as there are colours
LEGEND_ROWS = 3  # entries up to which the legend stands inside


def loss_figure(runs: Sequence[Run]) -> Any | None:
    """Training loss as lines, validation loss as dots, on a logarithmic axis."""
    curves = [run for run in runs if run.curve("loss")[0]][:MAX_CURVES]
    if not curves:
        return None
    figure, axes = _new_figure()
    positive = True
    for index, run in enumerate(curves):
        steps, values = run.curve("loss")
        axes.plot(steps, values, color=colour_of(index), linewidth=1.6, label=_short(run.name))
        positive = positive and min(values) > 0
        steps, values = run.curve("eval_loss")
        if steps:
            axes.plot(steps, values, color=colour_of(index), marker="o", markersize=5, linestyle="none",
                      markeredgecolor="white")  # fmt: skip
            positive = positive and min(values) > 0
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    return _finish(figure, axes)


def orthonormality_figure(runs: Sequence[Run]) -> Any | None:
    """Largest norm(X^T X - I)_F over the factors, by step."""
    curves = [(run, run.curve("orthonormality_error")) for run in runs]
    curves = [(run, curve) for run, curve in curves if curve[0]][:MAX_CURVES]
    if not curves:
        return None
    figure, axes = _new_figure()
    for index, (run, (steps, values)) in enumerate(curves):
        axes.plot(steps, values, color=colour_of(index), marker="o", markersize=3, linewidth=1.4,
                  label=_short(run.name))  # fmt: skip
    values = [max(value, 1e-9) for _, curve in curves for value in curve[1]]
    axes.set(xlabel="step", ylabel="largest ||XᵀX - I|| of the factors", yscale="log")
    # At least two decades, so that rounding noise does not look like a trend.
    axes.set_ylim(min(values) / 10, max(values) * 10)
    return _finish(figure, axes)


def logged_stable_rank_figure(runs: Sequence[Run]) -> Any | None:
    """Median stable rank of the modules, where the training logged it."""
    curves = [run for run in runs if run.curve("stable_rank")[0]][:MAX_CURVES]
    if not curves:
        return None
    figure, axes = _new_figure()
    for index, run in enumerate(curves):
        axes.plot(*run.curve("stable_rank"), color=colour_of(index), linewidth=1.6, label=_short(run.name))
    axes.set(xlabel="step", ylabel="median stable rank of dW")
    return _finish(figure, axes)


def module_type_figure(groups: Mapping[str, Sequence[Run]]) -> Any | None:
    """Stable ranks by module type: a dot per module, a bar at the median.

    Args:
        groups: name -> runs; the first MAX_CURVES are drawn.
    """
    shown = {name: runs for name, runs in list(groups.items())[:MAX_CURVES] if any(run.stable_ranks for run in runs)}
    if not shown:
        return None
    types = ordered_types([spectrum.name for runs in shown.values() for run in runs for spectrum in run.spectra])
    figure, axes = _new_figure(max(WIDTH, 0.75 * len(types)))
    width = 0.75 / len(shown)
    for index, (name, runs) in enumerate(shown.items()):
        moved = [spectrum for run in runs for spectrum in run.spectra if spectrum.norm > 0]
        for position, kind in enumerate(types):
            x = position + (index - (len(shown) - 1) / 2) * width
            ranks = [spectrum.stable_rank for spectrum in moved if module_type(spectrum.name) == kind]
            axes.plot([x] * len(ranks), ranks, color=colour_of(index), marker="o", markersize=4, alpha=0.5,
                      linestyle="none", markeredgewidth=0, label=_short(name) if position == 0 else None)  # fmt: skip
            if ranks:
                axes.hlines(median(ranks), x - width / 2.5, x + width / 2.5, colour_of(index), linewidth=2.5)
    axes.set(ylabel="stable rank of dW")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    labels = [name.removesuffix("_proj") for name in types]
    axes.set_xticks(range(len(types)), labels, rotation=0 if max(map(len, labels)) < 6 else 30)
    return _finish(figure, axes, inside=False)


def rank_figure(ranks: dict[str, Any]) -> Any:
    """Ranks by layer of a rank file, as a heat map."""
    types = by_type({name: name for name in ranks["modules"]})
    num_layers = len({layer for found in types.values() for layer in found})
    figure = new_figure(max(WIDTH, min(10, 1.8 + 0.33 * num_layers)), 1.3 + 0.36 * len(types))
    axes = figure.add_subplot()
    draw_rank_map(figure, axes, ranks)
    axes.set_title("")
    return figure


def _new_figure(width: float = WIDTH) -> tuple[Any, Any]:
    figure = new_figure(width, HEIGHT)
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, inside: bool = True) -> Any:
    tidy(axes)
    return with_legend(figure, axes, inside)


def with_legend(figure: Any, axes: Any, inside: bool = True) -> Any:
    """Return the figure with its legend: inside where that is allowed and it is small, else above."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    if inside and len(labels) <= LEGEND_ROWS and longest <= 20:
        axes.legend(frameon=False)
    else:
        columns = max(1, min(len(labels), 60 // (longest + 6)))
        look = {"frameon": False, "fontsize": 8, "markerscale": 1.4}
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, **look)
        figure.set_size_inches(figure.get_figwidth(), HEIGHT + 0.2 * (len(labels) // columns))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 44 else "..." + name[-41:]
