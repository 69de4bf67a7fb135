"""The processes that score together, one copy of the model each: `torchrun ... -m polar.cli eval`, accelerate's too."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# A process that is done with its share waits for the slowest one, however long that takes.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process and how many there are."""

    rank: int = 0
    size: int = 1

    def merge(self, part: dict[str, Any]) -> dict[str, Any]:
        """Return the union of what all processes have. Collective."""
        if self.size == 1:
            return part
        import torch.distributed as dist

        parts: list[dict[str, Any]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, part)
        return {key: value for each in parts for key, value in each.items()}


def join_world() -> World:
    """Meet the other processes that the launcher started; one process is a world of its own.

    gloo on GPUs as well: only texts and numbers travel.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size)
