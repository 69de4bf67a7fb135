"""What benchmarks/convergence.py found: comparison with the shipped default, plots, and the README's lines about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polar.plotting import colour_of, new_figure, save_figure, tidy

Found = dict[str, Any]  # what `convergence.summarise` stores of one method on one problem

DEFAULT = "retract_polar AdamW"
CLEAR = 0.95  # a method is clearly better if it is better for every seed and its median ratio is below
THRESHOLD = 4.0  # loss whose steps are counted, as a multiple of the default's median final loss
LOWEST = 1e-12  # loss that a plot shows: below is the rounding of fp32
TABLE = (
    DEFAULT,
    "retract_qr AdamW",
    "retract_polar StiefelAdamW",
    "retract_polar project_momentum AdamW",
    "retract_polar project_momentum StiefelAdamW",
    "retract_polar reference_width AdamW",
    "retract_polar SGD",
    "landing AdamW",
    "landing_nxn AdamW",
    "euclidean_penalty AdamW",
    "none AdamW",
    "lora AdamW",
)
# What differs from the default in one thing.
ONE_CHANGE = (
    "retract_qr AdamW",
    "landing AdamW",
    "euclidean_penalty AdamW",
    "none AdamW",
    "retract_polar SGD",
    "retract_polar StiefelAdamW",
    "retract_polar project_momentum AdamW",
    "retract_polar reference_width AdamW",
)
# Colour (an index of the report's colour-blind-safe ones) and dashes.
LINES: dict[str, tuple[int, str]] = {
    DEFAULT: (0, "-"),
    "retract_qr AdamW": (5, "-"),
    "retract_polar StiefelAdamW": (1, "-"),
    "retract_polar project_momentum StiefelAdamW": (1, "--"),
    "landing AdamW": (2, "-"),
    "landing_nxn AdamW": (2, "--"),
    "none AdamW": (4, "-"),
    "lora AdamW": (3, "-"),
    "lora SGD": (3, ":"),
}


def problems_in(parts: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Found], float]]:
    """Part, problem, its methods, and the loss below which all losses count as equal."""
    for part, result in parts.items():
        for name, problem in result["problems"].items():
            yield part, name, problem["methods"], problem["settings"].get("floor", 0.0)


def values(losses: Sequence[float | None]) -> list[float]:
    """Stored losses as numbers; null, where training diverged, is inf."""
    return [math.inf if value is None else value for value in losses]


def compare(parts: dict[str, Any]) -> dict[str, Any]:
    """Final losses over those of the shipped default, seed by seed.

    Returns:
        per problem and method `median_ratio` (null: diverged), `seeds_better` and `verdict`: clearly better, clearly
        worse (the same rule the other way round), or neither; and the methods other than LoRA that are clearly better
        on every problem.
    """
    problems: dict[str, dict[str, Any]] = {}
    for _, name, methods, floor in problems_in(parts):
        default = [max(value, floor) for value in values(methods[DEFAULT]["final"])]
        problems[name] = {}
        for method, found in methods.items():
            if method != DEFAULT:
                final = [max(value, floor) for value in values(found["final"])]
                problems[name][method] = verdict_of([a / b for a, b in zip(final, default, strict=True)])
    return {
        "problems": problems,
        "clearly_better_on_every_problem": [
            method
            for method in next(iter(problems.values()))
            if not method.startswith("lora")
            and all(of.get(method, {}).get("verdict") == "clearly better" for of in problems.values())
        ],
    }


def verdict_of(ratios: Sequence[float]) -> dict[str, Any]:
    """Judge a method by its ratios to the default, one per seed."""
    median = statistics.median(ratios)
    verdict = "neither"
    if max(ratios) < 1 and median < CLEAR:
        verdict = "clearly better"
    elif min(ratios) > 1 and median > 1 / CLEAR:
        verdict = "clearly worse"
    return {
        "median_ratio": float(f"{median:.4g}") if math.isfinite(median) else None,
        "seeds_better": sum(ratio < 1 for ratio in ratios),
        "verdict": verdict,
    }


def median_curve(found: Found) -> list[float]:
    """Median over the seeds of the losses at `found["steps"]`."""
    columns = zip(*(values(curve) for curve in found["losses"]), strict=True)
    return [statistics.median(column) for column in columns]


def steps_to(found: Found, threshold: float) -> int | None:
    """Steps until the median loss is at most `threshold`; None: never."""
    reached = (step for step, loss in zip(found["steps"], median_curve(found), strict=True) if loss <= threshold)
    return next(reached, None)


# The plots.


def draw(parts: dict[str, Any], folder: Path) -> None:
    """Write convergence_PART.png for each part: a column per problem, loss against steps and against seconds."""
    for part, result in parts.items():
        problems = result["problems"]
        several = len(problems) > 1
        width, height = (3.7 * len(problems), 7.6) if several else (10, 5)
        figure = new_figure(width, height, dpi=110)
        # Several problems are columns; one alone has its two plots side by side.
        grid = figure.subplots(2, len(problems), squeeze=False) if several else figure.subplots(1, 2, squeeze=False).T
        for column, (name, problem) in enumerate(problems.items()):
            draw_problem(list(grid[:, column]), part, name, problem["methods"])
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4 if several else 3, frameon=False)
        save_figure(figure, folder / f"convergence_{part}.png")


def draw_problem(axes_pair: Sequence[Any], part: str, name: str, methods: dict[str, Found]) -> None:
    """Median over the seeds as lines, minimum to maximum as bands; left out of a plot from where a median diverged."""
    loss = "relative loss" if part == "factorisation" else "validation loss per token"
    for axes, label in zip(axes_pair, ("step", "processor seconds"), strict=True):
        for method in (method for method in LINES if method in methods):
            found, (number, dashes) = methods[method], LINES[method]
            unit, colour = 1.0 if label == "step" else found["cpu_ms_per_step"] / 1e3, colour_of(number)
            x = [step * unit for step in found["steps"]]
            columns = [values(column) for column in zip(*found["losses"], strict=True)]
            width = 2.6 if method == DEFAULT else 1.5
            axes.plot(x, median_curve(found), dashes, color=colour, linewidth=width, label=title_of(method))
            axes.fill_between(
                x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12, linewidth=0
            )
        axes.set(xlabel=label, ylabel=loss, yscale="log", title=name)
        first = median_curve(methods[DEFAULT])[0]
        axes.set_ylim(bottom=max(axes.get_ylim()[0], LOWEST), top=2 * first)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes)


# The README's lines.


def title_of(method: str) -> str:
    """A method's name as a reader wants it: `lora AdamW` is LoRA with AdamW."""
    what, _, optimizer = method.rpartition(" ")
    step, _, option = what.partition(" ")
    step = {"lora": "LoRA", "landing_nxn": "n x n landing", "none": "no step"}.get(step, step)
    return f"{step}{f' + {option}' if option else ''}, {optimizer}"


