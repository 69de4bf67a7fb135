"""The tables of `polar report`: scores by model, method and adapter rank beside published ones, spectra, trainings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polar.commonsense import TASKS as COMMONSENSE
from polar.rank_plot import by_type
from polar_eval.compare import (
    Difference,
    Mean,
    Row,
    differences,
    model_name,
    only_tasks,
    published_rows,
    row_order,
    unit_of,
    within_two_errors,
)
from polar_eval.page import ABSENT, Block, Cell, Section, Table, Text
from polar_eval.published import sources
from polar_eval.read_runs import Run

INSIDE, UNKNOWN = "≈", "?"
# Titles of the tasks in the order of the columns, by section.
TITLES = {
    "Commonsense reasoning": dict(
        zip(
            COMMONSENSE,
            ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"),
            strict=True,
        )
    ),
    "Mathematics": {
        "gsm8k": "GSM8K",
        "math": "MATH",
        "math_paper": "MATH, 256 tokens",
        "math500": "MATH-500",
        "aqua": "AQuA",
        "mawps": "MAWPS",
        "svamp": "SVAMP",
    },
    "GLUE": {
        "glue_mnli": "MNLI",
        "glue_sst2": "SST-2",
        "glue_mrpc": "MRPC",
        "glue_cola": "CoLA (Matthews)",
        "glue_qnli": "QNLI",
        "glue_qqp": "QQP",
        "glue_rte": "RTE",
        "glue_stsb": "STS-B (Pearson)",
    },
}
OTHER = "Other tasks"


def with_error(mean: Mean, signed: bool = False) -> str:
    """A number in per cent with its standard error, e.g. `84.0 ± 3.7`; two digits where one would hide the error."""
    digits = 2 if mean.stderr is not None and 0 < mean.stderr < 0.095 else 1
    text = f"{mean.value:{'+' if signed else ''}.{digits}f}"
    return text if mean.stderr is None else f"{text} ± {mean.stderr:.{digits}f}"


@dataclass(frozen=True)
class Suite:
    """Scores on one family of tasks.

    Attributes:
        title: of the section.
        tasks: task -> title of its column, in their order.
        rows: ours and published.
    """

    title: str
    tasks: dict[str, str]
    rows: list[Row]


def suites_of(rows: Sequence[Row]) -> list[Suite]:
    """Sort our rows into families of tasks, and put the published ones beside them."""
    suites = []
    scored = list(dict.fromkeys(task for row in rows for task in row.cells))
    known = {task for titles in TITLES.values() for task in titles}
    for title, titles in (TITLES | {OTHER: {task: task for task in scored if task not in known}}).items():
        ours = [short for row in rows if (short := only_tasks(row, list(titles))).cells]
        if ours:
            everything = sorted([*ours, *published_rows(ours, list(titles))], key=row_order)
            tasks = {task: text for task, text in titles.items() if any(task in row.cells for row in everything)}
            suites.append(Suite(title, tasks, everything))
    return suites


def score_section(suite: Suite) -> Section:
    """The table of a suite, then the differences between its rows."""
    return Section(suite.title, _score_blocks(suite.rows, suite.tasks))


def _score_blocks(rows: Sequence[Row], titles: dict[str, str]) -> list[Block]:
    """The table of scores and that of differences; the tasks of an average are those of the row's model."""
    tasks = {row.model: [t for t in titles if any(t in r.cells for r in rows if r.model == row.model)] for row in rows}
    averaged = any(len(found) > 1 for found in tasks.values())
    text = (
        "Per cent ± standard error: over the seeds where there are several, else over the problems. The average is over"
        " all tasks that its model has here. Grey rows are published numbers."
    )
    if len(tasks) == 1:
        text = f"All on {rows[0].model}. {text}"
    header = ["method", "r", "model", "settings", "seeds", *titles.values(), *(["average"] if averaged else [])]
    header += ["trainable parameters", "median stable rank", "training time", "peak memory, GiB", "source"]
    lines = []
    for row in rows:
        average = row.average(tasks[row.model])
        scores = [_score_cell(row.cells.get(task), row) for task in titles]
        cells: list[Cell | str] = [
            row.method,
            row.r or ABSENT,
            _model(row, tasks),
            row.difference or ABSENT,
            _seeds(row),
        ]
        lines.append([*cells, *scores, *([_score_cell(average, row)] if averaged else []), *_cost_cells(row)])
    quiet = frozenset(index for index, row in enumerate(rows) if row.published is not None)
    blocks: list[Block] = [Text(text), without_empty_columns(Table(header, lines, quiet=quiet))]
    found = differences(rows)
    if found:
        blocks.append(_difference_table(found, titles, tasks, averaged))
    return blocks


