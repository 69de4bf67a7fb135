"""`make demo` with few steps: the page shows what the files of the run hold, and the adapters learn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.make_base import accuracy
from demo.problems import SEEN_KINDS, problems

ROOT = Path(__file__).parents[2]
BASE = ROOT / "demo" / "base"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "demo.run", "--out", str(out), "--max_steps", "40", "--num_test", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not done.stderr.strip(), f"noise for the person who runs it: {done.stderr}"
    return out, done.stdout


FOLDERS = {"base": "polar/eval_gsm8k_base", "polar": "polar/eval_gsm8k", "lora": "lora/eval_gsm8k"}


def result(out: Path, name: str) -> dict:
    return json.loads((out / FOLDERS[name] / "results.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_printed_is_what_was_measured(demo, name: str) -> None:
    """Counted again from the generated texts, without the project's extraction."""
    out, text = demo
    rows = [json.loads(line) for line in (out / FOLDERS[name] / "samples_gsm8k.jsonl").read_text().splitlines()]
    right = sum(re.findall(r"#### (\d+)", row["generation"])[:1] == [row["gold"]] for row in rows)
    assert len(rows) == 30
    assert right == result(out, name)["columns"]["strict"]["num_correct"]
    assert f"{100 * right / 30:.1f} ±" in text and f"{100 * right / 30:.1f} ±" in (out / "report.md").read_text()


def test_training_ran_under_zero3_and_learned(demo) -> None:
    out, _ = demo
    for method in ("polar", "lora"):
        provenance = json.loads((out / method / "provenance.json").read_text())
        assert (provenance["engine"], provenance["world_size"]) == ("DeepSpeed ZeRO-3", 2)
        metrics = [json.loads(line) for line in (out / method / "metrics.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in metrics if "loss" in entry]
        assert losses[-1] < losses[0] / 4, losses
        if method == "polar":
            assert max(entry["orthonormality_error"] for entry in metrics if "loss" in entry) < 1e-5


def test_export_is_plain_lora(demo) -> None:
    folder = demo[0] / "polar_as_lora"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert {key.split(".")[-2] for key in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118


def test_report_has_both_pages(demo) -> None:
    out, text = demo
    assert str(out / "report.html") in text
    page = (out / "report.html").read_text()
    for what in ("With PoLAR", "Wall time", "Mathematics", "GSM8K", "Stable rank", "<svg"):
        assert what in page, what
    assert "Not in this report" not in page


def test_base_can_do_what_it_was_taught(demo) -> None:
    """The base solves the kinds that it has seen and not the new one: what the adapter adds is new."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).float(), AutoTokenizer.from_pretrained(BASE)
    assert accuracy(model, tokenizer, list(islice(problems(SEEN_KINDS, seed=31), 40))) > 0.8
    assert result(demo[0], "base")["columns"]["strict"]["value"] < 0.2
