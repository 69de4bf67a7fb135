"""Whether a run can start here: the same command line, on every rank, in seconds, before anything is loaded.

    torchrun --nproc_per_node 8 -m polar.preflight --config configs/X.yaml --output_dir runs/x
    srun ... python -m polar.preflight --config configs/X.yaml --output_dir runs/x    # with the launcher's RANK etc.

Rank 0 prints one table and one line per problem with node, rank, value and fix. Exit code 0, or 2 on every rank when
anything is wrong on any (torchrun itself then ends with 1). Nothing stays on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polar.errors import UserError
from polar.launch import end_process
from polar.monitor import node_name
from polar.preflight_checks import (
    Finding,
    check_caches,
    check_data,
    check_device,
    check_host_memory,
    check_model,
    check_run_folder,
    check_versions,
    device_identity,
    existing_part,
    problem_of,
    versions,
)
from polar.preflight_network import Ranks, check_all_reduce

SEEN_WAIT_S = 5  # a file that another node has just made may take a moment to be seen


@dataclass(frozen=True)
class Report:
    """What one rank found, and on which node."""

    rank: int
    node: str
    findings: list[Finding]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, the same on every rank.

    Args:
        argv: the command line without the program's name; that of the process by default.
    """
    start = time.monotonic()
    needs, options = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    try:
        ranks = Ranks(os.environ, needs.wait_s)
        settings, findings = _read_settings(options)
        with _marker(settings, make=ranks.rank == 0) as marker:
            findings += _check_node(ranks, needs, settings)
            usable = not any(finding.fix for finding in findings if finding.check == "device")
            findings += _check_together(ranks, needs, settings, {"marker": marker, "usable": usable})
            reports = ranks.exchange("reports", {"node": node_name(), "findings": [asdict(f) for f in findings]})
        if ranks.rank == 0:
            read = [_read_report(rank, report) for rank, report in enumerate(reports)]
            print(describe(read, f"{time.monotonic() - start:.1f} s after the imports"), flush=True)
            ranks.share("verdict", any(finding.fix for report in read for finding in report.findings))
        wrong = bool(ranks.shared("verdict"))
        ranks.leave()
    except UserError as error:
        print(f"polar: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 2 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polar.preflight",
        description="Check on every rank whether a run can start. Takes the options of polar.train as well.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--need_device_gib", type=float, metavar="GIB", help="GPU memory that must be free on each rank")
    add("--need_host_gib", type=float, metavar="GIB", help="host memory that must be free on each node")
    add("--need_disk_gib", type=float, metavar="GIB", default=1, help="free disk of output_dir; default: %(default)s")
    add("--need_gb_per_s", type=float, metavar="GB", help="least bus bandwidth of the all-reduce, in GB/s")
    add("--allreduce_mib", type=int, metavar="MIB", help="size of the all-reduce; default: 256 on GPUs, 4 on CPUs")
    add("--wait_s", type=float, metavar="S", default=120, help="wait so long for the other ranks; default: %(default)s")
    return parser


def _read_settings(options: Sequence[str]) -> tuple[dict[str, Any], list[Finding]]:
    """Read the run's own options; where they cannot be read, that is the finding."""
    try:
        from polar.run_config import read_options

        return read_options(options)[0], []
    except UserError as error:
        return {}, [problem_of("settings", error)]
    except ImportError as error:
        return {}, [Finding("settings", f"{error}", "pip install 'polar[train]' in this environment")]


# Checks


def _check_node(ranks: Ranks, needs: argparse.Namespace, settings: dict[str, Any]) -> list[Finding]:
    findings = check_device(bool(settings.get("use_cpu")), ranks.local_rank, needs.need_device_gib)
    findings += check_host_memory(needs.need_host_gib)
    if not settings:  # they could not be read, and what follows would only repeat that
        return findings
    findings += check_run_folder(settings.get("output_dir"), needs.need_disk_gib)
    findings += check_caches()
    findings += check_model(
        settings.get("model_name_or_path"), settings.get("revision"), asks_hub=ranks.local_rank == 0
    )
    for key in ("train_dataset", "val_dataset"):
        findings += check_data(key, settings.get(key))
    return findings


