"""`adapter.ranks` in a run: files and computed ranks reach the adapter; what does not fit is one line."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from polar.build_model import plan_model
from polar.errors import UserError
from polar.launch import from_main_process_for_long
from polar.rank_file import read_rank_file, selected_ranks
from polar.ranks import compute_ranks
from polar.run_config import RunConfig, parse_run
from polar.run_ranks import compute_missing_ranks, find_ranks, ranks_setting
from tests.forked_ranks import run_ranks
from tests.tiny_models import write_gemma3

SETTINGS = "{budget: r=4, r_max: 8, fraction: 0.5}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with rows of data, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return tmp_path


def run(base: Path, *argv: str) -> RunConfig:
    settings = ["--model_name_or_path", str(base), "--train_dataset", "rows.jsonl", "--output_dir", "out", "--use_cpu"]
    config = parse_run([*settings, *argv])
    config.validate(1)
    return config


@pytest.mark.parametrize(
    ("adapter", "method"),
    [
        ({"peft_type": "POLAR"}, "polar"),
        ({"peft_type": "LORA"}, "lora"),
        ({"peft_type": "LORA", "use_rslora": True}, "lora"),
        ({"peft_type": "LORA", "use_dora": True}, "dora"),
    ],
)
def test_auto_computes_what_a_model_of_the_user_would_get(base: Path, adapter: dict[str, Any], method: str) -> None:
    """Independent computation: compute_ranks with the method spelt out; the plan counts real PEFT parameters."""
    config = run(base, "--adapter", json.dumps(adapter | {"ranks": {"budget": "r=4", "r_max": 8}}))
    find_ranks(config)
    bound = config.adapter.ranks
    assert bound is not None and bound.to_compute is not None and "before training (fraction 0.5, " in bound.origin
    most = plan_model(config).num_trainable
    line = compute_missing_ranks(config)
    assert line is not None and line.startswith("ranks computed (")
    expected, _ = compute_ranks(str(base), ranks_setting(config.adapter.adapter))  # type: ignore[arg-type]
    assert expected["settings"]["method"] == method
    assert config.adapter.ranks.content["rank_pattern"] == expected["rank_pattern"]
    plan = plan_model(config)
    assert plan.num_trainable == expected["num_parameters"] <= expected["budget"] < most
    assert sum(kind.num_modules for kind in plan.modules.values()) == len(selected_ranks(expected))


def test_computed_ranks_are_found_by_the_next_run_and_not_by_another_base(base: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", f"{{peft_type: LORA, ranks: {SETTINGS}}}"]
    config = run(base, *arguments)
    find_ranks(config)
    compute_missing_ranks(config)
    again = run(base, *arguments)
    find_ranks(again)
    assert again.adapter.ranks.content == config.adapter.ranks.content and again.adapter.ranks.to_compute is None
    assert "computed before" in again.adapter.ranks.origin and compute_missing_ranks(again) is None
    for other in (
        run(base, "--adapter", "{peft_type: LORA, ranks: {budget: r=5, r_max: 8}}"),
        run(base, "--adapter", f"{{peft_type: POLAR, ranks: {SETTINGS}}}"),
        run(write_gemma3(tmp_path / "other", seed=1), *arguments),
    ):
        find_ranks(other)
        assert other.adapter.ranks.to_compute is not None


@pytest.mark.parametrize("peft_type", ["POLAR", "LORA", "LOHA", "LOKR"])
def test_any_method_with_ranks_takes_a_file(base: Path, peft_type: str) -> None:
    content, _ = compute_ranks(str(base), None)
    Path("ranks.json").write_text(json.dumps(content))
    config = run(base, "--adapter.peft_type", peft_type, "--adapter.ranks", "ranks.json")
    find_ranks(config)
    assert config.adapter.ranks.to_compute is None
    plan = plan_model(config)
    assert sum(kind.num_modules for kind in plan.modules.values()) == len(selected_ranks(content))
    if peft_type == "LOHA":  # two pairs of factors per layer, so twice what LoRA's formula gives
        shapes = content["modules"]
        expected = sum(2 * r * sum(shapes[name]["shape"]) for name, r in selected_ranks(content).items())
        assert plan.num_trainable == expected


def test_a_run_continues_with_its_own_ranks(base: Path, tmp_path: Path) -> None:
    """Also where the file that it began with is gone."""
    content, _ = compute_ranks(str(base), None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ranks.json").write_text(json.dumps(content))
    config = run(base, "--adapter.ranks", "gone.json", "--resume")
    find_ranks(config)
    assert config.adapter.ranks.content == json.loads(json.dumps(content))
    assert config.adapter.ranks.origin.startswith("this run's own: ")
    with pytest.raises(UserError, match=r"rank file gone\.json: No such file or directory; make it: polar ranks"):
        find_ranks(run(base, "--adapter.ranks", "gone.json"))


def _broken(content: dict[str, Any], change: str) -> str:
    name = next(iter(selected_ranks(content)))
    match change:
        case "other format":
            content["format"] = "x"
        case "modules list":
            content["modules"] = ["q_proj"]
        case "no entry":
            content["modules"][name] = 4
        case "rank 0":
            content["modules"][name]["r"] = 0
        case "nothing selected":
            for value in content["modules"].values():
                value["selected"] = False
        case "cut":
            return json.dumps(content)[:-20]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("other format", "rank file ranks.json: format 'x', need 'polar-ranks-1'; make it again with polar ranks"),
        ("modules list", "rank file ranks.json: `modules` does not map names to layers"),
        ("no entry", "rank file ranks.json: `modules` does not map names to layers"),
        ("rank 0", "has r = 0, need r >= 1"),
        ("nothing selected", "rank file ranks.json: no layer is selected"),
        ("cut", "rank file ranks.json: not JSON"),
    ],
)
def test_a_malformed_file_is_one_line(base: Path, change: str, expected: str) -> None:
    content, _ = compute_ranks(str(base), None)
    Path("ranks.json").write_text(_broken(content, change))
    with pytest.raises(UserError) as error:
        find_ranks(run(base, "--adapter.ranks", "ranks.json"))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "of its modules do not exist in the model"),
        ({"intermediate_size": 96}, "has shape ("),
    ],
)
def test_a_file_of_another_base_is_refused(base: Path, tmp_path: Path, size: dict[str, Any], expected: str) -> None:
    content, _ = compute_ranks(str(base), None)
    Path("ranks.json").write_text(json.dumps(content))
    config = run(write_gemma3(tmp_path / "other", **size), "--adapter.ranks", "ranks.json")
    find_ranks(config)
    with pytest.raises(UserError) as error:
        plan_model(config)
    message = str(error.value)
    assert message.startswith("adapter.ranks ranks.json: ") and expected in message and base.name in message
    assert message.endswith("run polar ranks on this model") and "\n" not in message


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("{ranks: auto, r: 8}", "adapter.r is 8, but adapter.ranks sets it: leave one of them out"),
        ("{peft_type: LORA, ranks: x.json, target_modules: [q_proj]}", "but adapter.ranks sets it"),
        ("{peft_type: VERA, ranks: auto}", "adapter.ranks: VERA has no rank per layer: use one of POLAR, LORA, LOHA"),
        ("{ranks: 16}", "adapter.ranks is 16: give a file of `polar ranks`, auto, or a mapping"),
        ("{ranks: {budgett: r=16}}", "adapter.ranks.budgett: unknown setting: did you mean budget?"),
        ("{ranks: {budget: r=x}}", "adapter.ranks.budget 'r=x': pass a number of parameters, or r=16"),
        ("{ranks: {r_min: 9, r_max: 8}}", "adapter.ranks.r_min 9 is above r_max 8"),
        ("{ranks: {fraction: half}}", "adapter.ranks: '<' not supported"),
        ("{peft_type: LOHA, ranks: {budget: r=16}}", "adapter.ranks.budget: it counts no LOHA parameters: set method"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(base: Path, adapter: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        run(base, "--adapter", adapter)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_long_work_of_one_rank_outlasts_the_timeout_of_a_collective(tmp_path: Path) -> None:
    """Twice as long as a collective may wait."""
    timeout_s = 1.5

    def work() -> int:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
        rank = torch.distributed.get_rank()

        def long() -> str:
            assert rank == 0, "only the main process works"
            time.sleep(2 * timeout_s)
            return "ranks"

        assert from_main_process_for_long(long, check_s=0.2) == "ranks"

        def fails() -> str:
            raise UserError("no weights")

        with pytest.raises(UserError, match="no weights"):
            from_main_process_for_long(fails, check_s=0.2)
        return 0

    run_ranks(2, work, tmp_path / "log")


def test_read_rank_file_is_what_ranks_writes(base: Path, tmp_path: Path) -> None:
    content, _ = compute_ranks(str(base), None)
    (tmp_path / "ranks.json").write_text(json.dumps(content))
    assert read_rank_file(tmp_path / "ranks.json") == json.loads(json.dumps(content))