def section(part: str, result: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """One table and one picture of a part."""
    problems = result["problems"]
    settings = next(iter(problems.values()))["settings"]
    seeds = len(settings["seeds"])
    if part == "factorisation":
        what = (
            f"**Convergence: low-rank matrix factorisation**, min norm(X Theta Y^T - A)_F^2, A {settings['rows']} x "
            f"{settings['columns']} of rank r_A = {settings['target_rank']} with a geometric spectrum"
        )
        loss = "relative loss"
    else:
        what = (
            f"**Convergence: a tiny language model** (the demo's base, an unseen kind of problem, r = {settings['r']}, "
            f"{settings['batch']} problems per step)"
        )
        loss = "validation loss per token"
    columns = list(problems) if len(problems) > 1 else [loss]
    lines = [
        f"{what}; {loss} after {settings['steps']} steps, median [min, max] of {seeds} seeds, each method at its best "
        "swept learning rate (in brackets after the name). + or -: clearly better or worse than the shipped default, "
        f"that is for every seed, with a median ratio beyond {CLEAR:g}:",
        "",
        f"| method | {' | '.join(columns)} | steps to {THRESHOLD:g} x the default's loss | processor ms per "
        "step | orthonormality error |",
        f"|---|{'---:|' * (len(columns) + 3)}",
    ]
    for method in TABLE:
        if all(method in problem["methods"] for problem in problems.values()):
            lines.append(_row(method, problems, comparison))
    shown = f"![loss against steps and seconds](benchmarks/results/convergence_{part}.png)"
    return [*lines, "", shown, "", *_findings(problems, comparison), ""]


def _row(method: str, problems: dict[str, Any], comparison: dict[str, Any]) -> str:
    found = [problem["methods"][method] for problem in problems.values()]
    marks = {"clearly better": " +", "clearly worse": " -"}
    cells, reached = [], []
    for name, problem in problems.items():
        judged = comparison["problems"][name].get(method, {})
        cells.append(_cell(problem["methods"][method]["final"]) + marks.get(judged.get("verdict"), ""))
        default = statistics.median(values(problem["methods"][DEFAULT]["final"]))
        steps = steps_to(problem["methods"][method], THRESHOLD * default)
        reached.append("never" if steps is None else str(steps))
    errors = [of["orthonormality_error"] for of in found if of["orthonormality_error"] is not None]
    error = f"{max(errors):.0e}" if errors else ""
    ms = statistics.median(of["cpu_ms_per_step"] for of in found)
    rates = ", ".join(dict.fromkeys(f"{of['rate']:g}" for of in found))
    return f"| {title_of(method)} ({rates}) | {' | '.join(cells)} | {', '.join(reached)} | {ms:.3g} | {error} |"


def _cell(final: Sequence[float | None]) -> str:
    numbers = values(final)
    median, low, high = (f"{value:.2g}" for value in (statistics.median(numbers), min(numbers), max(numbers)))
    return f"{median} [{low}, {high}]"


def _findings(problems: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Which methods, of all that were measured, are clearly better than the default, per problem."""
    lines = []
    for name, problem in problems.items():
        judged = comparison["problems"][name]
        better = [f"{title_of(m)} ({_ratio(v)})" for m, v in judged.items() if v["verdict"] == "clearly better"]
        worse = sum(of["verdict"] == "clearly worse" for of in judged.values())
        lines.append(
            f"- {name}: of {len(problem['methods']) - 1} other methods {worse} are clearly worse than the shipped "
            f"default. Clearly better: {'; '.join(better) or 'none'}."
        )
    return lines


def _ratio(judged: dict[str, Any]) -> str:
    return "diverged" if judged["median_ratio"] is None else f"{judged['median_ratio']:.2g} x its loss"


def conclusion(comparison: dict[str, Any]) -> str:
    """Which defaults follow."""
    better = comparison["clearly_better_on_every_problem"]
    problems = comparison["problems"]
    changes = []
    for method in ONE_CHANGE:
        ratios = [of[method]["median_ratio"] for of in problems.values() if method in of]
        if ratios:
            shown = ", ".join("diverged" if ratio is None else f"{ratio:.2g}" for ratio in ratios)
            changes.append(f"{title_of(method)}: {shown}")
    text = (
        "**Which defaults follow.** One change to the shipped default at a time, final loss over the default's (median "
        f"over seeds; {'; '.join(problems)}): {'; '.join(changes)}. Another default is called for where a method is "
        f"better for every seed of every problem, with a median ratio below {CLEAR:g}. "
    )
    if better:
        names = ", ".join(map(title_of, better))
        text += f"That holds for {names}: the shipped default should be reconsidered. "
    else:
        text += "That holds for no method: the defaults stay (`retract_polar`, AdamW, no option about the update). "
    return f"{text}{nearest(problems)} {lora(problems)}"


def nearest(problems: dict[str, Any]) -> str:
    """The manifold method with the lowest largest ratio, of those measured on every problem."""
    everywhere = set.intersection(*(set(of) for of in problems.values()))
    worst = {
        method: max(values([of[method]["median_ratio"] for of in problems.values()]))
        for method in sorted(everywhere)
        if not method.startswith("lora")
    }
    method = min(worst, key=lambda name: worst[name])
    seeds = ", ".join(str(of[method]["seeds_better"]) for of in problems.values())
    return (
        f"The other method whose worst median ratio is lowest: {title_of(method)}, at most {worst[method]:.2g}, better "
        f"for {seeds} of the seeds."
    )


def lora(problems: dict[str, Any]) -> str:
    """LoRA's ratios."""
    ratios = [f"{name}: {_ratio(of['lora AdamW'])}" for name, of in problems.items()]
    return f"LoRA with AdamW against the default: {'; '.join(ratios)}."
