"""`polar report RESULTS... --out DIR`: one page, as Markdown and as HTML, from what runs and scores left behind.

read_runs.py   folders -> runs, and a line for each thing that cannot be read
compare.py     scores -> rows per model, method and adapter rank, over seeds; differences (published.yaml: others')
sections.py    rows and runs -> tables           plots.py -> figures
page.py        tables and figures -> report.md, report.html, *.png, *.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polar.plotting import colour_of, require_matplotlib
from polar.spectrum_plots import draw_stable_rank_boxes, draw_stable_rank_evolution
from polar_eval import plots
from polar_eval.compare import Mean, all_scores, rows_of, seed_groups
from polar_eval.page import Block, Items, Page, Plot, Section, Text, write_page
from polar_eval.read_runs import Run, read_results
from polar_eval.sections import (
    rank_table,
    result_section,
    score_section,
    source_section,
    spectrum_table,
    suites_of,
    training_table,
    with_error,
)

MAX_BOXES = 40
# What a report may have left in its folder; those that the next one does not draw are removed.
PLOTS = (
    *("loss", "orthonormality_error", "stable_rank", "stable_rank_by_type", "stable_rank_evolution"),
    *("stable_rank_logged", "ranks_*"),
)


def write_report(
    runs: Sequence[Run],
    out: Path,
    title: str = "Report",
    preface: Sequence[Section] = (),
    problems: Sequence[str] = (),
) -> Path:
    """Write `report.md`, `report.html` and the plots into `out`; other files there stay.

    Args:
        runs: at least one.
        out: a folder, made if needed.
        title: first line of the page.
        preface: sections that stand before the others.
        problems: a line for each thing that could not be read.

    Returns:
        The path of report.md; report.html lies beside it.
    """
    require_matplotlib()
    lines = list(problems)
    suites = suites_of(rows_of(all_scores(runs, lines), lines))
    sections = [*preface, *map(score_section, suites)]
    if lines:
        sections.append(Section("Not in this report, or only in part", [Items(lines)]))
    sections += _spectrum_sections(seed_groups(runs), runs)
    sections += [*_rank_sections(runs), *_training_sections(runs)]
    sections += [result_section(runs), source_section(row for suite in suites for row in suite.rows)]
    for name in PLOTS:
        for old in [*out.glob(f"{name}.png"), *out.glob(f"{name}.svg")]:
            old.unlink()
    for line in lines:
        print(f"polar: note: {line}", file=sys.stderr)
    return write_page(Page(title, [section for section in sections if section.blocks]), out)[0]


def _spectrum_sections(groups: Mapping[str, list[Run]], runs: Sequence[Run]) -> list[Section]:
    """Stable ranks: table, boxes, by module type, over checkpoints, as logged."""
    measured = {name: own for name, own in groups.items() if any(run.stable_ranks for run in own)}
    if not measured:
        return []
    shown = dict(list(measured.items())[:MAX_BOXES])
    series = {name: [rank for run in own for rank in run.stable_ranks] for name, own in shown.items()}
    ranks = {name: max(s.r for run in own for s in run.spectra) for name, own in shown.items()}
    longest = max(min(len(name), 40) for name in series)
    methods = list(dict.fromkeys(own[0].method for own in shown.values()))
    colours = {name: colour_of(methods.index(own[0].method)) for name, own in shown.items()}
    width, row_height = plots.WIDTH + 0.07 * max(0, longest - 12), 0.45 if len(shown) < 9 else 0.25
    boxes = draw_stable_rank_boxes(series, ranks, width, row_height, colours)
    boxes.axes[0].set_xlabel("stable rank of dW")
    text = (
        "Stable rank of dW: norm(dW)_F^2 / norm(dW)_2^2, between 1 and r, of each adapted module. A low one means that"
        " the update uses few of its r directions. Of DoRA, the low-rank part."
    )
    caption = (
        "Stable rank of the modules: quartiles and median, whiskers to 1.5 IQR, outliers; dotted: adapter rank r; a"
        " colour per method"
    )
    found: list[Block] = [Text(text), spectrum_table(measured)]
    found.append(Plot("stable_rank", caption + _of(len(measured), MAX_BOXES), boxes))
    by_type = plots.module_type_figure(measured if len(measured) <= plots.MAX_CURVES else _by_method(measured))
    found += _plot("stable_rank_by_type", "Stable rank by module type; dots: modules, bars: medians", by_type)
    followed = {name: steps for name, own in measured.items() if len(steps := _by_step(own)) > 1}
    if followed:
        drawn = dict(list(followed.items())[: plots.MAX_CURVES])
        figure = draw_stable_rank_evolution(drawn, plots.WIDTH, plots.HEIGHT)
        plots.with_legend(figure, figure.axes[0])
        caption = "Stable rank over the checkpoints: median of the modules, band between their quartiles"
        found.append(Plot("stable_rank_evolution", caption + _of(len(followed), plots.MAX_CURVES), figure))
    caption = "Median stable rank of the modules, as the training logged it"
    found += _plot("stable_rank_logged", caption, plots.logged_stable_rank_figure(runs))
    return [Section("Stable rank", found)]


def _by_method(groups: Mapping[str, list[Run]]) -> dict[str, list[Run]]:
    """All tasks together: method and adapter rank -> runs."""
    found: dict[str, list[Run]] = {}
    for own in groups.values():
        found.setdefault(f"{own[0].method} r={own[0].r}", []).extend(own)
    return found


def _by_step(runs: Sequence[Run]) -> dict[int, list[float]]:
    """Step -> stable ranks of all modules of the runs that have a checkpoint there."""
    steps: dict[int, list[float]] = {}
    for run in runs:
        for step, spectra in run.checkpoint_spectra.items():
            steps.setdefault(step, []).extend(s.stable_rank for s in spectra if s.norm > 0)
    return {step: ranks for step, ranks in sorted(steps.items()) if ranks}


def _rank_sections(runs: Sequence[Run]) -> list[Section]:
    """Ranks by layer, once for all runs that have the same."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.ranks is not None:
            found.setdefault(json.dumps(run.ranks, sort_keys=True), []).append(run)
    blocks: list[Block] = []
    for index, same in enumerate(found.values(), 1):
        names = ", ".join(run.name for run in same)
        caption = f"Adapter rank by layer of {names} (grey: no adapter)"
        ranks = same[0].ranks or {}
        blocks += [Plot(f"ranks_{index}", caption, plots.rank_figure(ranks)), rank_table(ranks)]
    return [Section("Ranks by layer", blocks)]


