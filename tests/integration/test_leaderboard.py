"""PoLAR in PEFT's method comparison: the CPU dry run, the checks, the table, and the suite itself where it is given."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.leaderboard import __main__ as command
from benchmarks.leaderboard import checks, dry_run, folders
from benchmarks.leaderboard.suite import PLACE, Suite, measured
from demo.problems import SEEN_KINDS, problems
from tests.shared_data import shared_data
from tests.tiny import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
NAME = "llama-3.2-3B-rank32"
OURS, LORA = f"polar/{NAME}", "lora/llama-3.2-3B-rank32"
STEPS = 20
SEEN = [
    f"Question: {p.question} Think step by step.\nAnswer: {p.answer}"
    for p in itertools.islice(problems(SEEN_KINDS, 3), 640)
]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with two layers trained until its loss on SEEN is between 1 and 2, as the suite wants."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for first in range(0, 480, 8):
        tokens = [tokenizer(text)["input_ids"][:160] for text in SEEN[first : first + 8]]
        model(**dry_run.pad(tokens, tokenizer.eos_token_id)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real problems of GSM8K."""
    lines = (shared_data("gsm8k") / "train.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "gsm8k.jsonl", [json.loads(line) for line in lines])


def write_experiment(folder: Path, parameters: dict[str, Any], **adapter: Any) -> Path:
    """The shipped experiment with some values changed."""
    shipped = {file: json.loads(text) for file, text in folders.files_of(NAME).items()}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**shipped["adapter_config.json"], **adapter}))
    (folder / "training_params.json").write_text(json.dumps({**shipped["training_params.json"], **parameters}))
    return folder


def worst_error(saved: Path) -> float:
    factors = [v.double() for k, v in load_file(saved / "adapter_model.safetensors").items() if not k.endswith("Theta")]
    assert [X.shape[1] for X in factors] == [32] * 8  # two layers, q and v, X and Y
    return max(float((X.T @ X - torch.eye(32)).norm()) for X in factors)


def test_dry_run_learns_and_the_landing_field_keeps_factors_near_the_manifold(
    tiny_llama: Path, gsm8k: Path, tmp_path: Path
) -> None:
    """The same run without a field drifts about three times as far; errors are computed here, from what was saved."""
    setting = dry_run.Setting(str(tiny_llama), dry_run.read_rows(str(gsm8k), 48), STEPS)
    none = {"backward_field": "none", "landing_penalty": None, "landing_convention": "textbook"}
    errors = {}
    for field, changed in {"landing": {}, "none": none}.items():
        folder = write_experiment(tmp_path / "polar" / field, {"max_seq_length": 96}, **changed)
        found = dry_run.dry_run(folder, setting, tmp_path / field)
        assert found["broken"] == [] and found["field"] == field
        assert found["held_out_loss_after"] < found["held_out_loss_before"] - 0.1
        assert found["orthonormality_error_before"] < 1e-5
        errors[field] = worst_error(tmp_path / field)
        assert found["orthonormality_error"] == pytest.approx(errors[field], rel=1e-3)
    assert 1e-4 < errors["landing"] < errors["none"] / 2