def _check_together(
    ranks: Ranks, needs: argparse.Namespace, settings: dict[str, Any], state: dict[str, Any]
) -> list[Finding]:
    """Compare this rank with the others, then sum over all of them.

    Args:
        ranks: of this start.
        needs: the preflight's own options.
        settings: the run's.
        state: what the others have to know of this rank: `marker`, its file in the run folder; `usable`, its device.
    """
    here: dict[str, Any] = {
        "node": node_name(),
        "device": device_identity(bool(settings.get("use_cpu")), ranks.local_rank),
        "versions": versions(),
        **state,
    }
    facts = ranks.exchange("facts", here)
    findings = check_versions(here["versions"], facts[0]["versions"])
    findings += check_same_devices(ranks.rank, facts)
    if ranks.rank and facts[0]["marker"] and settings.get("output_dir"):
        findings += check_shared(settings["output_dir"], facts[0]["marker"])
    missing = [rank for rank, fact in enumerate(facts) if fact is None]
    if missing:
        if ranks.rank == 0:
            fix = f"see what they say themselves; a slow start needs more than --wait_s {needs.wait_s:g}"
            findings.append(Finding("ranks", f"rank {spans(missing)} did not come to {ranks.where} in time", fix))
        return findings
    devices = {fact["device"] for fact in facts}
    use_gpu = devices != {"cpu"}
    if ranks.world_size == 1:
        return [*findings, Finding("all-reduce", "one process")]
    if not all(fact["usable"] for fact in facts) or (use_gpu and len(devices) != ranks.world_size):
        return [*findings, Finding("all-reduce", "not tried: first mend the devices")]
    mebibytes = needs.allreduce_mib or (256 if use_gpu else 4)
    return findings + check_all_reduce(ranks, use_gpu, mebibytes, needs.need_gb_per_s)


def check_same_devices(rank: int, facts: Sequence[dict[str, Any] | None]) -> list[Finding]:
    """Check that either no rank has a GPU, or each has one of its own."""
    mine = (facts[rank] or {})["device"]
    others = [(r, fact["device"]) for r, fact in enumerate(facts) if fact is not None and r != rank]
    if mine != "cpu":
        sharing = [r for r, device in others if device == mine]
        if sharing:
            fix = "give each rank a GPU of its own: check CUDA_VISIBLE_DEVICES and --gpus-per-task"
            return [Finding("device", f"the same GPU as rank {spans(sharing)}", fix)]
    elif any(device != "cpu" for _, device in others):
        return [Finding("device", "no GPU, while other ranks have one", "start all ranks on one kind of node")]
    return []


def check_shared(output_dir: str, marker: str) -> list[Finding]:
    """Look for the file that rank 0 has made where the run folder will be."""
    folder = existing_part(Path(output_dir).expanduser())
    until = time.monotonic() + SEEN_WAIT_S
    while not (folder / marker).exists():
        if time.monotonic() > until:
            fix = "use an --output_dir on a file system that all nodes share"
            return [Finding("run folder", f"{folder} is not the folder that rank 0 sees", fix)]
        time.sleep(0.2)
    return []


@contextlib.contextmanager
def _marker(settings: dict[str, Any], make: bool) -> Iterator[str | None]:
    """Yield the name of a file that lies where the run folder will be as long as the block lasts."""
    with contextlib.ExitStack() as stack:
        name = None
        if make and settings.get("output_dir"):
            folder = existing_part(Path(settings["output_dir"]).expanduser())
            with contextlib.suppress(OSError):  # which `check_run_folder` reports
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-"))
                name = Path(file.name).name
        yield name


# The table


def _read_report(rank: int, report: dict[str, Any] | None) -> Report:
    if report is None:
        return Report(rank, "?", [])
    return Report(rank, report["node"], [Finding(**finding) for finding in report["findings"]])


def describe(reports: Sequence[Report], duration: str) -> str:
    """Return the table of all checks and one line per problem."""
    by_node: dict[str, list[int]] = {}
    for report in reports:
        by_node.setdefault(report.node, []).append(report.rank)
    nodes = ", ".join(f"{node}: {spans(ranks)}" for node, ranks in by_node.items())
    plural = "s" * (len(reports) > 1)
    lines = [f"preflight of {len(reports)} rank{plural} ({nodes}), {duration}"]
    checks = list(dict.fromkeys(finding.check for report in reports for finding in report.findings))
    width = max(map(len, checks), default=0)
    for check in checks:
        found = [(report, finding) for report in reports for finding in report.findings if finding.check == check]
        wrong = sorted({report.rank for report, finding in found if finding.fix})
        mark = f"WRONG on rank {spans(wrong)}" if wrong else _least([finding for _, finding in found])
        lines.append(f"  {check:{width}}  {mark}")
    problems: dict[tuple[str, str, str, str], list[int]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.fix:
                problems.setdefault((report.node, finding.check, finding.value, finding.fix), []).append(report.rank)
    for (node, check, value, fix), ranks in problems.items():
        lines.append(f"problem on {node}, rank {spans(ranks)}: {check}: {value}: {fix}")
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return "\n".join([*lines, f"preflight: {count if problems else 'nothing wrong'}"])


def _least(findings: Sequence[Finding]) -> str:
    values = list(dict.fromkeys(finding.value for finding in findings))
    amounts = [finding for finding in findings if finding.amount is not None]
    if len(values) > 1 and amounts:
        return f"{min(amounts, key=lambda finding: finding.amount or 0).value} (the least of {len(findings)})"
    return values[0] if len(values) == 1 else f"{values[0]} (and {len(values) - 1} more)"


def spans(numbers: Sequence[int]) -> str:
    """Write sorted numbers shortly: [0, 1, 2, 5] -> "0-2,5"."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


if __name__ == "__main__":
    end_process(main())
