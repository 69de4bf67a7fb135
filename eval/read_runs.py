"""What `polar report` reads: finished runs and their scores, below any folders; what cannot be read becomes a line.

Nothing is computed twice: curves come from `metrics.jsonl`, cost from `done.json`, spectra and sizes from the adapters,
the method from their config, ranks by layer from `ranks.json`, scores from each `results.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from polar.adapter_file import WEIGHTS_NAME, AdapterFile, find_adapter, read_config
from polar.adapter_formats import method_name, read_any_adapter
from polar.checkpoint import list_checkpoints, step_of
from polar.errors import UserError
from polar.rank_file import read_rank_file
from polar.run_folder import DONE, read_done
from polar.run_ranks import RANKS_NAME
from polar.spectrum import ModuleSpectrum, spectra_of
from polar_eval.results import RESULT_NAME

RUN_FILES = ("config.yaml", "metrics.jsonl", "provenance.json")
MAX_DEPTH = 5  # folders below a given one that are searched for runs
REQUIRED = {"task", "columns", "adapter", "base", "num_problems"}  # of results.json, whose fields eval/results.py has


@dataclass(frozen=True)
class Run:
    """What the report knows about one run, or about an adapter that was scored without its run.

    Attributes:
        name: folder name, with as much of the path before it as tells it from the others.
        folder: where it lies; None: the adapter's folder is not on this machine.
        config: `config.yaml`; empty without a run.
        metrics: one entry per line of `metrics.jsonl`, in the order of the file.
        adapter: `adapter_config.json`; empty if it is not there.
        method: PoLAR, LoRA, rsLoRA, DoRA or PEFT's name, with -AR for ranks by layer and with the bits of a quantised
            base; "base" for a base model alone.
        spectra: of the final adapter; empty where the method has none here.
        checkpoint_spectra: step -> the same, for every readable checkpoint and the final adapter.
        num_parameters, adapter_bytes: of the adapter file; None without one.
        done: `done.json`; empty without a run.
        ranks: `ranks.json`, ranks by layer; None where all layers have the same.
        results: each `results.json` of `polar eval` on this adapter, and on its base in the run's folder.
    """

    name: str
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    method: str = "base"
    spectra: list[ModuleSpectrum] = field(default_factory=list)
    checkpoint_spectra: dict[int, list[ModuleSpectrum]] = field(default_factory=dict)
    num_parameters: int | None = None
    adapter_bytes: int | None = None
    done: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def r(self) -> str:
        """Adapter rank, or `lowest-highest`; empty where there is none."""
        if self.ranks is not None:
            found = sorted(entry["r"] for entry in self.ranks["modules"].values() if entry.get("r"))
        else:
            found = [self.adapter["r"]] if isinstance(self.adapter.get("r"), int) else []
        return "" if not found else str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"

    @property
    def stable_ranks(self) -> list[float]:
        """Stable ranks of the modules whose delta weight is not zero."""
        return [spectrum.stable_rank for spectrum in self.spectra if spectrum.norm > 0]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged."""
        points = [(m["step"], m[key]) for m in self.metrics if isinstance(m.get(key), int | float) and "step" in m]
        return [p[0] for p in points], [p[1] for p in points]


@dataclass
class Found:
    """Everything below the folders of a report.

    Attributes:
        runs: finished runs, scored adapters, scored base models.
        problems: a line for each thing that is not in the report, or only in part, with the reason.
    """

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_results(paths: Sequence[Path]) -> Found:
    """Read runs, folders of runs and folders with scores.

    Args:
        paths: of any of these kinds, mixed; what lies below several of them is read once.

    Raises:
        UserError: nothing below them can be reported.
    """
    found = Found()
    places: dict[Path, Path] = {}
    for path in paths:
        num_problems = len(found.problems)
        below = _search(path, MAX_DEPTH, found.problems)
        if not below and len(found.problems) == num_problems:
            found.problems.append(f"{path}: no run and no score in it")
        places |= {folder.resolve(): folder for folder in below if folder.resolve() not in places}
    names = unique_names(list(places.values()))
    runs = [folder for folder in places.values() if _is_run(folder)]
    found.runs = [run for folder in runs if (run := _read_unless_broken(folder, names[folder], found.problems))]
    inside = {folder.resolve() for folder in runs}
    scores = [folder for place, folder in places.items() if not _is_run(folder) and place.parent not in inside]
    _add_scores(scores, names, found)
    if not found.runs:
        first = found.problems[0] if found.problems else "no folder was given"
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(f"nothing to report: {first}{more}")
    return found