def test_command_takes_every_folder_through_the_dry_run(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert command.main(["--dry_run", "--model", str(tiny_llama), "--steps", "3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [record["field"] for record in result["experiments"]] == ["landing", "tangent"]
    # two layers, two modules: X and Y (64 x 32), Theta (32 x 32)
    assert {record["num_trainable_params"] for record in result["experiments"]} == {4 * (2 * 64 * 32 + 32 * 32)}
    assert result["versions"]["torch"] and result["dry_run"] is True
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == [
        "experiment",
        *(f"polar/{name}" for name in folders.EXPERIMENTS),
    ]


# A suite with the real one's layout and format of results, and without its needs.
RUN = """
import json, sys
from pathlib import Path
import utils
from peft import PeftConfig
if __name__ == "__main__":
    assert sys.argv[:2] == ["run.py", "-v"] and sys.path[0] == str(Path(__file__).resolve().parent)
    experiment = sys.argv[2].removeprefix("experiments/")
    config = PeftConfig.from_pretrained(sys.argv[2]).to_dict()
    if config.get("backward_field") == "tangent":
        sys.exit(3)
    utils.write(experiment, {**config, "target_modules": list(config["target_modules"] or [])})
"""
UTILS = """
import json
from pathlib import Path
def write(experiment, config):
    defaults = json.loads(Path("default_training_params.json").read_text())
    own = Path("experiments", experiment, "training_params.json")
    parameters = {**defaults, **(json.loads(own.read_text()) if own.exists() else {})}
    metrics = [{"step": 5, "valid accuracy": 0.3}, {"step": 5, "test accuracy": 0.25, "forgetting": 0.125}]
    result = {
        "run_info": {"experiment_name": experiment, "peft_branch": "main", "peft_worktree_is_dirty": False,
                     "train_config": parameters, "peft_config": config, "error_msg": ""},
        "train_info": {"accelerator_memory_max": 3 * 2**30, "train_time": 60.0, "file_size": 2**20, "status": "success",
                       "num_trainable_params": 1234, "metrics": metrics},
        "meta_info": {"system_info": {"accelerator": "none"}, "package_info": {"peft-version": "1"}},
    }
    Path("results", experiment.replace("/", "--") + ".json").write_text(json.dumps(result))
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout on branch main with the suite's layout and the committed result of a LoRA."""
    folder = tmp_path / "peft"
    suite = folder / PLACE
    (suite / "results").mkdir(parents=True)
    (suite / "experiments" / LORA).mkdir(parents=True)
    (suite / "experiments" / LORA / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 32}')
    for name, text in {"run.py": RUN, "utils.py": UTILS, "data.py": ""}.items():
        (suite / name).write_text(text)
    defaults = {**dry_run.DEFAULTS, "model_id": str(tmp_path / "no-such" / "model")}
    (suite / "default_training_params.json").write_text(json.dumps(defaults))
    git(folder, "init", "--initial-branch=main")
    runner = ["python", "-c", f"import utils; utils.write({LORA!r}, {{}})"]
    subprocess.run(runner, cwd=suite, check=True)
    git(folder, "add", ".")
    git(folder, "commit", "-m", "suite", "--no-verify")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert command.main([*arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("leaderboard: not met: ") for line in lines)
    return lines


def test_what_is_not_met_is_listed_with_the_fix(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = refused(capsys, "--peft", str(checkout.parent / "nowhere"))
    assert len(nowhere) == 1 and "git clone https://github.com/huggingface/peft" in nowhere[0]
    something_else = checkout.parent / "other"
    something_else.mkdir()
    git(something_else, "init")
    other = refused(capsys, "--peft", str(something_else))
    assert len(other) == 1 and "has no method_comparison/MetaMathQA/run.py" in other[0]
    unknown = refused(capsys, "--peft", str(checkout), "--also", LORA, "lora")
    assert len(unknown) == 1 and "--also lora: the suite has no METHOD/NAME of this name" in unknown[0]
    changed = checkout / PLACE / "data.py"
    changed.write_text("# changed\n")
    write_experiment(checkout / PLACE / "experiments" / OURS, {"seed": 1})
    text = "\n".join(refused(capsys, "--peft", str(checkout)))
    assert "has changed files, results would be marked dirty: commit or restore them" in text
    assert f"experiments/{OURS}/training_params.json in the checkout has other settings" in text
    assert "is not the checkout's" in text and f"pip install -e {checkout}" in text
    assert "model" in text and "no-such/model is neither cached nor reachable" in text
    assert "HuggingFaceFW/finewiki is not reachable" in text
    assert ("no CUDA or XPU device" in text) == (not torch.cuda.is_available())
    assert list((checkout / PLACE / "experiments" / "polar").iterdir()) == [checkout / PLACE / "experiments" / OURS]


def test_runs_collect_into_one_table_and_are_not_repeated(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tangent experiment crashes; the others have results all the same, and the tree stays clean."""
    suite = Suite(checkout)
    crashing = f"{OURS}-tangent"
    records, code = command.run_all(suite, [crashing, OURS, LORA])
    assert code == 1
    assert [r["status"] for r in records] == ["crashed, exit code 3", "success", "success"]
    assert [r["exit_code"] for r in records] == [3, 0, None]  # LoRA's committed result was taken
    assert not suite.is_dirty and not checks.unmet_by_checkout(suite)
    assert records[1] == {**records[2], "experiment": OURS, "command": records[1]["command"], "exit_code": 0} | {
        "result_file": f"results/polar--{NAME}.json"
    }
    capfd.readouterr()
    out = tmp_path / "table.json"
    # All that is asked for is there: no accelerator, no model and no data are needed to collect it.
    assert command.main(["--peft", str(checkout), "--experiment", NAME, "--out", str(out)]) == 0
    found = {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines()}
    assert found[OURS] == found[LORA] == ["success", "0.2500", "0.1250", "3.00", "60", "1.0", "1,234", "none"]
    written = json.loads(out.read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert written["peft"] == {"branch": "main", "commit": head, "dirty": False}
    assert [record["exit_code"] for record in written["experiments"]] == [None, None]
    # A result with other settings than today's, or cut short, or of another branch does not count.
    result = checkout / PLACE / "results" / f"polar--{NAME}.json"
    assert suite.finished(OURS) == result
    content = json.loads(result.read_text())
    content["run_info"]["train_config"]["optimizer_kwargs"]["lr"] = 1.0
    result.write_text(json.dumps(content))
    assert suite.finished(OURS) is None
    result.write_text(json.dumps(content)[:100])  # killed while it was written
    assert suite.finished(OURS) is None
    git(checkout, "checkout", "-b", "other")
    assert suite.results_folder == "temporary_results" and suite.finished(LORA) is not None


@pytest.fixture(scope="module")
def real_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the PEFT checkout that POLAR_PEFT_CHECKOUT names, on branch main."""
    source = os.environ.get("POLAR_PEFT_CHECKOUT")
    if not source:
        pytest.skip("POLAR_PEFT_CHECKOUT names no git checkout of PEFT")
    folder = tmp_path_factory.mktemp("real") / "peft"
    git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", source, str(folder))
    git(folder, "sparse-checkout", "set", "src", str(PLACE))
    git(folder, "checkout", "--quiet", "-B", "main")
    return folder


def test_dry_run_has_the_defaults_of_the_suite(real_checkout: Path) -> None:
    defaults = json.loads((real_checkout / PLACE / "default_training_params.json").read_text())
    assert {key: defaults[key] for key in dry_run.DEFAULTS} == dry_run.DEFAULTS


def test_unchanged_suite_trains_scores_and_saves_polar(
    real_checkout: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real run.py of PEFT's checkout, with its own PEFT, on the CPU with the tiny Llama and generated rows."""
    rows = [{"query": row.query, "response": row.response} for row in dry_run.generated_rows(80)]
    questions = [{"question": p.question, "answer": p.answer} for p in itertools.islice(problems(SEEN_KINDS, 5), 6)]
    sets = {
        "meta-math--MetaMathQA": {
            "train": [{**r, "type": "GSM_AnsAug", "original_question": r["query"]} for r in rows]
        },
        "openai--gsm8k": {"train": questions, "test": questions},
        "HuggingFaceFW--finewiki": {"train": [{"text": text} for text in SEEN[:8]]},
    }
    for name, content in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    suite = Suite(real_checkout, with_polar=Path(__file__).with_name("suite_on_cpu.py"))
    tiny = {"model_id": str(tiny_llama), "max_steps": 8, "eval_steps": 4, "max_seq_length": 128}
    tiny["generation_kwargs"] = {"max_length": 800, "max_new_tokens": 8}
    write_experiment(suite.folder / "experiments" / OURS, tiny)
    monkeypatch.setenv("SUITE_ROWS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(real_checkout / "src"))
    code, path, interrupted = suite.run(OURS)
    assert (code, path, interrupted) == (0, suite.folder / "results" / f"polar--{NAME}.json", False)
    result = json.loads(path.read_text())
    found = measured(result)
    assert found["status"] == "success" and found["error"] is None
    assert 0 <= found["test_accuracy"] <= 1 and abs(found["forgetting"]) < 1
    num_elements = 4 * (2 * 64 * 32 + 32 * 32)
    assert found["num_trainable_params"] == num_elements
    assert 4 * num_elements < found["file_size_mib"] * 2**20 < 4 * num_elements + 8192  # fp32 and names
    assert (found["branch"], found["dirty"]) == ("main", False)
    assert found["packages"]["peft-commit-hash"] == suite.commit
    assert result["run_info"]["peft_config"]["backward_field"] == "landing"
    assert not suite.is_dirty
