"""`polar report RUNS... --out DIR`: one Markdown page and three plots from run folders; nothing is computed twice.

Every number comes from a file of the run: `metrics.jsonl` (curves), `adapter/` (spectra, size), `config.yaml` (method)
and, where the run was scored, the `results.json` of `polar eval` in its subfolders. What a run lacks stays a dash.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polar.adapter_file import WEIGHTS_NAME, find_adapter, read_config
from polar.errors import UserError
from polar.files import write_text
from polar.plotting import require_matplotlib
from polar.spectrum import ModuleSpectrum, adapter_spectrum
from polar_eval.plots import plot_loss, plot_orthonormality_error, plot_stable_rank

ABSENT = "-"
GLUE_PREFIX = "glue_"  # of the task in results.json that a GLUE run writes itself


@dataclass(frozen=True)
class Run:
    """What the report knows about one run.

    Attributes:
        name: the folder's name.
        config: `config.yaml`.
        metrics: one entry per line of `metrics.jsonl`, in the order of the file.
        spectra: the adapter's spectra; empty where the method has none here.
        method: PEFT's name of the method, e.g. POLAR.
        r: the adapter rank.
        num_parameters: numbers in the adapter file.
        adapter_bytes: size of the adapter file.
        results: the `results.json` of `polar eval` on this run and on its base.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    spectra: list[ModuleSpectrum]
    method: str
    r: int | None
    num_parameters: int
    adapter_bytes: int
    results: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged."""
        points = [(m["step"], m[key]) for m in self.metrics if isinstance(m.get(key), int | float) and "step" in m]
        return [p[0] for p in points], [p[1] for p in points]


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        UserError: not a run folder, no adapter in it, or a broken file.
    """
    metrics_file = folder / "metrics.jsonl"
    if not metrics_file.is_file():
        raise UserError(f"run {folder}: no metrics.jsonl in it; pass the output_dir of a finished polar train")
    adapter = find_adapter(folder)
    config = read_config(adapter)
    spectra = adapter_spectrum(adapter) if config["peft_type"] in ("POLAR", "LORA") else []
    return Run(
        name=folder.resolve().name,
        config=_read_yaml(folder / "config.yaml"),
        metrics=_read_jsonl(metrics_file),
        spectra=spectra,
        method=config["peft_type"],
        r=config.get("r"),
        num_parameters=_num_parameters(adapter / WEIGHTS_NAME),
        adapter_bytes=(adapter / WEIGHTS_NAME).stat().st_size,
        results=[_read_json(file) for file in sorted(folder.glob("*/results.json"))],
    )


def write_report(runs: Sequence[Run], out: Path, title: str = "Report", preface: str = "") -> Path:
    """Write `report.md` and its plots into `out`; other files there stay.

    Args:
        runs: at least one run.
        out: a folder, made if needed.
        title: first line of the page.
        preface: Markdown that stands before the tables.

    Returns:
        The path of report.md.
    """
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    plots: list[tuple[str, str, Callable[[Sequence[Run], Path], bool]]] = [
        ("loss.png", "Loss during training", plot_loss),
        ("orthonormality_error.png", "Orthonormality error of the Stiefel factors", plot_orthonormality_error),
        ("stable_rank.png", "Stable rank of the delta weights", plot_stable_rank),
    ]
    drawn = [(file, caption) for file, caption, draw in plots if draw(runs, out / file)]
    parts = [f"# {title}", preface, _score_table(runs), _glue_table(runs), _training_table(runs), _spectrum_table(runs)]
    parts += [f"## {caption}\n\n![{caption}]({file})" for file, caption in drawn]
    page = out / "report.md"
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns that hold only numbers and dashes are right-aligned."""
    columns = zip(*rows, strict=True)
    marks = ["--:" if all(cell[:1].isdigit() or cell == ABSENT for cell in column) else ":--" for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, marks, *rows])


def _score_table(runs: Sequence[Run]) -> str:
    rows = []
    for result in _distinct_results(runs):
        if _is_glue(result):
            continue
        strict, last = (result["columns"].get(name) for name in ("strict", "flexible"))
        rows.append(
            [
                result["model"],
                result["task"],
                str(result["num_problems"]),
                share_with_error(strict),
                share_with_error(last),
                ABSENT if strict is None else str(strict["num_without_answer"]),
            ]
        )
    if not rows:
        return ""
    header = ["model", "task", "problems", "right answers, %", "right last number, %", "without an answer"]
    return "## Scores\n\nExact match ± standard error.\n\n" + table(header, rows)


def _is_glue(result: dict[str, Any]) -> bool:
    return str(result["task"]).startswith(GLUE_PREFIX)


def _glue_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for result in filter(_is_glue, run.results):
            scores = []
            for name, column in result["columns"].items():
                error = "" if column["stderr"] is None else f" ± {100 * column['stderr']:.1f}"
                scores.append(f"{name.replace('_', ' ')} {100 * column['value']:.1f}{error}")
            task = result["task"].removeprefix(GLUE_PREFIX)
            rows.append([f"{run.name} adapter", task, str(result["num_problems"]), ", ".join(scores)])
    if not rows:
        return ""
    text = "On the validation rows, times 100, ± standard error; the adapter is the best by the first score."
    return f"## GLUE\n\n{text}\n\n" + table(["model", "task", "rows", "scores"], rows)


def _distinct_results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of all runs, each with its `model`; the same base scored on the same prompts counts once, first."""
    bases: dict[tuple[str, str], dict[str, Any]] = {}
    adapters = []
    for run in runs:
        for result in run.results:
            if result["adapter"] is None:
                bases.setdefault((result["base"], result["prompt_sha256"]), result | {"model": "base model"})
            else:
                adapters.append(result | {"model": f"{run.name} adapter"})
    return [*bases.values(), *adapters]


