"""A run under ZeRO-3 on two ranks that is stopped goes on there, on other numbers of ranks, under other engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.commands import ROOT, deepspeed_command, deepspeed_train, environment, metrics
from tests.integration.resume_worker import ELSEWHERE, ROWS, SIZE_LIMIT, STEPS, STOP, ZERO3, engine_settings
from tests.tiny import addition_rows, write_jsonl

WORKER = Path(__file__).with_name("resume_worker.py")
# float32, the same rows in every step, sums over ranks in another order: as between engines in test_train.py.
LOSS_TOLERANCE = 1e-4
VALUE_TOLERANCE = 2e-3  # of values up to 1, after 4 steps with a learning rate of 1e-2
JSON_BYTES, RANK_BYTES = 30_000, 40_000  # settings, schedule and logs; the generators of a rank
END_S = 60  # from the death of one rank to the end of the job, on two busy cores


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", addition_rows(ROWS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path, rows: Path) -> Path:
    """`reference`, not stopped; a folder for each of ELSEWHERE; `full disk`."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(WORKER), "engines", str(folder), str(tiny_gemma3), str(rows)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", [name for name, *_ in ELSEWHERE])
def test_run_continues_elsewhere(runs: Path, name: str) -> None:
    """From the middle of the second epoch, whose order of rows differs from the first one's."""
    run, reference = runs / name, runs / "reference"
    assert f"checkpoint-{STOP}: step {STOP} of {STEPS}, made by 2 processes" in (runs / f"{name}.log0").read_text()
    for key in ("loss", "eval_loss"):
        assert metrics(run, key) == pytest.approx(metrics(reference, key), rel=LOSS_TOLERANCE)
    assert metrics(run, "step") == metrics(reference, "step")
    for key, value in load_file(reference / "adapter" / "adapter_model.safetensors").items():
        found = load_file(run / "adapter" / "adapter_model.safetensors")[key]
        torch.testing.assert_close(found, value, rtol=0, atol=VALUE_TOLERANCE)
    losses = metrics(reference, "loss")
    assert max(losses) / min(losses) - 1 > 10 * LOSS_TOLERANCE  # the curve is not flat within the tolerance


@pytest.mark.parametrize("name", ["reference", *(name for name, *_ in ELSEWHERE)])
def test_checkpoint_holds_the_adapter_and_nothing_of_the_base(runs: Path, name: str) -> None:
    """A value and two moments of 4 bytes for each trained element, the adapter for PEFT, and JSON per rank."""
    folder, layers, r = runs / name / "checkpoint-9", 2, 5
    shapes = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 128)}
    numel = layers * sum((n + m) * r + r * r for n, m in shapes.values())
    ranks = json.loads((folder / "training_state.json").read_text())["world_size"]
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    tensors = load_file(folder / "training_state.safetensors"), load_file(folder / "adapter_model.safetensors")
    for file, whole, copies in (("training_state", tensors[0], 3), ("adapter_model", tensors[1], 1)):
        assert all(".polar_" in key for key in whole)
        assert len(whole) == copies * layers * len(shapes) * 3
        assert sum(tensor.numel() for tensor in whole.values()) == copies * numel
        assert files[f"{file}.safetensors"] <= 4 * copies * numel + 200 * len(whole)
    assert {key.partition("/")[0] for key in tensors[0]} == {"value", "exp_avg", "exp_avg_sq"}
    assert {Path(file).suffix for file in files} == {".json", ".safetensors"}
    assert sum(size for file, size in files.items() if file.endswith(".json")) < JSON_BYTES + ranks * RANK_BYTES


def test_checkpoint_that_cannot_be_written_ends_all_ranks(runs: Path) -> None:
    """Files may not grow beyond SIZE_LIMIT, as on a full disk; safetensors raises an exception of its own."""
    codes = json.loads((runs / "full disk.json").read_text())
    assert codes == [1, 1]
    for rank in range(2):
        assert "checkpoint-2 was not saved" in (runs / f"full disk.log{rank}").read_text()
    assert not list((runs / "full disk").glob("*checkpoint-*"))
    tensors = runs / "reference" / "checkpoint-3" / "training_state.safetensors"
    assert tensors.stat().st_size > SIZE_LIMIT


