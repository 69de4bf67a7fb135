"""GLUE by the training command, on real rows: engines, accumulation, resume, heads, scores."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import polar  # noqa: F401  registers POLAR
from polar.cli import main as polar_command
from polar.export import export_lora
from polar.glue import TASKS
from tests.integration.commands import ROOT, environment, metrics
from tests.integration.glue_worker import RUNS, STEPS_PER_EPOCH
from tests.shared_data import shared_data
from tests.tiny_glue import HEADERS, make_deberta, write_task

WORKER = Path(__file__).with_name("glue_worker.py")
TRAIN_ROWS, DEV_ROWS = 60, 51  # of the real files
# float32, the same rows in every step, sums over ranks in another order.
LOSS_TOLERANCE, VALUE_TOLERANCE = 1e-4, 2e-3
LOGIT_TOLERANCE = 1e-5  # the same weights in another process, in other batches


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, real = tmp_path_factory.mktemp("glue"), shared_data("glue")
    texts = []
    for task in HEADERS:
        write_task(folder / "glue", task, TRAIN_ROWS, 7)
        if (real / task).is_dir():
            for name, number in (("train", TRAIN_ROWS), ("dev", DEV_ROWS)):
                lines = (real / task / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
                (folder / "glue" / task / f"{name}.tsv").write_text("".join(lines[: number + 1]), encoding="utf-8")
                texts += lines[:200]
    make_deberta(folder / "base", texts)
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def result(run: Path) -> dict[str, Any]:
    (file,) = run.glob("eval_glue_*/results.json")
    return json.loads(file.read_text())


def samples(run: Path) -> list[dict[str, Any]]:
    (file,) = run.glob("eval_glue_*/samples_glue_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", ["ZeRO-3", "FSDP2", "resumed on one"])
def test_engines_train_the_same_model_and_see_the_same_rows(runs: Path, name: str) -> None:
    """Independent computation: one process, whole batches, no collective. The head begins and ends the same."""
    one, other = runs / "one", runs / name
    for key in ("loss", "eval_loss", "grad_norm"):
        assert metrics(other, key) == pytest.approx(metrics(one, key), rel=LOSS_TOLERANCE)
    assert len(metrics(one, "loss")) == 2 * STEPS_PER_EPOCH and len(metrics(one, "eval_accuracy")) == 2
    assert metrics(other, "eval_accuracy") == metrics(one, "eval_accuracy")
    assert [row["gold"] for row in samples(other)] == [row["gold"] for row in samples(one)]
    for key, value in adapter(one).items():
        torch.testing.assert_close(adapter(other)[key], value, rtol=0, atol=VALUE_TOLERANCE)


def test_resumed_run_is_the_whole_run(runs: Path) -> None:
    """Under ZeRO-3 from the end of the first epoch, bit for bit, the head as well."""
    for key in ("loss", "eval_loss", "eval_accuracy", "grad_norm"):
        assert metrics(runs / "resumed", key) == metrics(runs / "ZeRO-3", key)
    assert f"checkpoint-{STEPS_PER_EPOCH}: step {STEPS_PER_EPOCH} of" in (runs / "resumed.log0").read_text()
    last = f"checkpoint-{2 * STEPS_PER_EPOCH}/training_state.safetensors"
    whole, resumed = load_file(runs / "ZeRO-3" / last), load_file(runs / "resumed" / last)
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert sum("modules_to_save" in key for key in whole) == 3 * 4  # value and moments of two weights and biases


@pytest.mark.parametrize("name", ["one", "ZeRO-3", "lora DDP"])
def test_saved_adapter_gives_the_logits_and_scores_of_the_training(runs: Path, name: str) -> None:
    """Stock PEFT on a base whose new head is drawn from another seed, rows by csv, accuracy by scikit-learn."""
    run = runs / name
    with (runs / "glue" / "rte" / "dev.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = AutoTokenizer.from_pretrained(runs / "base")
    torch.manual_seed(12345)
    base = AutoModelForSequenceClassification.from_pretrained(runs / "base", num_labels=2)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    texts = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    batch = tokenizer(*texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    found = samples(run)
    assert len(found) == len(rows) == DEV_ROWS
    torch.testing.assert_close(logits, torch.tensor([row["logits"] for row in found]), rtol=0, atol=LOGIT_TOLERANCE)
    names = ["entailment", "not_entailment"]
    accuracy = accuracy_score([row["label"] for row in rows], [names[i] for i in logits.argmax(dim=1)])
    assert result(run)["columns"]["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-12)
    assert max(metrics(run, "eval_accuracy")) == result(run)["columns"]["accuracy"]["value"]
    steps = dict(zip((STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH), metrics(run, "eval_accuracy"), strict=True))
    assert steps[result(run)["step"]] == max(steps.values()), "chosen by accuracy, the first of equals"


@pytest.mark.parametrize("name", ["one", "lora DDP", "stsb", "mnli ZeRO-2"])
def test_polar_eval_scores_the_saved_adapter_as_the_training_did(runs: Path, tmp_path: Path, name: str) -> None:
    """Rows of unequal length in other batches, the head from its file, a PoLAR adapter as plain LoRA."""
    trained = result(runs / name)
    command = [str(runs / name), "--tasks", trained["task"], "--data_dir", str(runs / "glue"), "--batch_size", "5"]
    assert polar_command(["eval", *command, "--out", str(tmp_path / "scored")]) == 0
    scored = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert scored["num_problems"] == trained["num_problems"] and scored["parts"] == trained["parts"]
    assert scored["headline"] == trained["headline"] and list(scored["columns"]) == list(trained["columns"])
    (file,) = (tmp_path / "scored").glob("samples_glue_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["gold"] for row in rows] == [row["gold"] for row in samples(runs / name)]
    wanted = torch.tensor([row["logits"] for row in samples(runs / name)])
    torch.testing.assert_close(torch.tensor([row["logits"] for row in rows]), wanted, rtol=0, atol=LOGIT_TOLERANCE)
    for key, column in scored["columns"].items():
        assert column["value"] == pytest.approx(trained["columns"][key]["value"], abs=1e-4)
        assert column["stderr"] == pytest.approx(trained["columns"][key]["stderr"], abs=1e-4)


def test_polar_eval_keeps_a_finished_glue_result(runs: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "scored", ["eval", str(runs / "one"), "--tasks", "glue_rte", "--limit", "6"]
    command += ["--data_dir", str(runs / "glue"), "--out", str(out)]
    assert polar_command(command) == 0
    assert json.loads((out / "results.json").read_text())["num_problems"] == 6
    written = (out / "results.json").stat().st_mtime_ns
    assert polar_command(command) == 2  # there already
    assert polar_command([*command, "--resume"]) == 0
    assert (out / "results.json").stat().st_mtime_ns == written
    assert polar_command([*command, "--limit", "7", "--resume"]) == 2  # other rows are another result


@pytest.mark.parametrize(
    ("run", "arguments", "line"),
    [
        ("one", ["--tasks", "glue_cola"], "was trained on glue_rte, not on glue_cola"),
        ("one", ["--tasks", "glue_mnli"], "has a head with 2 outputs, glue_mnli needs 3"),
        ("one", ["--tasks", "glue_rte,gsm8k"], "a head answers one task; score glue_rte alone"),
        ("one", ["--tasks", "glue_rte", "--base_only"], "the head was saved with the adapter"),
        ("one", ["--tasks", "glue_rte", "--template", "alpaca"], "--template: glue_rte has no prompts"),
        ("one", ["--tasks", "glue_rte", "--data_dir", "nowhere/at/all"], "--data_dir nowhere/at/all: no such folder"),
    ],
)
def test_polar_eval_refuses_what_a_head_cannot_answer(
    runs: Path, capsys: pytest.CaptureFixture[str], run: str, arguments: list[str], line: str
) -> None:
    assert polar_command(["eval", str(runs / run), *arguments]) == 2
    assert line in capsys.readouterr().err


def test_polar_eval_refuses_a_head_that_was_not_saved_whole(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stock PEFT saves of DeBERTa: the classifier, not the pooler below it."""
    base = AutoModelForSequenceClassification.from_pretrained(runs / "base", num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "stock")
    command = ["eval", str(tmp_path / "stock"), "--tasks", "glue_rte", "--data_dir", str(runs / "glue")]
    assert polar_command([*command, "--base", str(runs / "base"), "--out", str(tmp_path / "out")]) == 2
    assert "was saved without pooler, which no base has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["one", "ZeRO-3", "FSDP2"])
