"""What every plot shares: colours, one look, and a picture on the disk whole or not at all.

matplotlib is used without pyplot: no display, no global state. It is imported only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from polar.errors import UserError
from polar.files import INCOMPLETE

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MODULE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in their usual order


def require_matplotlib() -> None:
    """Raise UserError where what plots need is missing. Call it before anything is computed or written."""
    for name in ("matplotlib", "scipy"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"plots need {name}: pip install 'polar[plots]'")


def new_figure(width: float = 7, height: float = 4, dpi: int = 130) -> Any:
    """Return an empty figure, sizes in inches, whose layout makes room for every label."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def tidy(axes: Any, grid: Literal["x", "y", "both"] = "y") -> None:
    """Take away the upper and right border and put a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def colour_of(index: int) -> str:
    """Return the colour of the index-th thing in a plot."""
    return COLOURS[index % len(COLOURS)]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, under another name first, so that a reader never sees half a picture; its folder is made.

    Args:
        figure: what to save; it may be saved several times.
        path: ends in .png, or in .svg: text stays text there, the background is the page's, and the same figure gives
            the same bytes.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}{INCOMPLETE}{os.getpid()}{path.suffix}")
    options: dict[str, Any] = {"facecolor": "none", "metadata": {"Date": None}} if path.suffix == ".svg" else {}
    try:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
            figure.savefig(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def module_type(name: str) -> str:
    """Return the last part of a module's name: q_proj, down_proj, ..."""
    return name.rpartition(".")[2]


def ordered_types(names: Sequence[str]) -> list[str]:
    """Return the types of the named modules, in their usual order, others by name after them."""
    found = {module_type(name) for name in names}
    return [name for name in MODULE_TYPES if name in found] + sorted(found - set(MODULE_TYPES))