def _model(row: Row, tasks: Mapping[str, Any]) -> str:
    """The model, where there are several."""
    return row.model if len(tasks) > 1 else ABSENT


def _score_cell(mean: Mean | None, row: Row) -> str:
    if mean is None:
        return ABSENT
    if row.published is not None:
        digits = max(1 if round(value, 1) == value else 2 for value in row.published.scores.values())
        return f"{mean.value:.{digits}f}"
    several = len({cell.num_seeds for cell in row.cells.values()}) > 1
    return with_error(mean) + (f" (n = {mean.num_seeds})" if several and mean.by_seed else "")


def _seeds(row: Row) -> str:
    if row.published is not None or row.method == "base":
        return ABSENT
    numbers = sorted({cell.num_seeds for cell in row.cells.values()})
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"


def _cost_cells(row: Row) -> list[Cell | str]:
    if row.published is not None:
        titles = sources()
        first = titles[row.published.sources[0]]
        return [row.published.trainable or ABSENT, row.published.stable_rank or ABSENT, ABSENT, ABSENT,
                Cell(first.label, link=first.url)]  # fmt: skip
    ranks = [statistics.median(run.stable_ranks) for run in row.runs if run.stable_ranks]
    times = [run.done["train_time_s"] for run in row.runs if "train_time_s" in run.done]
    memory = max((run for run in row.runs if "peak_memory_gib" in run.done), key=_peak, default=None)
    return [
        _span([value for run in row.runs if (value := num_trainable(run)) is not None]),
        f"{statistics.median(ranks):.2f}" if ranks else ABSENT,
        duration(statistics.fmean(times)) if times else ABSENT,
        peak_memory(memory) if memory else ABSENT,
        "this report",
    ]


def num_trainable(run: Run) -> int | None:
    """Trainable parameters, of the training if it says so, else numbers in the adapter file."""
    return run.done.get("num_trainable", run.num_parameters)


def _peak(run: Run) -> float:
    return float(run.done["peak_memory_gib"])


def peak_memory(run: Run) -> str:
    """Largest memory of any rank in GiB, and whether it is the host's."""
    return f"{_peak(run):.2f}" + (" (host)" if run.done.get("peak_memory_of") == "host" else "")


def duration(seconds: float) -> Cell:
    """A time to read: 61 s, 25 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    text = f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else ""
    return Cell(text or f"{minutes // 60} h {minutes % 60:02d} min", seconds)


def _span(values: Iterable[int]) -> str:
    found = sorted(values)
    if not found:
        return ABSENT
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


def _difference_table(
    found: Sequence[Difference], titles: dict[str, str], tasks: dict[str, list[str]], averaged: bool
) -> Table:
    lines = []
    for item in found:
        published = item.other.published
        other = f"published {item.other.method}" if published else item.other.method
        trainable = f" ({published.trainable})" if published and published.trainable else ""
        cells: list[Cell | str] = [f"{item.ours.method} - {other}{trainable}", item.ours.r or ABSENT]
        cells.append(_model(item.ours, tasks))
        cells.append(" against ".join(part for part in (item.ours.difference, item.other.difference) if part) or ABSENT)
        cells += [_difference_cell(item.cells.get(task)) for task in titles]
        if averaged:
            cells.append(_difference_cell(item.average(tasks[item.ours.model])))
        lines.append(cells)
    caption = (
        f"Differences. {INSIDE}: inside two standard errors (of both rows; a published number counts as exact, since"
        f" the sources give no error). {UNKNOWN}: no standard error is known."
    )
    header = ["difference", "r", "model", "settings", *titles.values(), *(["average"] if averaged else [])]
    return without_empty_columns(Table(header, lines, caption))


def _difference_cell(mean: Mean | None) -> str:
    if mean is None:
        return ABSENT
    inside = within_two_errors(mean)
    return with_error(mean, signed=True) + (f" {UNKNOWN}" if inside is None else f" {INSIDE}" if inside else "")


def without_empty_columns(table: Table) -> Table:
    """Return the table without columns in which nothing stands; the first one stays."""
    columns = [
        index
        for index in range(len(table.header))
        if index == 0 or any(row[index].text != ABSENT for row in table.cells)
    ]
    rows = [[row[index] for index in columns] for row in table.cells]
    return Table([table.header[index] for index in columns], rows, table.caption, table.quiet)


def result_section(runs: Sequence[Run]) -> Section:
    """Every number of every result, with the counts behind it."""
    lines = []
    for run in runs:
        for result in run.results:
            who = run.name if result["adapter"] is not None else f"base of {run.name}" if run.adapter else run.name
            for name, column in result["columns"].items():
                unit = unit_of(result, name)
                value = Mean(unit * column["value"], None if column["stderr"] is None else unit * column["stderr"], {})
                headline = " *" if name == result.get("headline") else ""
                counts = [column.get("num_correct"), result["num_problems"], column.get("num_without_answer")]
                numbers = [_or_absent(count, "{:,}") for count in (*counts, result.get("num_truncated"))]
                about = [who, model_name(result["base"]), result["task"], name + headline]
                lines.append([*about, with_error(value), *numbers])
    header = ["run", "model", "task", "number", "value", "right", "problems", "without an answer", "cut at the limit"]
    text = (
        "Each result as polar eval wrote it, shares in per cent, ± the standard error over its problems. *: headline."
    )
    return Section("Each result", [Text(text), without_empty_columns(Table(header, lines))] if lines else [])


def spectrum_table(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Stable ranks of the final adapters: a line per group of runs that differ only in their seed."""
    lines = []
    for name, runs in groups.items():
        ranks = [rank for run in runs for rank in run.stable_ranks]
        if ranks:
            norms = [spectrum.norm for run in runs for spectrum in run.spectra]
            cells = [f"{value:.2f}" for value in (statistics.median(ranks), min(ranks), max(ranks))]
            count = str(len(runs[0].spectra))
            lines.append([name, runs[0].r or ABSENT, str(len(runs)), count, *cells, f"{statistics.median(norms):.3g}"])
    header = ["run", "r", "seeds", "adapted modules", "median", "smallest", "largest", "median norm of dW"]
    return Table(header, lines)


