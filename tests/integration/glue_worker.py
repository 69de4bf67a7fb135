"""Runs of test_glue.py, in ranks forked from one process.

Usage: python glue_worker.py FOLDER, where FOLDER holds `base` and `glue`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

RECIPE = ["--config", "configs/glue_deberta_v3_base.yaml", "--variant", "tiny"]
ZERO3, ZERO2 = (["--deepspeed", f"ds_configs/zero{stage}.json"] for stage in (3, 2))
STEPS_PER_EPOCH = 6
# 48 rows in batches of 8 on one or two ranks. The validation rows divide neither by the ranks nor by their batches.
BATCH = ["--max_train_rows", "48", "--global_batch_size", "8", "--per_device_eval_batch_size", "8"]
# name, ranks (0: no launcher), task, micro batch, more options
RUNS: list[tuple[str, int, str, int, list[str]]] = [
    ("one", 0, "rte", 8, []),
    ("ZeRO-3", 2, "rte", 4, ZERO3),
    ("FSDP2", 2, "rte", 4, ["--engine", "fsdp2"]),
    ("lora DDP", 2, "rte", 4, ["--variant", "lora", "--learning_rate", "4e-3"]),
    ("paper", 0, "cola", 8, ["--variant", "paper", "--max_steps", "6"]),
    ("stsb", 0, "stsb", 8, ["--per_device_eval_batch_size", "1", "--max_steps", "6"]),
    ("mnli ZeRO-2", 2, "mnli", 4, ["--max_steps", "6", *ZERO2]),
]


def main(folder: Path) -> None:
    """Train all of RUNS, continue one of them twice, check every task without training."""
    from polar.glue import TASKS
    from tests.forked_ranks import run_ranks

    def arguments(name: str, task: str, micro_batch: int, *more: str) -> list[str]:
        return [
            *(*RECIPE, "--task", task, *BATCH, "--per_device_train_batch_size", str(micro_batch)),
            *("--model_name_or_path", str(folder / "base"), "--train_dataset", str(folder / "glue")),
            *("--output_dir", str(folder / name), "--logging_steps", "1", "--save_total_limit", "5", *more),
        ]

    def run(name: str, ranks: int, given: list[str]) -> None:
        from polar.train import main as train

        run_ranks(ranks, lambda: train(given), folder / f"{name}.log")

    for name, ranks, task, micro_batch, more in RUNS:
        run(name, ranks, arguments(name, task, micro_batch, *more))
    for name, ranks, micro_batch, more in (("resumed", 2, 4, ZERO3), ("resumed on one", 0, 8, [])):
        shutil.copytree(folder / "ZeRO-3", folder / name)  # as if it had been killed after the first epoch
        shutil.rmtree(folder / name / f"checkpoint-{2 * STEPS_PER_EPOCH}")
        (folder / name / "done.json").unlink()
        run(name, ranks, arguments(name, "rte", micro_batch, *more, "--resume"))

    def check_all() -> int:
        from polar.train import main as train

        return max(train(arguments(f"dry {task}", task, 8, "--dry_run")) for task in TASKS)

    run_ranks(0, check_all, folder / "dry.log")


if __name__ == "__main__":
    # Once, before the ranks are forked.

    import polar.build_model
    import polar.glue_trainer
    import polar.summary
    import polar.train  # noqa: F401

    main(Path(sys.argv[1]))
