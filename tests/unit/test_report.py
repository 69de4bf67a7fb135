"""The report shows what the run folders hold: each checked number is read back from the page or recomputed."""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polar.errors import UserError
from polar_eval.report import add_arguments, read_run, run, write_report


def report(folders: list[Path], out: Path, *options: str) -> Path:
    """What `polar report` does with its arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([*map(str, folders), "--out", str(out), *options]))
    return out / "report.md"


def result(adapter: str | None, share: float) -> dict:
    strict = {"value": share, "stderr": 0.0367, "num_correct": int(share * 100), "num_without_answer": 3}
    flexible = {"value": share, "stderr": None, "num_correct": int(share * 100), "num_without_answer": 0}
    return {
        "task": "gsm8k_polar",
        "num_problems": 100,
        "columns": {"strict": strict, "flexible": flexible},
        "adapter": None if adapter is None else {"peft_type": adapter, "folder": "x"},
        "base": "demo/base",
        "prompt_sha256": "0" * 64,
    }


def write_run(folder: Path, method: str, seed: int) -> Path:
    """A finished run with one adapted module of each of two types in two layers."""
    torch.manual_seed(seed)
    (folder / "adapter").mkdir(parents=True)
    config = {"peft_type": method, "r": 4, "alpha": 8, "lora_alpha": 8, "theta": "full", "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        for kind in ("q_proj", "down_proj"):
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            if method == "POLAR":
                tensors[f"{stem}.polar_X"] = torch.eye(12, 4)
                tensors[f"{stem}.polar_Y"] = torch.eye(10, 4)
                tensors[f"{stem}.polar_Theta"] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5]))  # stable rank 3.25
            else:
                tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 10)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(12, 1) @ torch.randn(1, 4)  # stable rank 1
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    lines = []
    for step in range(5, 41, 5):
        lines.append({"step": step, "loss": 2.0 / step})
        if method == "POLAR":
            lines[-1]["orthonormality_error"] = 1e-7 * step
    lines += [{"step": 40, "eval_loss": 0.125}, {"step": 40, "train_runtime": 61.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, adapter, share in (("eval_gsm8k", method, 0.84), ("eval_gsm8k_base", None, 0.07)):
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(result(adapter, share)))
    return folder


def rows_of(page: str, heading: str) -> list[dict[str, str]]:
    """The rows of the table under a heading."""
    part = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [write_run(tmp_path / "runs" / name, method, 0) for name, method in (("polar", "POLAR"), ("lora", "LORA"))]


def test_page_shows_what_the_runs_hold(runs, tmp_path) -> None:
    page = report(runs, tmp_path / "out", "--title", "Two runs").read_text()
    assert page.startswith("# Two runs\n")
    scores = rows_of(page, "Scores")
    assert [row["model"] for row in scores] == ["base model", "polar adapter", "lora adapter"]
    assert [row["right answers, %"] for row in scores] == ["7.0 ± 3.7", "84.0 ± 3.7", "84.0 ± 3.7"]
    assert {row["right last number, %"] for row in scores} == {"7.0", "84.0"}
    polar, lora = rows_of(page, "Training")
    assert (polar["method"], lora["method"]) == ("POLAR", "LORA")
    assert (polar["steps"], polar["training s"], polar["last loss"]) == ("40", "61", "0.0500")
    assert polar["best validation loss"] == "0.1250"
    assert (polar["largest orthonormality error"], lora["largest orthonormality error"]) == ("4.0e-06", "-")
    assert polar["adapter parameters"] == str(4 * (12 * 4 + 10 * 4 + 4 * 4))
    polar, lora = rows_of(page, "Stable rank")
    assert (polar["median"], polar["adapted modules"]) == ("3.25", "4")
    assert (lora["smallest"], lora["largest"]) == ("1.00", "1.00")


def test_every_plot_on_the_page_is_a_picture(runs, tmp_path) -> None:
    page = report(runs, tmp_path / "out")
    names = [line.split("(")[-1].rstrip(")") for line in page.read_text().splitlines() if line.startswith("![")]
    assert names == ["loss.png", "orthonormality_error.png", "stable_rank.png"]
    assert all(min(png_size(page.parent / name)) > 300 for name in names)
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*names, "report.md"])


def test_what_no_run_has_is_left_out(runs, tmp_path) -> None:
    lora = runs[1]
    for folder in lora.glob("eval_*"):
        (folder / "results.json").unlink()
    page = report([lora], tmp_path / "out").read_text()
    assert "orthonormality_error.png" not in page and "## Scores" not in page
    assert not (tmp_path / "out" / "orthonormality_error.png").exists()


def test_bad_run_folders(runs, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        report([tmp_path], tmp_path / "out")
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    with pytest.raises(UserError, match=r"metrics\.jsonl:11: not readable"):
        report([runs[0]], tmp_path / "out")
    (runs[1] / "eval_gsm8k" / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(UserError, match="not a result of polar eval"):
        report([runs[1]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_written(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'polar\[plots\]'"):
        write_report([read_run(folder) for folder in runs], tmp_path / "out")
    assert not (tmp_path / "out").exists()
