"""Two steps of training under each file of ds_configs, in two ranks forked from one process: `OUT MODEL ROWS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


def for_two_ranks(file: Path, folder: Path) -> Path:
    """Return the file as it is, or with the one value that a user has to set: GPUs per node."""
    config = json.loads(file.read_text())
    if "zero_hpz_partition_size" not in config["zero_optimization"]:
        return file
    config["zero_optimization"]["zero_hpz_partition_size"] = RANKS
    changed = folder / file.name
    changed.write_text(json.dumps(config))
    return changed


def main(folder: Path, model: str, rows: str) -> None:
    from tests.forked_ranks import run_ranks
    from tests.integration.resume_worker import import_everything, train_main

    import_everything()
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        arguments = [
            *("--model_name_or_path", model, "--train_dataset", rows, "--template", "question_answer"),
            *("--adapter.r", "5", "--adapter.target_modules", '["q_proj", "down_proj"]', "--max_steps", "2"),
            *("--global_batch_size", "8", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"),
            *("--logging_steps", "1", "--save_strategy", "no", "--warmup_steps", "0"),
            *("--deepspeed", str(for_two_ranks(file, folder)), "--output_dir", str(folder / file.stem)),
        ]
        run_ranks(RANKS, lambda arguments=arguments: train_main(arguments), folder / f"{file.stem}.log")


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]), *sys.argv[2:])
