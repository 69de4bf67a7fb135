"""The experiment folders for PEFT's suite are what PolarConfig saves, and stock PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftConfig

from benchmarks.leaderboard import folders
from polar import PolarConfig

COMMON = {"task_type": "CAUSAL_LM", "r": 32, "alpha": 64, "target_modules": ["q_proj", "v_proj"]}
WANTED = {
    "llama-3.2-3B-rank32": PolarConfig(
        **COMMON, backward_field="landing", landing_penalty=5e-3, landing_convention="upstream"
    ),
    "llama-3.2-3B-rank32-tangent": PolarConfig(**COMMON, backward_field="tangent"),
}


def test_every_folder_is_an_experiment() -> None:
    assert {path.name for path in folders.FOLDER.iterdir()} == WANTED.keys() == folders.EXPERIMENTS.keys()


@pytest.mark.parametrize("name", WANTED)
def test_folder_is_what_the_configuration_saves_and_peft_loads(name: str, tmp_path: Path) -> None:
    WANTED[name].save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    saved.pop("peft_version")  # of the machine that saves
    saved["target_modules"].sort()
    shipped = json.loads((folders.FOLDER / name / "adapter_config.json").read_text())
    assert shipped == saved == folders.adapter_config(name)
    parameters = json.loads((folders.FOLDER / name / "training_params.json").read_text())
    assert parameters == folders.TRAINING == {"optimizer_kwargs": {"lr": 4e-4, "weight_decay": 0.0}}
    loaded = PeftConfig.from_pretrained(str(folders.FOLDER / name)).to_dict()
    wanted = WANTED[name].to_dict()
    assert {**loaded, "peft_version": None} == {**wanted, "peft_version": None}
