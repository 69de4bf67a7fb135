"""Runs of test_recipes.py, in ranks forked from one process.

Usage: python recipes_worker.py FOLDER     FOLDER/runs.json: a list of {"name", "ranks", "arguments"}
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Run each entry; `continue_from` names a run whose folder is copied as it was after its first step."""
    folder = Path(sys.argv[1])
    import polar.train
    from polar.launch import local_environment

    local_environment(["--deepspeed", "x"])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    import polar.build_model
    import polar.run_config
    import polar.trainer
    from tests.forked_ranks import run_ranks

    for entry in json.loads((folder / "runs.json").read_text()):
        run = folder / entry["name"]
        if "continue_from" in entry:
            shutil.copytree(folder / entry["continue_from"], run)
            shutil.rmtree(run / "checkpoint-2")
            (run / "done.json").unlink()

        def work(entry: dict = entry, run: Path = run) -> int:
            os.environ["POLAR_CACHE"] = str(folder / entry.get("cache", "cache"))
            return polar.train.main([*entry["arguments"], "--output_dir", str(run), "--use_cpu"])

        run_ranks(entry["ranks"], work, folder / f"{entry['name']}.log")


if __name__ == "__main__":
    main()