def _training_sections(runs: Sequence[Run]) -> list[Section]:
    """Steps, time, memory, losses."""
    table = training_table(runs)
    if table is None:
        return []
    blocks: list[Block] = [table]
    of = _of(sum(bool(run.metrics) for run in runs), plots.MAX_CURVES)
    blocks += _plot("loss", f"Loss during training; dots: on the validation rows{of}", plots.loss_figure(runs))
    caption = f"Orthonormality error of the Stiefel factors{of}"
    blocks += _plot("orthonormality_error", caption, plots.orthonormality_figure(runs))
    return [Section("Training", blocks)]


def _plot(name: str, caption: str, figure: Any | None) -> list[Block]:
    return [] if figure is None else [Plot(name, caption, figure)]


def _of(number: int, most: int) -> str:
    return f"; the first {most} of {number}" if number > most else ""


def share_with_error(column: Mapping[str, Any]) -> str:
    """A column of a result in per cent with its standard error, e.g. `84.0 ± 3.7`."""
    stderr = column["stderr"]
    return with_error(Mean(100 * column["value"], None if stderr is None else 100 * stderr, {}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar report`."""
    text = "run folder, folder of runs or of scores; all that is finished below it is read"
    parser.add_argument("results", metavar="RESULTS", nargs="+", type=Path, help=text)
    text = "folder for report.md, report.html and the plots (PNG, SVG)"
    parser.add_argument("--out", type=Path, required=True, help=text)
    parser.add_argument("--title", default="Report", help="first line of the page")


def run(args: argparse.Namespace) -> None:
    """Run `polar report` with parsed arguments."""
    require_matplotlib()
    found = read_results(args.results)
    page = write_report(found.runs, args.out, args.title, problems=found.problems)
    print(page.with_suffix(".html"))
    print(page)
