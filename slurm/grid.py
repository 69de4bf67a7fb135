"""Grids of runs: their values, names and command line options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

SHORT = {"learning_rate": "lr", "landing_penalty": "lambda", "theta_learning_rate": "theta_lr"}
PLAIN = ("method", "task", "variant")  # their values speak for themselves, and come first in a run's name
NO_STIEFEL = ("lora", "dora", "rslora")  # methods to which keys of the manifold step mean nothing
MANIFOLD = ("manifold_step", "landing_penalty", "landing_convention", "theta_learning_rate", "reference_width")
TAKEN = ("output_dir", "resume", "overwrite")  # options of a run that the sweep itself gives


class SweepError(ValueError):
    """What a user can get wrong: one line that names value and fix."""


def read_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Read `KEY=V1,V2` words.

    Raises:
        SweepError: no value, a key or a value twice, or a key that the sweep itself gives.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        key, sign, text = word.partition("=")
        key, values = key.strip().removeprefix("--"), [value.strip() for value in text.split(",")]
        if not (key and sign and all(values)):
            raise SweepError(f"--grid {word}: write KEY=VALUE,VALUE, as in --grid learning_rate=4e-4,8e-4")
        if key in grid or len({_tidy(value) for value in values}) < len(values):
            raise SweepError(f"--grid {word}: a key or value is given twice: give each once")
        if key in TAKEN:
            raise SweepError(f"--grid {word}: the sweep gives --{key} itself: leave it out")
        grid[key] = values
    manifold = [key for key in MANIFOLD if len(grid.get(key, ())) > 1]
    baselines = [method for method in grid.get("method", ()) if method in NO_STIEFEL]
    if manifold and baselines:
        raise SweepError(
            f"{manifold[0]} means nothing to method {baselines[0]}, which would be trained {len(grid[manifold[0]])} "
            f"times over: submit {baselines[0]} apart, into the same --runs"
        )
    return grid


def runs_of(grid: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    """Return the values of each run by its name, which does not depend on the order of the keys.

    Raises:
        SweepError: two runs get one name.
    """
    keys = [key for key in PLAIN if key in grid] + sorted(set(grid) - {*PLAIN, "seed"}) + ["seed"] * ("seed" in grid)
    choices = [[(key, value) for value in grid[key]] for key in keys]
    runs: dict[str, dict[str, str]] = {}
    for values in map(dict, itertools.product(*choices)):
        name = run_name(values)
        if name in runs:
            raise SweepError(f"{values} and {runs[name]} would share the folder {name}: submit one of them apart")
        runs[name] = values
    return runs


def run_name(values: Mapping[str, str]) -> str:
    """Return a readable folder name, as in lora_boolq_r8_lr0.0004_seed0."""
    parts = []
    for key, value in values.items():
        prefix = "" if key in PLAIN else SHORT.get(key, key.rpartition(".")[2])
        parts.append(prefix + re.sub(r"[^\w.+-]+", "-", _tidy(value)))
    return "_".join(parts)


def _tidy(value: str) -> str:
    """Write numbers in one way: 4e-4 and 0.0004 are one run."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def arguments_of(values: Mapping[str, str]) -> list[str]:
    """Return the launcher's options for the values of a run."""
    return [word for key, value in values.items() for word in (f"--{key}", value)]
