"""Tasks and metrics: lm-eval, without its model loading, its caches and its talk."""

from __future__ import annotations

import random
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from polar.errors import UserError
from polar_eval.backend import Scorer
from polar_eval.catalog import ScoringTask

TASKS_FOLDER = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERATIONS = 1000  # of metrics other than a mean, whose standard error is computed and not drawn

# lm-eval 0.4.13 shows a bar of its own while it writes the prompts, which takes no time.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)


@lru_cache(maxsize=1)
def stock_tasks() -> TaskManager:
    """Return lm-eval's own tasks; it reads thousands of YAML files for this, which takes seconds."""
    return TaskManager()


class LoadedTask:
    """One of our tasks, or a stock task or group of lm-eval.

    Attributes:
        tasks: lm-eval's task objects by name; several for a group.
        groups: lm-eval's group objects by name.
        name: of the task or group in lm-eval.
    """

    def __init__(self, task: ScoringTask, template: str | None, data: str) -> None:
        self.name = task.lm_eval_name
        metadata = {"data": data, **({"template": template} if template else {})}
        if task.stock:
            manager = stock_tasks()
        else:
            manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata=metadata)
        if self.name not in manager.all_tasks:
            raise UserError(f"task {task.name!r}: lm-eval has no task of this name; `lm_eval ls tasks` lists them")
        try:
            loaded = manager.load([self.name])
        except UserError:
            raise
        except Exception as error:  # a stock task's data set: offline, moved, a script that is no longer run
            if not task.stock:
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"task {task.name}: cannot load it ({type(error).__name__}: {reason})") from error
        self.tasks: dict[str, Any] = loaded["tasks"]
        self.groups: dict[str, Any] = loaded.get("groups", {})

    def prepare(self, max_new_tokens: int | None, limit: int | None, seed: int) -> list[Any]:
        """Set what the command line sets and return lm-eval's requests, whose `args` are texts and settings."""
        requests = []
        for task in self.tasks.values():
            if task.config.output_type == "generate_until" and max_new_tokens is not None:
                settings = {**(task.config.generation_kwargs or {})}
                for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
                    settings.pop(alias, None)
                task.set_config("generation_kwargs", {**settings, "max_gen_toks": max_new_tokens})
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            requests += task.instances
        if not requests:
            raise UserError("no problems to score; check --data and --limit")
        return requests

    @property
    def generation(self) -> dict[str, Any] | None:
        """Generation settings of the (first) task that generates."""
        for task in self.tasks.values():
            if task.config.output_type == "generate_until":
                return dict(task.config.generation_kwargs)
        return None

    @property
    def version(self) -> Any:
        """Version of the (first) task's YAML."""
        return next(iter(self.tasks.values())).VERSION

    def evaluate(self, scorer: Scorer, limit: int | None, seed: int) -> dict[str, Any]:
        """Run the requests through the model and return lm-eval's results, with samples. Collective."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = lm_eval.evaluator.evaluate(
            lm=scorer,
            task_dict={"tasks": self.tasks, "groups": self.groups},
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=True,
        )
        assert found is not None, "every process is lm-eval's process 0"
        return dict(found)
