"""Scores of many runs as rows of a table: one per model, method and adapter rank, averaged over seeds.

Runs that differ only in their seed are one row. Runs that score the same task and differ in anything else that decides
the result (a learning rate, the prompts) stay apart, in rows that name the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from polar_eval.published import Published, published_for
from polar_eval.read_runs import Run

# Where, how fast and how visibly a run computed, or what the row and its columns say anyway.
NO_DIFFERENCE = (
    *("model_name_or_path", "revision", "trust_remote_code", "load_in_4bit", "load_in_8bit", "attn_implementation"),
    *("output_dir", "run_name", "overwrite", "resume", "seed", "data_seed"),
    *("use_cpu", "engine", "deepspeed", "ddp_find_unused_parameters", "gradient_accumulation_steps"),
    *("activation_checkpointing", "gradient_checkpointing", "manifold_execution"),
    *("adapter.peft_type", "adapter.r", "adapter.use_dora", "adapter.use_rslora"),
)
NO_DIFFERENCE_PREFIXES = ("logging_", "save_", "report_", "per_device_", "dataloader_")
PROMPTS = "prompts"
SHARES = ("acc", "acc_norm", "exact_match", "f1", "mcc", "em", "pass@1")  # metrics of stock tasks that are shares


@dataclass(frozen=True)
class Score:
    """One number of one run.

    Attributes:
        run: whose.
        model: last part of the base's name.
        task: of `polar eval`.
        value: per cent, or a stock task's metric as it is.
        stderr: over the task's problems, in the same unit; None where there is none.
        seed: of the training.
        settings: all that may tell it from another score of the same model, method and r.
    """

    run: Run
    model: str
    task: str
    value: float
    stderr: float | None
    seed: int
    settings: dict[str, str]


@dataclass(frozen=True)
class Mean:
    """A number with its standard error.

    Attributes:
        value: mean over the seeds.
        stderr: of the mean over n > 1 seeds, s / sqrt(n) with s^2 = sum (x - mean)^2 / (n - 1); of one seed, the
            task's own; None where there is none.
        by_seed: seed -> value.
    """

    value: float
    stderr: float | None
    by_seed: Mapping[int, float]

    @property
    def num_seeds(self) -> int:
        """Number of trainings behind it; 0 for a published number."""
        return len(self.by_seed)


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        model: name of the base.
        method: e.g. PoLAR; "base" for the base alone.
        r: adapter rank, or `lowest-highest`; empty where there is none.
        difference: settings that tell it from other rows of the same model, method and r; usually empty.
        cells: task -> number.
        runs: behind it; empty for a published row.
        published: where the numbers are others'.
    """

    model: str
    method: str
    r: str
    difference: str
    cells: dict[str, Mean]
    runs: tuple[Run, ...] = ()
    published: Published | None = None

    def average(self, tasks: Sequence[str]) -> Mean | None:
        """Return the mean over tasks, None unless there is a number for each of them.

        Its standard error is over the seeds where all tasks have the same ones, else that of independent tasks.
        A published row has the average that the source prints.
        """
        if not set(tasks) <= set(self.cells):
            return None
        if self.published is not None:
            return Mean(self.published.average, None, {})
        cells = [self.cells[task] for task in tasks]
        if len({frozenset(cell.by_seed) for cell in cells}) == 1 and cells[0].num_seeds > 1:
            return mean_of({seed: statistics.fmean(c.by_seed[seed] for c in cells) for seed in cells[0].by_seed}, None)
        errors = [cell.stderr for cell in cells]
        known = [error for error in errors if error is not None]
        stderr = math.sqrt(sum(error**2 for error in known)) / len(cells) if len(known) == len(cells) else None
        same = all(set(cell.by_seed) == set(cells[0].by_seed) for cell in cells)
        return Mean(statistics.fmean(cell.value for cell in cells), stderr, cells[0].by_seed if same else {})


def mean_of(by_seed: Mapping[int, float], own_stderr: float | None) -> Mean:
    """Return the mean over seeds; see `Mean` for its standard error."""
    values = list(by_seed.values())
    if len(values) > 1:
        return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), by_seed)
    return Mean(values[0], own_stderr, by_seed)


def model_name(base: str) -> str:
    """Return the last part of a hub id or folder; of a folder in the hub's cache, the model's."""
    for part in PurePath(base).parts:
        if part.startswith("models--"):
            return part.rpartition("--")[2]
    return PurePath(base).name


