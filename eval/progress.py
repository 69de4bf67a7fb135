"""What a person sees while a task is scored: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts scored requests on stderr.

    Args:
        label: e.g. the task's name.
        total: requests of this process.
        shown: False on all processes but the first.
    """

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        self.label, self.total, self.done = label, total, 0
        self.start = self.last_line = time.perf_counter()
        self.shown = shown and total > 0
        self.bar = None
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=label, dynamic_ncols=True, leave=False)

    def advance(self, number: int) -> None:
        """Count `number` more."""
        self.done += number
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(number)
        elif self.shown and now - self.last_line >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.last_line = now
            speed = self.done / (now - self.start)
            left = (self.total - self.done) / speed / 60
            print(
                f"{self.label}: {self.done} of {self.total}, {speed:.2g}/s, {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
