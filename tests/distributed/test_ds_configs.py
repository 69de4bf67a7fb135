"""Each file of ds_configs/ sets up a real DeepSpeed engine on two gloo ranks that trains what the others train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.commands import ROOT, environment, metrics

WORKER = Path(__file__).with_name("ds_configs_worker.py")
FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path, tiny_rows: Path) -> Path:
    folder = tmp_path_factory.mktemp("ds_configs")
    command = [sys.executable, str(WORKER), str(folder), str(tiny_gemma3), str(tiny_rows)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", FILES)
def test_engine_is_what_the_file_says(runs: Path, name: str) -> None:
    assert json.loads((runs / name / "done.json").read_text())["engine"] == f"DeepSpeed ZeRO-{name[4]}"
    assert json.loads((runs / name / "done.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("name", FILES)
def test_all_of_them_train_the_same(runs: Path, name: str) -> None:
    """bf16, the default: sums in another order are rounded to 8 bits."""
    losses = metrics(runs / name, "loss")
    assert len(losses) == 2
    assert losses == pytest.approx(metrics(runs / "zero1", "loss"), rel=5e-3)
    assert max(metrics(runs / name, "orthonormality_error")) < 1e-5