def all_scores(runs: Iterable[Run], problems: list[str]) -> list[Score]:
    """Return the scores of all runs; an adapter or base that was scored twice on the same prompts counts once.

    Args:
        runs: what was read.
        problems: gets a line for each score that is left out because another one contradicts it.
    """
    found: dict[tuple[Any, ...], Score] = {}
    for run in runs:
        for result in run.results:
            about = result["adapter"]
            for score in _scores(run, result):
                who = "base" if about is None else about.get("sha256") or run.name
                how = tuple(sorted(_scoring_settings(result).items()))
                first = found.setdefault((who, score.model, score.task, how), score)
                if first.value != score.value:
                    problems.append(
                        f"{run.name}: {score.task} {score.value:.2f} left out: the same weights and prompts had"
                        f" {first.value:.2f} in {first.run.name}"
                    )
    return list(found.values())


def _scores(run: Run, result: dict[str, Any]) -> list[Score]:
    """The headline of a result; of a stock task, which has none, every number of the task itself."""
    headline = result.get("headline")
    columns = {name: column for name, column in result["columns"].items() if headline in (None, name)}
    is_base = result["adapter"] is None
    owner = Run("base model", config=run.config) if is_base else run
    scores = []
    for name, column in columns.items():
        if headline is None and ":" in name:  # a member of a group
            continue
        unit = unit_of(result, name)
        scores.append(
            Score(
                run=owner,
                model=model_name(result["base"]),
                task=result["task"] if headline is not None else f"{result['task']} {name}",
                value=unit * column["value"],
                stderr=None if column["stderr"] is None else unit * column["stderr"],
                seed=0 if is_base else int(run.config.get("seed", 0)),
                settings=({} if is_base else _training_settings(run.config)) | _scoring_settings(result),
            )
        )
    return scores


def unit_of(result: Mapping[str, Any], column: str) -> float:
    """Return 100 for a share, which is shown in per cent, and 1 for another metric of a stock task."""
    is_share = result.get("headline") is not None or column.rpartition(":")[2].partition(",")[0] in SHARES
    return 100.0 if is_share else 1.0


def _training_settings(config: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return {
        key: str(value)
        for key, value in flat.items()
        if value is not None and key not in NO_DIFFERENCE and not key.startswith(NO_DIFFERENCE_PREFIXES)
    }


def _scoring_settings(result: Mapping[str, Any]) -> dict[str, str]:
    settings = {key: result.get(key) for key in ("backend", "limit", "num_problems")}
    settings["scored in"] = result.get("dtype")
    settings["scored with template"] = result.get("template")
    settings["max_gen_toks"] = (result.get("generation") or {}).get("max_gen_toks")
    settings[PROMPTS] = str(result.get("prompt_sha256", ""))[:8] or None
    return {key: str(value) for key, value in settings.items() if value is not None}


def rows_of(scores: Sequence[Score], problems: list[str]) -> list[Row]:
    """Return our rows, by model, adapter rank and method; problems get a line for each run that repeats another."""
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.model, score.run.method, score.run.r), []).append(score)
    rows = []
    for (model, method, r), group in groups.items():
        keys = differing_settings(group)
        parts: dict[tuple[str, ...], list[Score]] = {}
        for score in group:
            parts.setdefault(tuple(score.settings.get(key, "") for key in keys), []).append(score)
        for values, part in parts.items():
            difference = ", ".join(f"{key} {_short(value)}" for key, value in zip(keys, values, strict=True) if value)
            runs = tuple({score.run.name: score.run for score in part}.values())
            rows.append(Row(model, method, r, difference, _cells(part, problems), runs))
    return sorted(rows, key=row_order)