def rank_table(ranks: dict[str, Any]) -> Table:
    """Ranks by type of layer."""
    lines = []
    for kind, layers in by_type({name: entry["r"] for name, entry in ranks["modules"].items()}).items():
        found = [r for r in layers.values() if r is not None]
        low, middle, high = (min(found), statistics.median(found), max(found)) if found else (ABSENT,) * 3
        lines.append([kind, f"{len(found)} of {len(layers)}", *(f"{value:g}" if found else ABSENT for value in
                                                                  (low, middle, high))])  # fmt: skip
    return Table(["layers", "adapted", "lowest r", "median r", "highest r"], lines)


def training_table(runs: Sequence[Run]) -> Table | None:
    """A line per run: steps, time, memory, losses."""
    trained = [run for run in runs if run.metrics or run.done]
    if not trained:
        return None
    columns: dict[str, Callable[[Run], Cell | str]] = {
        "run": lambda run: run.name,
        "method": lambda run: run.method,
        "r": lambda run: run.r or ABSENT,
        "trainable parameters": lambda run: _or_absent(num_trainable(run), "{:,}"),
        "adapter MiB": lambda run: _or_absent(run.adapter_bytes and run.adapter_bytes / 2**20, "{:.2f}"),
        "steps": lambda run: _or_absent(run.done.get("step"), "{}"),
        "training time": lambda run: duration(run.done["train_time_s"]) if "train_time_s" in run.done else ABSENT,
        "starts": lambda run: _or_absent(run.done.get("num_starts"), "{}"),
        "peak memory, GiB": lambda run: peak_memory(run) if "peak_memory_gib" in run.done else ABSENT,
        "engine": lambda run: str(run.done.get("engine", ABSENT)),
        "processes": lambda run: _or_absent(run.done.get("world_size"), "{}"),
        "last loss": lambda run: _or_absent(next(reversed(run.curve("loss")[1]), None), "{:.4f}"),
        "best validation loss": lambda run: _or_absent(min(run.curve("eval_loss")[1], default=None), "{:.4f}"),
        "largest orthonormality error": lambda run: _or_absent(
            max(run.curve("orthonormality_error")[1], default=None), "{:.1e}"
        ),
    }
    lines = [[cell(run) for cell in columns.values()] for run in trained]
    return without_empty_columns(Table(list(columns), lines))


def _or_absent(value: Any, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def source_section(rows: Iterable[Row]) -> Section:
    """Where the published numbers come from."""
    used = dict.fromkeys(key for row in rows if row.published is not None for key in row.published.sources)
    found = sources()
    lines = [[found[key].label, Cell(found[key].title, link=found[key].url), found[key].note] for key in used]
    blocks: list[Block] = [Table(["source", "title", "to know before comparing"], lines)] if lines else []
    return Section("Sources of published numbers", blocks)