def test_two_kills_without_a_launcher_lose_nothing(runs: Path) -> None:
    """Rank 0 dies in the save of step 6, rank 1 in step 8: the other rank ends too, and the next start goes on."""
    dead = -signal.SIGKILL
    assert json.loads((runs / "killed.json").read_text()) == [[dead, 1], [1, dead]]
    for log, line in (
        ("killed 0.log0", "starting afresh"),
        ("killed 1.log0", f"checkpoint-3: step 3 of {STEPS}, made by 2 processes"),
        ("killed.log0", f"checkpoint-6: step 6 of {STEPS}, made by 2 processes"),
    ):
        assert line in (runs / log).read_text()
    _assert_equal(runs / "killed", runs / "reference")


def test_signal_to_one_rank_stops_all_at_the_same_step_and_loses_nothing(runs: Path) -> None:
    """Rank 1 is asked in step 3; rank 0, which writes the checkpoint, was not."""
    assert json.loads((runs / "asked to stop.json").read_text()) == ["checkpoint-3"]
    log = (runs / "asked to stop 0.log0").read_text()
    assert f"stopped at step 3 of {STEPS} by SIGUSR2" in log
    assert "validation loss" not in log  # the evaluation of step 3 has to wait for the next start
    _assert_equal(runs / "asked to stop", runs / "reference")
    done = json.loads((runs / "asked to stop" / "done.json").read_text())
    assert (done["step"], done["num_starts"], done["world_size"]) == (STEPS, 2, 2)


@dataclass
class Killed:
    run: Path
    settings: list[str]
    code: int
    seconds: float
    output: str
    survivors: list[int]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path, rows: Path) -> Iterator[Killed]:
    """A run under the deepspeed launcher whose rank 1 is killed when the first checkpoint is there."""
    run = tmp_path_factory.mktemp("killed") / "run"
    settings = [*engine_settings(str(tiny_gemma3), str(rows)), "--per_device_train_batch_size", "6", *ZERO3]
    command = deepspeed_command(*settings, "--output_dir", str(run), "--resume")
    with (run.parent / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while not (run / "checkpoint-3").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        ranks = _ranks(job.pid)
        os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        code = job.wait(timeout=100)
        seconds = time.monotonic() - begin
        survivors = [pid for pid in ranks.values() if _is_alive(pid)]
    finally:
        with_group = [pid for pid in _group(job.pid) if _is_alive(pid)]
        for pid in with_group:
            os.kill(pid, signal.SIGKILL)
    yield Killed(run, settings, code, seconds, (run.parent / "log").read_text(), survivors)


def test_killed_rank_ends_the_job(killed: Killed) -> None:
    """The launcher kills the other rank, which would otherwise wait in a collective, and reports a failure."""
    assert killed.code != 0
    assert killed.seconds < END_S
    assert killed.survivors == []
    assert not (killed.run / f"checkpoint-{STEPS}").exists(), "it was killed too late"


def test_run_with_a_killed_rank_resumes_bit_for_bit(killed: Killed, runs: Path) -> None:
    """The reference never stopped, and its ranks were not even started by the launcher."""
    resumed = deepspeed_train(*killed.settings, "--output_dir", str(killed.run), "--resume").stdout
    assert "checkpoint-3: step 3 of" in resumed or "checkpoint-6: step 6 of" in resumed
    _assert_equal(killed.run, runs / "reference")


def _assert_equal(run: Path, reference: Path) -> None:
    """Values, moments, adapter and logs are the same bit for bit, and nothing unfinished is left."""
    for name in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/training_state.safetensors"):
        found, expected = load_file(run / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    for key in ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "num_tokens"):
        assert metrics(run, key) == metrics(reference, key)
    assert not list(run.glob(".*"))


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and process group of every process, by id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(folder.name)] = (int(fields[1]), int(fields[2]))
    return found


def _group(leader: int) -> list[int]:
    return [pid for pid, (_, group) in _processes().items() if group == leader]


def _ranks(launcher: int) -> dict[int, int]:
    """Process ids of the ranks below a launcher, by rank: those whose parents have no rank."""
    processes, ranks = _processes(), {}
    for pid, (parent, _) in processes.items():
        above = parent
        while above in processes and above != launcher:
            above = processes[above][0]
        if above == launcher and _rank(pid) is not None and _rank(parent) is None:
            ranks[int(_rank(pid) or 0)] = pid
    return ranks


def _rank(pid: int) -> str | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), None)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
