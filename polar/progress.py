"""What a person sees while a run trains: a bar on a terminal, one line per log elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from polar.constrain import ManifoldHandle


class StepReport(TrainerCallback):
    """Verify the manifold step after every optimizer step, on every rank; show progress on the main process.

    Args:
        handle: what `polar.constrain` returned, None for adapters without Stiefel factors.
        accelerator: the Trainer's, which knows when the engine left a step out.
    """

    def __init__(self, handle: ManifoldHandle | None, accelerator: Any) -> None:
        self.handle = handle
        self.accelerator = accelerator
        self.bar: tqdm | None = None
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, leave=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.check(step_was_skipped=self.accelerator.optimizer_step_was_skipped)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        text = describe_step(logs)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            self._print(state, text)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and metrics and "eval_loss" in metrics:
            chosen = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
            value, earlier = metrics[chosen], state.best_metric
            # The Trainer updates best_metric after this call.
            best = earlier is None or (value > earlier if args.greater_is_better else value < earlier)
            names = ["eval_loss"] if chosen == "eval_loss" else [chosen, "eval_loss"]
            text = ", ".join(f"{name.removeprefix('eval_').replace('_', ' ')} {metrics[name]:.4f}" for name in names)
            self._print(state, f"validation {text}{', the best so far' if best else ''}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _print(self, state: Any, text: str) -> None:
        width = len(str(state.max_steps))
        seconds = time.perf_counter() - self.start
        line = f"step {state.global_step:{width}}/{state.max_steps}  {seconds:7.1f} s  {text}"
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)


def describe_step(logs: dict[str, Any]) -> str:
    """Return one training log as text: loss, learning rate, gradient norm, tokens/s, ||X^T X - I||_F, stable rank."""
    parts = [f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0):.2e}"]
    if "grad_norm" in logs:
        parts.append(f"grad {logs['grad_norm']:.2g}")
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s']:,.0f} tok/s")
    if "orthonormality_error" in logs:
        parts.append(f"off manifold {logs['orthonormality_error']:.1e}")
    if "stable_rank" in logs:
        parts.append(f"stable rank {logs['stable_rank']:.2f}")
    return "  ".join(parts)
