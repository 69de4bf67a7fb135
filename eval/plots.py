"""The report's plots. Each takes runs and a file name, and draws nothing when no run has the data.

matplotlib is used without pyplot: no display, no global state.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from polar.errors import UserError

if TYPE_CHECKING:
    from polar_eval.report import Run

# Okabe and Ito's colours, told apart by colour-blind readers too; the order of the runs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MODULE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def require_matplotlib() -> None:
    """Raise UserError where matplotlib is missing. Call it before anything is written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'polar[plots]'")


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
    types = _module_types(runs)
    figure, axes = _new_figure()
    width = 0.7 / len(runs)
    for index, (run, colour) in enumerate(_coloured(runs)):
        offset = (index - (len(runs) - 1) / 2) * width
        for position, module_type in enumerate(types):
            ranks = [s.stable_rank for s in run.spectra if s.name.rsplit(".", 1)[-1] == module_type]
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


def _module_types(runs: Sequence[Run]) -> list[str]:
    found = {s.name.rsplit(".", 1)[-1] for run in runs for s in run.spectra}
    return [name for name in MODULE_TYPES if name in found] + sorted(found - set(MODULE_TYPES))


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLOURS[index % len(COLOURS)]) for index, run in enumerate(runs)]


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    # Written under another name first, so that a reader never sees half a picture.
    temporary = path.with_name(f".{path.stem}.incomplete-{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