def share_with_error(summary: dict[str, Any] | None) -> str:
    """A column's value in per cent with its standard error, e.g. `84.0 ± 3.7`."""
    if summary is None:
        return ABSENT
    error = "" if summary["stderr"] is None else f" ± {100 * summary['stderr']:.1f}"
    return f"{100 * summary['value']:.1f}{error}"


def _training_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        steps, losses = run.curve("loss")
        _, validation = run.curve("eval_loss")
        _, seconds = run.curve("train_runtime")
        _, errors = run.curve("orthonormality_error")
        all_steps = [int(m["step"]) for m in run.metrics if "step" in m]
        rows.append(
            [
                run.name,
                run.method,
                ABSENT if run.r is None else str(run.r),
                f"{run.num_parameters:,}",
                f"{run.adapter_bytes / 2**20:.2f}",
                str(max(all_steps)) if all_steps else ABSENT,
                f"{seconds[-1]:.0f}" if seconds else ABSENT,
                f"{losses[-1]:.4f}" if steps else ABSENT,
                f"{min(validation):.4f}" if validation else ABSENT,
                f"{max(errors):.1e}" if errors else ABSENT,
            ]
        )
    header = ["run", "method", "r", "adapter parameters", "adapter MiB", "steps", "training s", "last loss"]
    header += ["best validation loss", "largest orthonormality error"]
    return "## Training\n\n" + table(header, rows)


def _spectrum_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        ranks = [spectrum.stable_rank for spectrum in run.spectra]
        if ranks:
            norms = [spectrum.norm for spectrum in run.spectra]
            cells = [f"{value:.2f}" for value in (statistics.median(ranks), min(ranks), max(ranks))]
            rows.append([run.name, str(len(ranks)), *cells, f"{statistics.median(norms):.3g}"])
    if not rows:
        return ""
    header = ["run", "adapted modules", "median", "smallest", "largest", "median norm of delta weight"]
    text = "Stable rank of dW: norm(dW)_F^2 / norm(dW)_2^2, between 1 and r."
    return f"## Stable rank\n\n{text}\n\n" + table(header, rows)


def _num_parameters(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 (not a mapping)
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run polar eval again") from error
    if not isinstance(content, dict) or not {"task", "adapter", "base", "num_problems"} <= set(content):
        raise UserError(f"{path}: not a result of polar eval; move it out of the run folder")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    return content if isinstance(content, dict) else {}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not readable as JSON ({error}); remove the line") from error
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar report`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder (output_dir of polar train)")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the plots")
    parser.add_argument("--title", default="Report", help="first line of the page")


def run(args: argparse.Namespace) -> None:
    """Run `polar report` with parsed arguments."""
    print(write_report([read_run(folder) for folder in args.runs], args.out, args.title))
