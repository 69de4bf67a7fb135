"""The report's plots. Each takes runs and a file name, and draws nothing when no run has the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from polar.plotting import colour_of, module_type, new_figure, ordered_types, save_figure, tidy

if TYPE_CHECKING:
    from polar_eval.report import Run


def plot_loss(runs: Sequence[Run], path: Path) -> bool:
    """Training loss as lines, validation loss as dots, both on a logarithmic axis. Returns whether it was drawn."""
    if not any(run.curve("loss")[0] for run in runs):
        return False
    figure, axes = _new_figure()
    for run, colour in _coloured(runs):
        axes.plot(*run.curve("loss"), color=colour, linewidth=1.6, label=f"{run.name}, training")
        steps, values = run.curve("eval_loss")
        if steps:
            axes.plot(steps, values, color=colour, marker="o", markersize=6, linestyle="none",
                      markeredgecolor="white", label=f"{run.name}, validation")  # fmt: skip
    axes.set(xlabel="step", ylabel="loss per response token", yscale="log")
    _finish(figure, axes, path)
    return True


def plot_orthonormality_error(runs: Sequence[Run], path: Path) -> bool:
    """Largest norm(X^T X - I)_F over the factors, by step. Returns whether any run has it."""
    curves = [(run, colour, run.curve("orthonormality_error")) for run, colour in _coloured(runs)]
    curves = [(run, colour, curve) for run, colour, curve in curves if curve[0]]
    if not curves:
        return False
    figure, axes = _new_figure()
    for run, colour, (steps, values) in curves:
        axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.6, label=run.name)
    values = [max(value, 1e-9) for _, _, curve in curves for value in curve[1]]
    # At least two decades, so that rounding noise does not look like a trend.
    axes.set(xlabel="step", ylabel="largest ||XᵀX - I|| over the factors", yscale="log")
    axes.set_ylim(min(values) / 10, max(values) * 10)
    _finish(figure, axes, path)
    return True


def plot_stable_rank(runs: Sequence[Run], path: Path) -> bool:
    """One dot per adapted module, by module type; a bar marks the median. Returns whether any run has spectra."""
    runs = [run for run in runs if run.spectra]
    if not runs:
        return False
    types = ordered_types([spectrum.name for run in runs for spectrum in run.spectra])
    figure, axes = _new_figure()
    width = 0.7 / len(runs)
    for index, (run, colour) in enumerate(_coloured(runs)):
        offset = (index - (len(runs) - 1) / 2) * width
        for position, kind in enumerate(types):
            ranks = [s.stable_rank for s in run.spectra if module_type(s.name) == kind]
            label = f"{run.name} (r = {run.r})" if position == 0 else None
            axes.plot([position + offset] * len(ranks), ranks, color=colour, marker="o", markersize=5, alpha=0.6,
                      linestyle="none", markeredgewidth=0, label=label)  # fmt: skip
            if ranks:
                axes.hlines(
                    median(ranks),
                    position + offset - width / 2.5,
                    position + offset + width / 2.5,
                    colour,
                    linewidth=2.5,
                )
    axes.set(ylabel="stable rank of the delta weight")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
    axes.set_xticks(range(len(types)), [name.removesuffix("_proj") for name in types])
    axes.set_xlabel("module type (dots: layers, bar: median)")
    _finish(figure, axes, path)
    return True


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, colour_of(index)) for index, run in enumerate(runs)]


def _new_figure() -> tuple[Any, Any]:
    figure = new_figure()
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    tidy(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)
