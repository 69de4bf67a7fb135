"""The Trainer of GLUE runs: transformers' own, the task's metrics, its scores beside the adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer

from polar.glue import GlueTask, mean_loss, scores
from polar.glue_results import prediction_rows, result_columns, write_results
from polar.run_folder import installed_version
from polar.trainer import AdapterTrainerMixin

if TYPE_CHECKING:
    from polar.glue_data import GlueData
    from polar.run_config import RunConfig

VERSIONED = ("polar", "torch", "transformers", "peft", "datasets")


def about_run(config: RunConfig, data: GlueData) -> dict[str, Any]:
    """Return what results.json says about the run that was scored."""
    validation = data.report["validation"].values()
    return {
        "base": config.model.model_name_or_path,
        "data": [split["source"] for split in validation],
        "num_left_out": sum(split["rows_read"] - split["rows_kept"] for split in validation),
        "num_cut": sum(split["truncated"]["rows"] for split in validation),
        "max_length": config.training.max_length,
        "dtype": config.model.dtype,
        "seed": config.training.seed,
    }


class PolarGlueTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer with PoLAR's manifold step and GLUE's metrics.

    Whenever an adapter is the best so far, its scores go to `output_dir/eval_glue_TASK/results.json` with it, and the
    predictions behind them beside it.

    Args:
        task: which one.
        parts: name of each validation set -> its rows; they follow each other in `eval_dataset`.
        about: what results.json says about the run: base, data, ...
        **kwargs: of `AdapterTrainerMixin` and of the Trainer; `processing_class` is the tokenizer.
    """

    def __init__(self, *, task: GlueTask, parts: Mapping[str, int], about: Mapping[str, Any], **kwargs: Any) -> None:
        self.task, self.parts, self.about = task, dict(parts), dict(about)
        self._predictions: EvalPrediction | None = None
        kwargs["args"].label_names = ["labels"]
        tokenizer, config = kwargs["processing_class"], kwargs["model"].config
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            # Heads of decoders look for the last token that is no padding; the Trainer would warn about the others.
            setattr(config, name, getattr(tokenizer, name))
        super().__init__(data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=self._scores, **kwargs)
        # transformers 5.23 takes **kwargs in a model's forward for a promise to divide the loss by the number of items
        # in all micro batches; classification heads average over their own, so accumulation would multiply gradients.
        self.model_accepts_loss_kwargs = False

    def _scores(self, prediction: EvalPrediction) -> dict[str, float]:
        self._predictions = prediction
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return {**scores(self.task, logits, labels, self.parts), "loss": mean_loss(self.task, logits, labels)}

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler[int]:
        # Also with group_by_length: the validation sets are told apart by their places.
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            folder = Path(str(self.args.output_dir)) / f"eval_glue_{self.task.name}"
            self.on_main_process(lambda: self._write_results(folder, metrics), f"{folder} was not written")
        return is_best

    def _write_results(self, folder: Path, metrics: Mapping[str, float]) -> None:
        columns = result_columns(
            self.task, self.parts, {name.removeprefix("eval_"): value for name, value in metrics.items()}
        )
        weights = self.adapter_folder / "adapter_model.safetensors"
        adapter = {
            "folder": str(self.adapter_folder),
            "peft_type": self.trainer.model.active_peft_config.peft_type.value,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
        result = {
            "task": f"glue_{self.task.name}",
            "headline": next(iter(columns)),
            "columns": columns,
            "num_problems": sum(self.parts.values()),
            "parts": self.parts,
            "labels": list(self.task.labels),
            "adapter": adapter,
            "step": self.state.global_step,
            "validation_loss": metrics["eval_loss"],
            **self.about,
            "versions": {name: installed_version(name) for name in VERSIONED},
        }
        assert self._predictions is not None
        logits, labels = np.asarray(self._predictions.predictions), np.asarray(self._predictions.label_ids)
        write_results(folder, result, prediction_rows(self.task, self.parts, logits, labels))
