"""The experiment folders: what the suite reads of an experiment, made from `PolarConfig` and kept as files.

`experiments/polar/NAME/` holds `adapter_config.json` and `training_params.json` (differences from the suite's
defaults); `README.md` has the reason of each value. A test demands that the files are what this module makes.

    python -m benchmarks.leaderboard.folders    # write them again
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

METHOD = "polar"
FOLDER = Path(__file__).resolve().parent / "experiments" / METHOD
CONFIG_FILE, PARAMETERS_FILE = "adapter_config.json", "training_params.json"

ADAPTER: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 32, "alpha": 64, "target_modules": ["q_proj", "v_proj"]}
LANDING = {"backward_field": "landing", "landing_penalty": 5e-3, "landing_convention": "upstream"}
TRAINING: dict[str, Any] = {"optimizer_kwargs": {"lr": 4e-4, "weight_decay": 0.0}}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "llama-3.2-3B-rank32": {**ADAPTER, **LANDING},
    "llama-3.2-3B-rank32-tangent": {**ADAPTER, "backward_field": "tangent"},
}


def adapter_config(name: str) -> dict[str, Any]:
    """What `PolarConfig.save_pretrained` writes for an experiment, names sorted, without the version of PEFT here."""
    from polar import PolarConfig

    with tempfile.TemporaryDirectory() as folder:
        PolarConfig(**EXPERIMENTS[name]).save_pretrained(folder)
        config: dict[str, Any] = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop("peft_version", None)
    config["target_modules"].sort()
    return config


def files_of(name: str) -> dict[str, str]:
    """File name -> text of an experiment's folder, as it is shipped."""
    return {file: (FOLDER / name / file).read_text(encoding="utf-8") for file in (CONFIG_FILE, PARAMETERS_FILE)}


def write_all() -> None:
    """Write every experiment's folder."""
    from polar.files import write_json

    for name in EXPERIMENTS:
        write_json(FOLDER / name / CONFIG_FILE, adapter_config(name))
        write_json(FOLDER / name / PARAMETERS_FILE, TRAINING)


if __name__ == "__main__":
    write_all()