def test_head_is_trained_and_saved_whole_in_fp32(runs: Path, name: str) -> None:
    """peft#2450: under ZeRO-3 modules_to_save came out empty. Step 0 is a head drawn anew from the run's seed."""
    tensors = adapter(runs / name)
    head = {key: value for key, value in tensors.items() if "polar_" not in key}
    shapes = {"pooler.dense.weight": (32, 32), "pooler.dense.bias": (32,)}
    shapes |= {"classifier.weight": (2, 32), "classifier.bias": (2,)}
    assert {key.removeprefix("base_model.model."): tuple(v.shape) for key, v in head.items()} == shapes
    assert all(value.dtype == torch.float32 for value in tensors.values())
    torch.manual_seed(0)
    drawn = AutoModelForSequenceClassification.from_pretrained(runs / "base", num_labels=2).state_dict()
    for key, value in head.items():
        change = (value - drawn[key.removeprefix("base_model.model.")]).abs().max()
        assert 1e-4 < change < 0.1, f"{key}: {change}"  # 12 steps of at most 4e-3


def test_factors_stay_on_the_manifold(runs: Path) -> None:
    for name in ("one", "ZeRO-3", "mnli ZeRO-2"):
        assert max(metrics(runs / name, "orthonormality_error")) < 1e-5
    assert max(metrics(runs / "paper", "orthonormality_error")) < 0.5  # the landing field only attracts
    assert max(metrics(runs / "paper", "orthonormality_error")) > 1e-5


