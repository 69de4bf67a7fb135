"""The folder of a run: what starting over removes and what it leaves."""

from __future__ import annotations

from pathlib import Path

from polar.run_folder import open_run_folder


def test_starting_over_removes_the_old_run_and_its_scores_and_nothing_else(tmp_path: Path) -> None:
    for name in ("adapter", "checkpoint-7", "eval_gsm8k", "notes"):
        (tmp_path / name).mkdir()
    for name in ("eval_gsm8k/results.json", "adapter/adapter_model.safetensors", "metrics.jsonl", "notes/mine.txt"):
        (tmp_path / name).write_text("old")
    open_run_folder(tmp_path, "seed: 1\n", {"rows": 1}, {"world_size": 1})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "data_report.json", "provenance.json", "notes"}
    assert (tmp_path / "notes" / "mine.txt").read_text() == "old"
