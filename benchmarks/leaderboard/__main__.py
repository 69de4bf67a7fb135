"""How does PoLAR compare in PEFT's own method comparison on MetaMathQA?

Runs our experiment folders in the suite of a PEFT checkout, whose code stays as it is: each in a process of its own,
with the field in the layer's backward and no hook. Everything that the suite needs is checked first; what is missing is
listed with the fix. A finished experiment is not run again. The table has the suite's own committed results beside
ours, from the accelerator that each names.

    --dry_run    needs neither a checkout nor a GPU: each folder through the same steps with a tiny model, on the CPU

Exit code: 0 all experiments have a result; 1 one of them has none (or something does not hold in the dry run); 2 a
requirement is not met.

Usage: python -m benchmarks.leaderboard --peft CHECKOUT [--experiment NAME ...] [--also METHOD/NAME ...] [--out FILE]
       python -m benchmarks.leaderboard --dry_run [--experiment NAME ...] [--model FOLDER] [--data FILE] [--steps 20]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.leaderboard import checks
from benchmarks.leaderboard.folders import EXPERIMENTS, FOLDER, METHOD
from benchmarks.leaderboard.suite import Suite, is_ours, measured, read_result

ROOT = Path(__file__).resolve().parents[2]
SUITE_COLUMNS = {
    "status": "s",
    "test_accuracy": ".4f",
    "forgetting": ".4f",
    "memory_max_gib": ".2f",
    "train_time_s": ".0f",
    "file_size_mib": ".1f",
    "num_trainable_params": ",d",
    "accelerator": "s",
}
DRY_RUN_COLUMNS = {
    "field": "s",
    "train_loss_first": ".4f",
    "train_loss_last": ".4f",
    "held_out_loss_before": ".4f",
    "held_out_loss_after": ".4f",
    "orthonormality_error": ".1e",
    "num_trainable_params": ",d",
    "file_size_kib": ".1f",
    "wall_s": ".1f",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; wrong ones end the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peft", type=Path, metavar="CHECKOUT", help="git checkout of PEFT, installed from there")
    parser.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument(
        "--also",
        nargs="*",
        default=[checks.YARDSTICK],
        metavar="METHOD/NAME",
        help="the suite's own experiments in the table; one without a committed result is run too",
    )
    parser.add_argument("--out", type=Path, help="JSON with the table, commands, versions and commits")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU with a tiny model")
    parser.add_argument("--model", default=str(ROOT / "demo" / "base"), help="dry run: base model (the demo's)")
    parser.add_argument("--data", help="dry run: rows with query and response or question and answer (generated)")
    parser.add_argument("--steps", type=int, default=20, help="dry run: optimizer steps (20)")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and arguments.peft is None:
        parser.error("--peft CHECKOUT is missing: git clone https://github.com/huggingface/peft, or use --dry_run")
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give 1 or more")
    return arguments


def run_suite(suite: Suite, ours: Sequence[str], also: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Check, place, run, collect.

    Returns:
        One record per experiment, and the exit code.
    """
    unmet = checks.unmet_by_checkout(suite)
    experiments = [f"{METHOD}/{name}" for name in ours] + list(dict.fromkeys(also))
    if not unmet:
        folder = suite.folder / "experiments"
        known = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
        unmet = [f"--also {e}: the suite has no METHOD/NAME of this name in {folder}" for e in also if e not in known]
    pending = [] if unmet else [e for e in experiments if suite.finished(e) is None]
    if pending:
        unmet += checks.unmet_by_state(suite, pending) + checks.unmet_by_python()
        unmet += checks.unmet_by_accelerator(suite) + checks.unmet_by_hub(suite, pending)
    if unmet:
        for line in unmet:
            print(f"leaderboard: not met: {line}", file=sys.stderr)
        return [], 2
    if pending:
        counted = "" if suite.branch == "main" else "; the suite counts results of branch main only"
        print(f"branch {suite.branch}: results go to {suite.folder / suite.results_folder}{counted}", flush=True)
    return run_all(suite, experiments)


def run_all(suite: Suite, experiments: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Take or make the result of each experiment, one after the other; a crash of one does not stop the others.

    Returns:
        One record per experiment, and 1 as exit code if one has no successful result, else 0.
    """
    records, interrupted = [], False
    for number, experiment in enumerate(experiments, start=1):
        print(f"[{number}/{len(experiments)}] {experiment}", flush=True)
        record, interrupted = run_one(suite, experiment, skip=interrupted)
        records.append(record)
    return records, int(any(record["status"] != "success" for record in records))


def run_one(suite: Suite, experiment: str, skip: bool) -> tuple[dict[str, Any], bool]:
    """Take an experiment's result, or make it.

    Returns:
        Its record, and whether all that follows is to be skipped too, because Ctrl-C was pressed.
    """
    path, code = suite.finished(experiment), None
    if path is None and not skip:
        if is_ours(experiment):
            suite.place(experiment)
        code, path, skip = suite.run(experiment)
    result = None if path is None else read_result(path)
    if result is not None:
        values = measured(result)
    else:
        values = {"status": "not run: interrupted" if code is None else f"crashed, exit code {code}"}
    command = None if code is None else shlex.join(["python", *suite.command(experiment)[1:]])
    source = None if path is None else str(path.relative_to(suite.folder))
    return {"experiment": experiment, "command": command, "exit_code": code, "result_file": source, **values}, skip


def run_dry(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """All asked experiments through the dry run; what does not hold, on stderr."""
    import polar  # noqa: F401  registers POLAR with PEFT
    from benchmarks.leaderboard import dry_run as dry

    batch = dry.DEFAULTS["batch_size"]
    number = dry.NUM_HELD_OUT + batch * arguments.steps
    rows = dry.read_rows(arguments.data, number) if arguments.data else dry.generated_rows(number)
    setting = dry.Setting(arguments.model, rows, arguments.steps)
    records = [dry.dry_run(FOLDER / name, setting) for name in arguments.experiment]
    for record in records:
        for what in record["broken"]:
            print(f"leaderboard: {record['experiment']}: {what}", file=sys.stderr)
    return records, int(any(record["broken"] for record in records))


def table(records: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Records as lines with aligned columns; "-" for what is not known."""
    cells = [["experiment", *columns]]
    for record in records:
        values = [(record.get(name), form) for name, form in columns.items()]
        cells.append([record["experiment"], *("-" if v is None else format(v, form) for v, form in values)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, show and write; return the exit code."""
    arguments = parse(argv)
    from polar.errors import UserError

    head: dict[str, Any] = {"question": "how does PoLAR compare in PEFT's own method comparison on MetaMathQA"}
    try:
        if arguments.dry_run:
            records, code = run_dry(arguments)
        else:
            suite = Suite(arguments.peft.resolve())
            records, code = run_suite(suite, arguments.experiment, arguments.also)
            if not records:
                return code
            head["peft"] = {"branch": suite.branch, "commit": suite.commit, "dirty": suite.is_dirty}
    except UserError as error:
        print(f"leaderboard: error: {error}", file=sys.stderr)
        return 2
    print(table(records, DRY_RUN_COLUMNS if arguments.dry_run else SUITE_COLUMNS))
    if arguments.out is not None:
        from benchmarks.record import environment
        from polar.files import write_json

        made = environment()
        made["command"] = made["command"].replace(str(Path(__file__).relative_to(ROOT)), "-m benchmarks.leaderboard")
        write_json(arguments.out, {**head, **made, "dry_run": arguments.dry_run, "experiments": records})
    return code


if __name__ == "__main__":
    sys.exit(main())