@pytest.mark.parametrize(
    ("name", "task", "names"),
    [
        ("paper", "cola", ["matthews", "accuracy"]),
        ("stsb", "stsb", ["pearson", "spearman"]),
        ("mnli ZeRO-2", "mnli", ["accuracy_matched", "accuracy_mismatched"]),
    ],
)
def test_each_task_has_its_metrics(runs: Path, name: str, task: str, names: list[str]) -> None:
    """Against scikit-learn and scipy, from the predictions in the run folder."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import matthews_corrcoef

    found, rows = result(runs / name), samples(runs / name)
    assert list(found["columns"]) == names and found["headline"] == names[0]
    values = {key: entry["value"] for key, entry in found["columns"].items()}
    gold, predicted = [row["gold"] for row in rows], [row["predicted"] for row in rows]
    if task == "cola":
        assert values["matthews"] == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-9)
    elif task == "stsb":
        assert values["pearson"] == pytest.approx(pearsonr(predicted, gold)[0], abs=1e-6)
        assert values["spearman"] == pytest.approx(spearmanr(predicted, gold)[0], abs=1e-6)
    else:
        assert found["parts"] == {"matched": 7, "mismatched": 8}
        for part in ("matched", "mismatched"):
            hits = [row["gold"] == row["predicted"] for row in rows if row["part"] == part]
            assert values[f"accuracy_{part}"] == pytest.approx(sum(hits) / len(hits))
    log = (runs / f"{name}.log0").read_text()
    assert f"validation {names[0].replace('_', ' ')} " in log and "the best so far" in log


def test_every_task_is_checked_without_training(runs: Path) -> None:
    log = (runs / "dry.log0").read_text()
    assert log.count("dry run: everything was checked") == len(TASKS) == 8
    assert not list(runs.glob("dry */*"))
    for task in TASKS:
        assert f"glue/{task}/train.tsv" in log
    epochs = [line for line in log.splitlines() if line.startswith("steps")]
    assert all("2 epochs" in line for line in epochs), "a variant comes after the task's own settings"


def test_nothing_is_said_that_says_nothing(runs: Path) -> None:
    """No warning of a library in any log; what is said is ours."""
    for name, *_ in RUNS:
        lines = (runs / f"{name}.log0").read_text().splitlines()
        noise = [
            line for line in lines if "arning" in line or line.startswith("[transformers]") or "LOAD REPORT" in line
        ]
        assert not noise, name


@pytest.mark.parametrize("name", ["one", "stsb", "mnli ZeRO-2"])
def test_export_to_plain_lora_gives_the_same_outputs(runs: Path, name: str, tmp_path: Path) -> None:
    """The head goes with it, whatever its number of outputs; loaded by stock PEFT on a base drawn from another seed."""
    run = runs / name
    forward = export_lora(run, tmp_path / "lora")["canary"]["forward"]
    assert forward["max_difference_to_adapter"] < LOGIT_TOLERANCE
    outputs = {"one": 2, "stsb": 1, "mnli ZeRO-2": 3}[name]
    ids, logits = torch.arange(3, 40)[None], []
    for seed, folder in enumerate((run / "adapter", tmp_path / "lora")):
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(runs / "base", num_labels=outputs)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=LOGIT_TOLERANCE)


def test_report_has_the_scores(runs: Path, tmp_path: Path) -> None:
    from polar_eval.read_runs import read_run
    from polar_eval.report import write_report

    page = write_report([read_run(runs / name) for name in ("one", "stsb")], tmp_path).read_text()
    value, error = result(runs / "one")["columns"]["accuracy"].values()
    score = f"{100 * value:.1f} ± {100 * error:.1f}"
    assert f"| one | base | glue_rte | accuracy * | {score} | {DEV_ROWS} |" in page
    assert "| stsb | base | glue_stsb | pearson * | " in page
    table = page.split("## GLUE\n")[1].split("## ")[0]
    assert "STS-B (Pearson)" in table and f"| {score} |" in table
