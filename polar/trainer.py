"""What polar adds to a Hugging Face Trainer: the manifold step, its metrics, and adapters saved whole.

`AdapterTrainerMixin` goes in front of any Trainer; `PolarSFTTrainer` is the one for causal language models,
`polar.glue_trainer` has the one for GLUE.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from polar.constrain import ManifoldHandle, constrain
from polar.engine_state import trainable_parameters, whole_shape, whole_values
from polar.errors import UserError
from polar.files import atomic_directory
from polar.live_spectrum import LiveSpectrum
from polar.progress import StepReport
from polar.resume import METRICS, ResumeMixin
from polar.saved_adapter import check_saved_adapter
from polar.stiefel_adamw import StiefelAdamW
from polar.stop import StopRequest
from polar.tuner import restore_factor_dtype

FACTOR_KEYS = ("polar_X", "polar_Y")


class AdapterTrainerMixin(ResumeMixin):
    """Constrain the factors, measure, keep the best adapter, write checkpoints; all else stays the Trainer's.

    Args:
        manifold: keyword arguments of `polar.constrain`; ignored for adapters without Stiefel factors.
        second_moment: `per_factor` replaces the optimizer by `StiefelAdamW` where there are Stiefel factors.
        theta_learning_rate: peak learning rate of Theta, None for that of the other parameters.
        run_identity: `polar.checkpoint.run_identity`, kept in each checkpoint.
        **kwargs: the Trainer's own. With `eval_dataset`, `output_dir/adapter` is the best by `metric_for_best_model`.
    """

    def __init__(
        self,
        *,
        manifold: dict[str, Any] | None = None,
        second_moment: Literal["elementwise", "per_factor"] = "elementwise",
        theta_learning_rate: float | None = None,
        run_identity: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        arguments = kwargs["args"]
        _prepare_arguments(arguments, keeps_best=kwargs.get("eval_dataset") is not None)
        self.second_moment = second_moment
        self.theta_learning_rate = theta_learning_rate
        self.run_identity = run_identity or {}
        self.manifold_handle: ManifoldHandle | None = None
        self.trainer = cast(Any, self)  # for type checkers: the Trainer behind this mixin has what they cannot see here
        super().__init__(**kwargs)
        if any(_is_factor(name) for name, p in self.trainer.model.named_parameters() if p.requires_grad):
            self.manifold_handle = constrain(self.trainer.model, **(manifold or {}))
        self.live_spectrum = LiveSpectrum(self.trainer.model, self.manifold_handle)
        for callback in (ProgressCallback, PrinterCallback):
            self.trainer.remove_callback(callback)
        self.trainer.add_callback(StepReport(self.manifold_handle, self.trainer.accelerator))
        self.stop = StopRequest(Path(arguments.output_dir))
        self.trainer.add_callback(self.stop)  # after the Trainer's own, whose decisions it overrules
        self.adapter_folder = Path(arguments.output_dir) / "adapter"
        self.adapter_step: int | None = None
        self.evaluated_step: int | None = None
        self._tokens: Tensor | float = 0.0
        self._clock = self.train_begin = time.perf_counter()

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer: factors in fp32 again, no weight decay on X and Y, Theta's own learning rate.

        Raises:
            UserError: the optimizer's package is missing, or it does not exist.
        """
        trainer = self.trainer
        if trainer.optimizer is None:
            restore_factor_dtype(trainer.model)
            if self.second_moment == "per_factor" and self.manifold_handle is not None:
                args = trainer.args
                options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
                trainer.optimizer_cls_and_kwargs = StiefelAdamW, {**options, "eps": args.adam_epsilon}
            try:
                super().create_optimizer(model)  # type: ignore[misc]
            except (ImportError, ValueError) as error:
                raise UserError(f"optim {trainer.args.optim}: {' '.join(str(error).split())}") from error
            thetas = [p for name, p in trainer.model.named_parameters() if p.requires_grad and ".polar_Theta." in name]
            separate_theta(cast(torch.optim.Optimizer, trainer.optimizer), thetas, self.theta_learning_rate)
        return trainer.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: never X and Y, whose norms the manifold fixes."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not _is_factor(name)]

    # Metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end, or until somebody asks to stop: then `stop.reason` says who."""
        self._clock = self.train_begin = time.perf_counter()
        with self.stop.listening():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Count the tokens of a micro batch (padding not), then train on it."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Let FSDP2 sum gradients once per step: between micro batches each rank keeps those of the adapter whole.

        The Trainer's own asks a DistributedConfig, which only a model has that transformers has sharded itself.
        """
        model = self.trainer.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; its time does not count as training time."""
        begin = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        self.evaluated_step = self.trainer.state.global_step
        self._clock += time.perf_counter() - begin
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log on all ranks: adds tokens_per_s and what `LiveSpectrum` measures; the main process appends metrics.jsonl.

        Raises:
            UserError: the training loss is not finite.
        """
        trainer = self.trainer
        is_step = "loss" in logs
        if is_step:
            logs["tokens_per_s"] = self._tokens_per_s()
            logs |= self.live_spectrum.measure()
        super().log(logs, start_time)  # type: ignore[misc]
        if trainer.is_world_process_zero():
            values = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in logs.items()}
            with (Path(trainer.args.output_dir) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.state.global_step, **values}) + "\n")
        if is_step and not math.isfinite(logs["loss"]):
            raise UserError(
                f"the training loss is {logs['loss']} at step {trainer.state.global_step}: lower learning_rate "
                f"({trainer.args.learning_rate:g}) or lengthen warmup_steps"
            )

    def _tokens_per_s(self) -> float:
        """Tokens that all ranks trained on since the last call, per second of training. Collective."""
        now = time.perf_counter()
        here = torch.as_tensor(self._tokens, dtype=torch.float32, device=self.trainer.args.device)
        everywhere = self.trainer.accelerator.gather(here.reshape(1)).sum().item()
        speed = everywhere / max(now - self._clock, 1e-9)
        self._tokens, self._clock = 0.0, now
        return speed

    # Saving

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        if is_best:
            self.save_adapter(self.adapter_folder)
            self.adapter_step = self.trainer.state.global_step
        return is_best

    def finish(self) -> None:
        """Leave the final adapter in `output_dir/adapter`: the best by validation, else the last. Collective."""
        trainer = self.trainer
        keeps_best = trainer.eval_dataset is not None and trainer.args.metric_for_best_model
        if keeps_best and self.evaluated_step != trainer.state.global_step:
            self._determine_best_metric(self.evaluate(), None)
        if self.adapter_step is None:  # no validation set, or one whose loss was never finite
            self.save_adapter(self.adapter_folder)
            self.adapter_step = trainer.state.global_step

    def outcome(self) -> dict[str, Any]:
        """What done.json holds: steps, time, memory (largest of all ranks), sizes. Collective."""
        trainer, args = self.trainer, self.trainer.args
        on_device = args.device.type == "cuda"
        bytes_here = torch.cuda.max_memory_allocated() if on_device else host_peak_bytes()
        everywhere = trainer.accelerator.gather(torch.tensor([bytes_here], device=args.device))
        return {
            "step": trainer.state.global_step,
            "adapter_step": self.adapter_step,
            "best_metric": trainer.state.best_metric,
            **self.starts(),
            "peak_memory_gib": round(int(everywhere.max()) / 2**30, 3),
            "peak_memory_of": "device" if on_device else "host",
            "num_trainable": sum(whole_shape(p).numel() for p in trainable_parameters(trainer.model).values()),
            "world_size": args.world_size,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        begin = time.perf_counter()
        self.trainer.store_flos()
        self.write_checkpoint()
        if self.trainer.args.push_to_hub:
            self.trainer._push_from_checkpoint(
                f"{self.trainer.args.output_dir}/checkpoint-{self.trainer.state.global_step}"
            )
        self._clock += time.perf_counter() - begin

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, and nothing else, to `output_dir`. Collective."""
        self.save_adapter(Path(output_dir or self.trainer.args.output_dir))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does, from fp32 values, and read it back before it gets its name. Collective.

        Raises:
            RuntimeError: on every rank, when the main process could not write it or read back something else.
        """
        state = whole_values(self.trainer.model)

        def write() -> None:
            with atomic_directory(folder) as temporary:
                self.save_adapter_files(temporary, state)

        self.on_main_process(write, f"the adapter was not saved: {folder}")

    def save_adapter_files(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the adapter's files to an existing folder and read them back. On the main process only.

        Raises:
            RuntimeError: they hold something else than `state`, or factors that are off the manifold.
        """
        self.trainer.model.save_pretrained(folder, state_dict=dict(state), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, a form that nobody has filled in
        check_saved_adapter(folder, state, orthonormality_bound=1e-3 if self._retracts() else None)

    def _retracts(self) -> bool:
        return self.manifold_handle is not None and self.manifold_handle.manifold_step.startswith("retract")


class PolarSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """TRL's supervised fine-tuning with PoLAR's manifold step."""


def host_peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def separate_theta(optimizer: torch.optim.Optimizer, thetas: list[nn.Parameter], learning_rate: float | None) -> None:
    """Move `thetas` into parameter groups of their own with `learning_rate`, and drop groups that are empty.

    Their groups come last: the Trainer logs the learning rate of the first group.

    Args:
        optimizer: a fresh optimizer, which has not made a step yet.
        thetas: scale matrices; nothing is moved when the list is empty or `learning_rate` is None.
        learning_rate: peak learning rate of these groups.
    """
    chosen = {id(p) for p in thetas} if learning_rate is not None else set()
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    moved = []
    for group in groups:
        theirs = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if group["params"]:
            optimizer.param_groups.append(group)
        if theirs:
            moved.append({**group, "params": theirs, "lr": learning_rate})
    optimizer.param_groups.extend(moved)


def _prepare_arguments(arguments: Any, *, keeps_best: bool) -> None:
    """Turn off what the mixin does itself or what would hide a problem."""
    # The Trainer's optimizer and RNG files are pickles, tied to one world size; `ResumeMixin` writes its own.
    arguments.save_only_model = True
    # Nothing has to be loaded back at the end: the best adapter is on disk already.
    arguments.load_best_model_at_end = False
    if keeps_best and arguments.metric_for_best_model is None:
        arguments.metric_for_best_model, arguments.greater_is_better = "eval_loss", False
    # The default replaces a loss of nan by the average of the others.
    arguments.logging_nan_inf_filter = False


def _is_factor(name: str) -> bool:
    return any(f".{key}." in name for key in FACTOR_KEYS)