def _search(path: Path, depth: int, problems: list[str]) -> list[Path]:
    """Return the run folders and score folders at and below a path."""
    if path.name in (RESULT_NAME, DONE) and path.is_file():
        path = path.parent
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        problems.append(f"{path}: {'no such folder' if not path.exists() else error.strerror}")
        return []
    if _is_run(path) or (path / RESULT_NAME).is_file():
        return [path]
    folders = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    return [place for child in folders for place in _search(child, depth - 1, problems)] if depth > 0 else []


def _is_run(folder: Path) -> bool:
    """Whether it is a run's, finished or not, or an adapter's with scores in it."""
    if _was_trained(folder):
        return True
    return (folder / "adapter_config.json").is_file() and any(folder.glob(f"*/{RESULT_NAME}"))


def _was_trained(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*RUN_FILES, DONE)) or bool(list_checkpoints(folder))


def unique_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return for each folder the shortest end of its path that no other folder has."""
    parts = {folder: folder.resolve().parts for folder in folders}
    names = {}
    for folder in folders:
        length = 1
        while length < len(parts[folder]) and any(
            other != folder and parts[other][-length:] == parts[folder][-length:] for other in folders
        ):
            length += 1
        names[folder] = "/".join(parts[folder][-length:])
    return names


def _read_unless_broken(folder: Path, name: str, problems: list[str]) -> Run | None:
    """Read a run, or say in a line why not."""
    if _was_trained(folder) and not (folder / DONE).is_file():
        last = [path.name for path in list_checkpoints(folder)][-1:]
        where = f"newest is {last[0]}" if last else "no checkpoint"
        problems.append(f"{folder}: not finished ({where}), left out; the same command with --resume goes on with it")
        return None
    run: Run | None = _or_line(lambda: read_run(folder, problems, name), problems, folder)
    if run is not None and not any(result["adapter"] for result in run.results):
        problems.append(f"{folder}: not scored; `polar eval {folder} --tasks TASK` does it")
    return run


def read_run(folder: Path, problems: list[str] | None = None, name: str | None = None) -> Run:
    """Read a finished run.

    Args:
        folder: `output_dir` of the run, or an adapter folder with scores in it.
        problems: gets a line for each file that is left out because it cannot be read; None: such a file is an error.
        name: in tables; default: the folder's.

    Raises:
        UserError: no adapter in it, or a broken file that `problems` does not take.
    """
    adapter = find_adapter(folder)
    config = read_config(adapter)
    settings = _or_line(lambda: _read_yaml(folder / "config.yaml"), problems) or {}
    ranks = None
    if (folder / RANKS_NAME).is_file():
        ranks = _or_line(lambda: read_rank_file(folder / RANKS_NAME), problems)
    factors = _or_line(lambda: _factors(adapter, config), problems)
    spectra = spectra_of(factors) if factors is not None else []
    done = read_done(folder) or {}
    weights = adapter / WEIGHTS_NAME
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        config=settings,
        metrics=_read_jsonl(folder / "metrics.jsonl", problems),
        adapter=config,
        method=_method(config if factors is None else factors.config, settings, ranks),
        spectra=spectra,
        checkpoint_spectra=_checkpoint_spectra(folder, spectra, done, problems),
        num_parameters=_or_line(lambda: _num_parameters(weights), problems),
        adapter_bytes=weights.stat().st_size if weights.is_file() else None,
        done=done,
        ranks=ranks,
        results=[
            result
            for file in sorted(folder.glob(f"*/{RESULT_NAME}"))
            if (result := _or_line(lambda file=file: read_result(file), problems)) is not None  # type: ignore[misc]
        ],
    )


def _or_line(read: Callable[[], Any], problems: list[str] | None, folder: Path | None = None) -> Any:
    """Return what `read` returns; where it raises, None, and a line more."""
    try:
        return read()
    except UserError as error:
        if problems is None:
            raise
        problems.append(f"{folder}: left out: {error}" if folder else f"left out: {error}")
        return None


def _method(adapter: dict[str, Any], settings: dict[str, Any], ranks: dict[str, Any] | None) -> str:
    """Name of the method, with what makes it another one: ranks by layer (-AR, as in LoRA-AR), a quantised base."""
    bits = next((f", {bits}-bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    return method_name(adapter) + ("-AR" if ranks else "") + bits


def _factors(adapter: Path, config: dict[str, Any]) -> AdapterFile | None:
    """Read a low-rank adapter, with the config of the method that it is: the paper's own say LORA; None of others."""
    return read_any_adapter(adapter) if config["peft_type"] in ("POLAR", "LORA") else None


