"""Task names, their data, and that each has a YAML of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from polar.errors import UserError
from polar_eval.catalog import SUITES, TASKS, find_data, find_tasks

FOLDER = Path(__file__).resolve().parents[2] / "eval" / "tasks"


class Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without importing its functions."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_every_task_has_one_yaml_and_every_yaml_is_a_task() -> None:
    names = [yaml.load(path.read_text(), Loader)["task"] for path in FOLDER.glob("*/*.yaml")]
    assert sorted(names) == sorted(task.lm_eval_name for task in TASKS.values())


def test_math_is_not_cut_short_except_where_the_paper_is_copied() -> None:
    limits = {
        path.stem: yaml.load(path.read_text(), Loader).get("generation_kwargs") for path in FOLDER.glob("math*/*.yaml")
    }
    assert limits["math_polar"]["max_gen_toks"] >= 1024 and limits["math500_polar"] is None  # included
    assert limits["math_paper_polar"] == limits["math_polar"] | {"max_gen_toks": 256}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gsm8k", ["gsm8k"]),
        (" math , gsm8k,math", ["math", "gsm8k"]),
        ("commonsense,piqa", list(SUITES["commonsense"])),
        ("lm_eval:gsm8k,gsm8k", ["lm_eval:gsm8k", "gsm8k"]),
    ],
)
def test_lists_of_tasks(text: str, names: list[str]) -> None:
    assert [task.name for task in find_tasks(text)] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gms8k", "did you mean gsm8k"),
        ("quux", "there is gsm8k, math"),
        ("", "names no task"),
        (",", "names no task"),
        ("lm_eval:", "unknown"),
    ],
)
def test_unknown_tasks(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_tasks(text)


def test_data_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "commonsense" / "social_i_qa").mkdir(parents=True)
    file = tmp_path / "commonsense" / "social_i_qa" / "test.json"
    file.write_text("[]")
    task = TASKS["social_iqa"]
    assert find_data(task, None, str(tmp_path)) == str(file)
    assert find_data(task, None, None) == "lighteval/siqa"
    assert find_data(task, "rows.jsonl", None) == "rows.jsonl"
    with pytest.raises(UserError, match=r"no rows of gsm8k in it; put them there as gsm8k/test\.jsonl"):
        find_data(TASKS["gsm8k"], None, str(tmp_path))
    with pytest.raises(UserError, match="reads its own data"):
        find_data(find_tasks("lm_eval:piqa")[0], "rows.jsonl", None)