def differing_settings(scores: Sequence[Score]) -> list[str]:
    """Return the settings in which scores of one task differ; those of different tasks may, recipes make them."""
    by_task: dict[str, list[Score]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    keys = {key for score in scores for key in score.settings}
    found = sorted(
        key for key in keys if any(len({s.settings.get(key) for s in same}) > 1 for same in by_task.values())
    )
    shorter = [key for key in found if key != PROMPTS]
    if len(shorter) < len(found) and all(_parts(s, shorter) == _parts(s, found) for s in by_task.values()):
        return shorter  # the hash of the prompts says nothing that the others do not
    return found


def _parts(scores: Sequence[Score], keys: Sequence[str]) -> int:
    return len({tuple(score.settings.get(key) for key in keys) for score in scores})


def _cells(scores: Sequence[Score], problems: list[str]) -> dict[str, Mean]:
    by_task: dict[str, dict[int, Score]] = {}
    for score in scores:
        first = by_task.setdefault(score.task, {}).setdefault(score.seed, score)
        if first is not score:
            problems.append(
                f"{score.run.name}: {score.task} {score.value:.2f} left out: same settings and seed as {first.run.name}"
            )
    return {
        task: mean_of({seed: score.value for seed, score in own.items()}, next(iter(own.values())).stderr)
        for task, own in by_task.items()
    }


def published_rows(rows: Sequence[Row], tasks: Sequence[str]) -> list[Row]:
    """Return the published rows of our models with scores on any of these tasks, at our adapter ranks if there are any.

    Args:
        rows: ours.
        tasks: columns of the table.
    """
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        entries = [entry for entry in published_for(model) if set(entry.scores) & set(tasks)]
        ours = {row.r for row in rows if row.model == model}
        near = [entry for entry in entries if entry.r is None or str(entry.r) in ours]
        for entry in near or entries:
            cells = {task: Mean(value, None, {}) for task, value in entry.scores.items()}
            r = "" if entry.r is None else str(entry.r)
            found.append(Row(model, entry.method, r, "", cells, published=entry))
    return found


def row_order(row: Row) -> tuple[Any, ...]:
    """Return a sort key: by model, the base first, by adapter rank, method, ours before published."""
    low = int(row.r.partition("-")[0]) if row.r else 0
    return (row.model, row.method != "base", low, row.method, row.published is not None, row.difference)


@dataclass(frozen=True)
class Difference:
    """One row minus another.

    Attributes:
        ours: what is compared.
        other: with what.
        cells: task -> difference; its `stderr` combines both, a published number counting as exact.
    """

    ours: Row
    other: Row
    cells: dict[str, Mean]

    def average(self, tasks: Sequence[str]) -> Mean | None:
        """Return the difference of the averages, None where a row has none."""
        first, second = self.ours.average(tasks), self.other.average(tasks)
        return None if first is None or second is None else _minus(first, second, self.other)


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Return ours minus published (same model and method, same r if given), and each method minus LoRA (same model, r).

    Args:
        rows: ours and published.
    """
    ours = [row for row in rows if row.published is None and row.method != "base"]
    pairs = [
        (row, other)
        for row in ours
        for other in rows
        if other.published is not None
        and (other.model, other.method) == (row.model, row.method)
        and other.r in ("", row.r)
    ]
    pairs += [
        (row, other)
        for row in ours
        for other in ours
        if other.method == "LoRA" != row.method and (other.model, other.r) == (row.model, row.r)
    ]
    found = [Difference(row, other, _differences(row, other)) for row, other in pairs]
    return [difference for difference in found if difference.cells]


def _differences(row: Row, other: Row) -> dict[str, Mean]:
    return {task: _minus(row.cells[task], other.cells[task], other) for task in row.cells if task in other.cells}


def _minus(first: Mean, second: Mean, other: Row) -> Mean:
    errors = (first.stderr, 0.0 if other.published is not None else second.stderr)
    stderr = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return Mean(first.value - second.value, stderr, {})


def within_two_errors(difference: Mean) -> bool | None:
    """Whether a difference is at most two of its standard errors; None where there is no standard error."""
    return None if difference.stderr is None else abs(difference.value) <= 2 * difference.stderr


def _short(value: str) -> str:
    return PurePath(value).name if "/" in value else value


def only_tasks(row: Row, tasks: Sequence[str]) -> Row:
    """Return the row with the cells of these tasks only."""
    return replace(row, cells={task: row.cells[task] for task in tasks if task in row.cells})


def seed_groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs with an adapter, those that differ only in their seed together, by a name to show."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.adapter:
            base = model_name(str(run.config.get("model_name_or_path") or run.adapter.get("base_model_name_or_path")))
            settings = tuple(sorted(_training_settings(run.config).items()))
            key = (base, run.method, run.r, settings) if run.config else (run.name,)
            groups.setdefault(key, []).append(run)
    if all(len(members) == 1 for members in groups.values()):
        return {members[0].name: members for members in groups.values()}
    many_models = len({key[0] for key in groups}) > 1
    named: dict[str, list[Run]] = {}
    for key, (first, *others) in sorted(groups.items(), key=lambda group: _group_order(group[1][0])):
        task = first.config.get("task")
        parts = (first.method, f"r={first.r}", *([key[0]] if many_models else []), *([task] if task else []))
        name = " ".join(parts)
        named[name if name not in named else first.name + (" and other seeds" if others else "")] = [first, *others]
    return named


def _group_order(run: Run) -> tuple[Any, ...]:
    """What is to be compared stands side by side: by task, adapter rank and method."""
    return (str(run.config.get("task") or ""), int(run.r.partition("-")[0] or 0), run.method)
