"""A Trainer that writes checkpoints of `polar.checkpoint` and continues from them, under every engine.

transformers 5.23 keeps optimizer, scheduler and random state in pickles, under DeepSpeed in folders tied to one number
of processes. What is replaced here is the writing of a checkpoint (`_save_checkpoint`) and the reading of it
(`_prepare_for_training`, `_load_rng_state`); the Trainer still decides when to save, which checkpoint is best, and
which batches of an epoch to skip.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from polar import checkpoint
from polar.engine_state import OptimizerState, whole_optimizer_state, whole_values, write_optimizer_state, write_values
from polar.errors import UserError
from polar.files import flush, write_json
from polar.run_folder import PACKAGES, installed_version
from polar.stop import StopRequest

METRICS = "metrics.jsonl"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # deepspeed 0.19.8, fp16


class ResumeMixin:
    """Checkpoints for `AdapterTrainerMixin`, which has `save_adapter_files`, `adapter_step` and `evaluated_step`.

    Attributes:
        run_identity: `polar.checkpoint.run_identity`, written into each checkpoint.
        stop: who asked to stop, and whether an evaluation was due then.
        train_begin: when `train` was called, in seconds of `time.perf_counter`.
        earlier_starts: starts of this run before this one, and their seconds in `train` up to the checkpoint.
    """

    trainer: Any
    adapter_folder: Path
    adapter_step: int | None
    evaluated_step: int | None
    run_identity: Mapping[str, Any]
    stop: StopRequest
    train_begin: float
    earlier_starts: Mapping[str, Any] = MappingProxyType({"num_starts": 0, "train_time_s": 0.0})

    # Writing

    def write_checkpoint(self) -> None:
        """Write `checkpoint-N` for the current step, whole or not at all, and delete surplus ones. Collective.

        Raises:
            RuntimeError: on every rank, when the main process could not write it or read back something else.
        """
        trainer = self.trainer
        state, output_dir = trainer.state, Path(trainer.args.output_dir)
        folder = output_dir / f"checkpoint-{state.global_step}"
        best = output_dir / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best == folder or best.is_dir()):
            state.best_model_checkpoint = str(best)
        values = whole_values(trainer.model)
        optimizer = whole_optimizer_state(trainer.model, trainer.optimizer, keep=trainer.is_world_process_zero())
        processes = self._from_every_process(
            {
                "random": checkpoint.random_state(),
                "loss_since_log": trainer._tr_loss.item(),
                "metrics_since_log": dict(getattr(trainer, "_metrics", {}).get("train", {})),
            }
        )

        def write() -> None:
            if self._metrics_file().is_file():
                flush(self._metrics_file())  # the checkpoint says how long it is
            with checkpoint.new_checkpoint(folder) as temporary:
                self.save_adapter_files(temporary, values)  # type: ignore[attr-defined]
                checkpoint.write_tensors(temporary, _named(values, optimizer))
                write_json(temporary / checkpoint.STATE, self._training_state(optimizer, processes))
                write_json(temporary / checkpoint.RANDOM, [process["random"] for process in processes])
                self._export_callbacks()
                state.save_to_json(str(temporary / "trainer_state.json"))
            if optimizer.problem:
                print(f"note: --resume will not work from {folder}, without optimizer state: {optimizer.problem}")
            checkpoint.rotate(output_dir, folder, trainer.args.save_total_limit, state.best_model_checkpoint)

        self.on_main_process(write, f"{folder} was not saved")

    def on_main_process(self, work: Callable[[], None], what_failed: str) -> None:
        """Run `work` on the main process; raise its error on every rank, so that nobody goes on as if it were done."""
        trainer, problem, cause = self.trainer, "", None
        if trainer.is_world_process_zero():
            try:
                work()
            except Exception as error:  # whatever it is (a full disk is a SafetensorError): the other ranks wait
                cause = error
                problem = f"{what_failed}: {type(error).__name__}: {error}"
        if trainer.args.world_size > 1:
            problems = [problem]
            torch.distributed.broadcast_object_list(problems, src=0)
            problem = problems[0]
        if problem:
            raise RuntimeError(problem) from cause

    def starts(self) -> dict[str, Any]:
        """Starts of this run so far, and their seconds in `train`: steps, evaluations and checkpoints."""
        seconds = self.earlier_starts["train_time_s"] + time.perf_counter() - self.train_begin
        return {"num_starts": self.earlier_starts["num_starts"] + 1, "train_time_s": round(seconds, 3)}

    def _metrics_file(self) -> Path:
        return Path(self.trainer.args.output_dir) / METRICS

    def _from_every_process(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        values: list[Any] = [value] * self.trainer.args.world_size
        if len(values) > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def _training_state(self, optimizer: OptimizerState, processes: list[dict[str, Any]]) -> dict[str, Any]:
        trainer = self.trainer
        metrics = self._metrics_file()
        return {
            "format": checkpoint.FORMAT,
            "step": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "max_steps": trainer.state.max_steps,
            "world_size": trainer.args.world_size,
            "settings": dict(self.run_identity),
            "versions": {name: installed_version(name) for name in PACKAGES},
            "optimizer": {
                "kind": optimizer.kind,
                "moments": {name: sorted(tensors) for name, tensors in optimizer.moments.items()},
                "steps": optimizer.steps,
                "problem": optimizer.problem,
                "learning_rates": [float(group["lr"]) for group in trainer.optimizer.param_groups],
            },
            "scheduler": trainer.lr_scheduler.state_dict(),
            "loss_scale": _loss_scale(trainer),
            "logging": {
                "last_step": trainer._globalstep_last_logged,
                "loss": [process["loss_since_log"] for process in processes],
                "metrics": [process["metrics_since_log"] for process in processes],
                "tokens_seen": getattr(trainer, "_total_train_tokens", None),
                "metrics_bytes": metrics.stat().st_size if metrics.is_file() else 0,
            },
            "adapter_step": self.adapter_step,
            "evaluated_step": self.evaluated_step,
            "evaluation_is_due": self.stop.evaluation_is_due,
            "starts": self.starts(),
        }

    def _export_callbacks(self) -> None:
        """Put the state of callbacks into the Trainer's, as its own `_save_checkpoint` does."""
        trainer = self.trainer
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                name, exported = type(callback).__name__, callback.state()
                if isinstance(trainer.state.stateful_callbacks[name], list):
                    trainer.state.stateful_callbacks[name].append(exported)
                else:
                    trainer.state.stateful_callbacks[name] = exported

    # Reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: values are read when the engine is set up, in `_prepare_for_training`."""

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)  # type: ignore[misc]
        state = self.trainer.state
        # The Trainer would go on with the intervals and batch size of the earlier start; those may change.
        state.compute_steps(self.trainer.args, max_steps)
        state.train_batch_size = self.trainer._train_batch_size
        return result

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Without a checkpoint, so that the Trainer does not look for DeepSpeed's folders and pickles.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if resume_from_checkpoint is not None:
            self._read_checkpoint(Path(resume_from_checkpoint))
        return prepared

    def _read_checkpoint(self, folder: Path) -> None:
        """Read values, moments, schedule and bookkeeping; every rank reads the same files. Collective."""
        trainer, saved = self.trainer, checkpoint.read_state(folder)
        optimizer = saved["optimizer"]
        if optimizer["problem"]:
            raise UserError(
                f"{folder} holds no optimizer state ({optimizer['problem']}): start afresh with --overwrite, and with "
                "another optim to be able to resume"
            )
        groups = trainer.optimizer.param_groups
        if len(groups) != len(optimizer["learning_rates"]):
            raise UserError(
                f"{folder} was made with {len(optimizer['learning_rates'])} parameter groups, there are {len(groups)} "
                "now: use the same optimizer"
            )
        with safe_open(folder / checkpoint.TENSORS, framework="pt") as file:
            write_values(trainer.model, lambda name: file.get_tensor(f"value/{name}"))
            write_optimizer_state(
                trainer.model,
                trainer.optimizer,
                optimizer["moments"],
                optimizer["steps"],
                lambda name, key: file.get_tensor(f"{key}/{name}"),
            )
        trainer.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, learning_rate in zip(groups, optimizer["learning_rates"], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        _set_loss_scale(trainer, saved["loss_scale"])
        self.earlier_starts = saved.get("starts", self.earlier_starts)
        self.evaluated_step = saved["evaluated_step"]
        if saved["adapter_step"] is not None and self.adapter_folder.is_dir():
            self.adapter_step = saved["adapter_step"]
        else:  # there is no best adapter any more: the next one is the best again
            trainer.state.best_metric = trainer.state.best_global_step = None

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Continue random numbers and running sums; the Trainer calls it right before the first step."""
        if checkpoint_folder is None:
            return
        trainer, folder = self.trainer, Path(checkpoint_folder)
        rank, states = trainer.args.process_index, checkpoint.read_random_states(folder)
        if len(states) == trainer.args.world_size:
            checkpoint.set_random_state(states[rank])
        else:  # other processes see other rows, so there is no stream to continue; only no rank may repeat one
            seeds = np.random.SeedSequence([trainer.args.seed, trainer.state.global_step, rank]).generate_state(3)
            random.seed(int(seeds[0]))
            np.random.seed(int(seeds[1]))
            torch.manual_seed(int(seeds[2]))
        saved = checkpoint.read_state(folder)
        logging = saved["logging"]
        losses, same = logging["loss"], len(states) == trainer.args.world_size
        carried = losses[rank] if same else sum(losses) / len(losses)
        trainer._tr_loss += carried
        trainer._total_loss_scalar -= sum(losses) / len(losses)  # train_loss at the end covers the steps of this start
        trainer._globalstep_last_logged = logging["last_step"]
        if hasattr(trainer, "_metrics"):
            trainer._metrics["train"].update(logging["metrics"][rank if same else 0])
            trainer._total_train_tokens = logging["tokens_seen"] or 0
        if saved.get("evaluation_is_due") and trainer.args.eval_strategy != IntervalStrategy.NO:
            # The run stopped between a step and its evaluation, which draws its random numbers here as it would have.
            trainer._determine_best_metric(trainer._evaluate(None, None), None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With save_total_limit 1 the Trainer would delete the newest checkpoint when another one is the best.
        state = self.trainer.state
        best, state.best_model_checkpoint = state.best_model_checkpoint, None
        result = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        state.best_model_checkpoint = best
        return result


def _named(values: Mapping[str, Tensor], optimizer: OptimizerState) -> dict[str, Tensor]:
    tensors = {f"value/{name}": value for name, value in values.items()}
    return tensors | {f"{key}/{n}": t for n, moments in optimizer.moments.items() for key, t in moments.items()}


def _loss_scale(trainer: Any) -> dict[str, Any]:
    """State of the fp16 loss scale, of whichever engine has one; empty without fp16."""
    state: dict[str, Any] = {}
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None:
        state["torch"] = scaler.state_dict()
    scaler = getattr(getattr(trainer.optimizer, "optimizer", None), "loss_scaler", None)
    if scaler is not None:
        state["deepspeed"] = {name: getattr(scaler, name) for name in LOSS_SCALER_FIELDS if hasattr(scaler, name)}
    return state


def _set_loss_scale(trainer: Any, state: Mapping[str, Any]) -> None:
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and state.get("torch"):
        scaler.load_state_dict(state["torch"])
    scaler = getattr(getattr(trainer.optimizer, "optimizer", None), "loss_scaler", None)
    if scaler is not None:
        for name, value in state.get("deepspeed", {}).items():
            setattr(scaler, name, value)