def _checkpoint_spectra(
    folder: Path, final: list[ModuleSpectrum], done: dict[str, Any], problems: list[str] | None
) -> dict[int, list[ModuleSpectrum]]:
    by_step = {}
    for checkpoint in list_checkpoints(folder):
        factors = _or_line(lambda at=checkpoint: _factors(at, read_config(at)), problems)  # type: ignore[misc]
        if factors is not None:
            by_step[step_of(checkpoint)] = spectra_of(factors)
    if by_step and final and isinstance(done.get("adapter_step"), int):
        by_step.setdefault(done["adapter_step"], final)
    return dict(sorted(by_step.items()))


def _add_scores(folders: Sequence[Path], names: dict[Path, str], found: Found) -> None:
    """Put scores that were given without their run to it, if it can be found, else to an adapter of their own."""
    by_owner: dict[Path, list[dict[str, Any]]] = {}
    for folder in folders:
        result = _or_line(lambda at=folder: read_result(at / RESULT_NAME), found.problems)  # type: ignore[misc]
        if result is not None:
            by_owner.setdefault(_owner(folder, result), []).append(result)
    for owner, results in by_owner.items():
        run = next((run for run in found.runs if run.folder and run.folder.resolve() == owner.resolve()), None)
        if run is not None:
            run.results.extend(result for result in results if result not in run.results)
            continue
        name = names.get(owner, owner.name)
        about = results[0]["adapter"]
        if not (owner / RESULT_NAME).is_file():
            run = _read_unless_broken(owner, name, found.problems)
            if run is not None:
                found.runs.append(replace(run, results=results))
        else:
            method = "base" if about is None else method_name({"peft_type": about["peft_type"]})
            found.runs.append(Run(name, folder=owner, method=method, results=results))


def _owner(folder: Path, result: dict[str, Any]) -> Path:
    """Return the run or adapter that a score belongs to; the score's folder where that is not here."""
    if _is_run(folder.parent):
        return folder.parent
    about = result["adapter"]
    if about is None or not (Path(about["folder"]) / "adapter_config.json").is_file():
        return folder
    adapter = Path(about["folder"])
    return adapter.parent if _was_trained(adapter.parent) else adapter


def read_result(path: Path) -> dict[str, Any]:
    """Read one results.json.

    Raises:
        UserError: unreadable, or not a result of `polar eval` or of a GLUE run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run polar eval again") from error
    if not isinstance(content, dict) or not set(content) >= REQUIRED or not content["columns"]:
        raise UserError(f"{path}: not a result of polar eval; score again, or move it out of the folder")
    return content


def _num_parameters(weights: Path) -> int | None:
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        return None
    total = 0
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                total += size
    except SafetensorError as error:
        raise UserError(f"{weights}: not readable ({error}); save the adapter again") from error
    return total


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    return content if isinstance(content, dict) else {}


def _read_jsonl(path: Path, problems: list[str] | None) -> list[dict[str, Any]]:
    """Entries of the lines that are JSON objects; every other line is a problem."""
    if not path.is_file():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
            entries.append(entry)
        except ValueError as error:
            text = f"{path}:{number}: not readable as JSON ({error})"
            if problems is None:
                raise UserError(f"{text}; remove the line") from error
            problems.append(f"left out: {text}")
    return entries
