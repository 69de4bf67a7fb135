"""Stopping a run before its end: somebody asks on one rank, all ranks save the same step and leave.

Who can ask, at any time while a run trains:

- a signal, SIGTERM or SIGUSR2, to any rank (a scheduler that preempts, `kill`);
- the file that POLAR_STOP_FILE names (a job script, which cannot reach the ranks behind srun and a container);
- the file `stop` in the run's folder (a person: `touch runs/first/stop`); it is deleted once it was honoured.

The main process looks for files; every rank looks at its own flag. At the end of each optimizer step the ranks agree
by the maximum of one integer, so all of them stop after the same step, whichever was asked, and never in the middle of
an accumulation. Then the checkpoint is saved before an evaluation that is due, which can take longer than a scheduler
waits; `polar.resume` makes up for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

STOP_FILE_VARIABLE = "POLAR_STOP_FILE"
STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
# What the ranks exchange: 0 to go on, else the index of the reason. The largest wins.
REASONS = ("", f"the file {STOP_FILE}", f"the file of {STOP_FILE_VARIABLE}", *(s.name for s in SIGNALS))


class StopRequest(TrainerCallback):
    """Listen for requests to stop, and stop all ranks at the end of the same step.

    Args:
        output_dir: the run's folder.

    Attributes:
        reason: who asked, once the ranks have agreed to stop; empty until then.
        evaluation_is_due: whether the run stopped right before an evaluation.
    """

    def __init__(self, output_dir: Path) -> None:
        self.file = output_dir / STOP_FILE
        self.job_file = os.environ.get(STOP_FILE_VARIABLE)
        self.reason = ""
        self.evaluation_is_due = False
        self._signalled = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn signals into requests while the block runs; in a thread, where Python takes no handlers, files alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def note(number: int, _: Any) -> None:
            if os.getpid() != owner:  # a data loader's worker inherits the handler; it shall end as others do
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signalled = REASONS.index(signal.Signals(number).name)

        earlier = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if any rank was asked to. Collective: every rank, after every optimizer step."""
        asked = self._asked(state.is_world_process_zero)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everywhere = torch.tensor(asked, device=args.device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
            asked = int(everywhere)
        if not asked or state.global_step >= state.max_steps:
            return
        self.reason = REASONS[asked]
        ends_epoch = float(state.epoch).is_integer()
        if ends_epoch and args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
        self.evaluation_is_due = control.should_evaluate or (
            ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH
        )
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out what is due at the end of an epoch: the Trainer announces one wherever it stops, after the save."""
        if self.reason:
            control.should_log = control.should_evaluate = control.should_save = False

    def honoured(self) -> None:
        """Delete the file in the run's folder, so that it does not stop the next start. On the main process."""
        self.file.unlink(missing_ok=True)

    def _asked(self, is_main_process: bool) -> int:
        asked = self._signalled
        if is_main_process:
            asked = max(asked, 1 if self.file.exists() else 0)
            asked = max(asked, 2 if self.job_file and os.path.exists(self.job_file) else 0)
        return asked
