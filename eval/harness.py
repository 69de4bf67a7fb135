"""The only file that imports lm-eval: one model class, the task loader, one evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.evaluator
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model_state_dict
from safetensors import safe_open

from polar.errors import UserError
from polar.pair_tokens import PairTokenizer

TASKS_FOLDER = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERATIONS = 1000  # any number above 0: the standard error of a mean is computed, not drawn


# lm-eval 0.4.13 asks git for the commit of the current folder; outside of a checkout git complains on the terminal.
lm_eval.evaluator.get_git_commit_hash = lambda: None


class PromptModel(HFLM):
    """lm-eval's transformers backend with the training's own tokenisation of prompts and no silent truncation."""

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenise prompts as `polar.data` does (BOS exactly once where the tokenizer has one), padded on the left.

        Returns:
            input_ids and attention_mask, both (len(strings), longest) int64.
        """
        rows = PairTokenizer(self.tokenizer).encode_prompts(strings)
        longest = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, longest - len(row) :] = torch.tensor(row)
            attention_mask[index, longest - len(row) :] = 1
        return input_ids, attention_mask

    def check_prompts(self, prompts: list[str], max_new_tokens: int) -> int:
        """Return the longest prompt's number of tokens; raise where prompt and answer do not fit the model.

        lm-eval would cut the beginning of such a prompt, that is, BOS and the instruction.
        """
        if not prompts:
            raise UserError("no problems to score; check --data and --limit")
        longest = max(len(row) for row in PairTokenizer(self.tokenizer).encode_prompts(prompts))
        if longest + max_new_tokens > self.max_length:
            raise UserError(
                f"max_new_tokens {max_new_tokens}: the longest prompt has {longest} tokens and the model takes"
                f" {self.max_length}; pass --max_new_tokens {max(self.max_length - longest, 1)} or less"
            )
        return longest

    def check_adapter(self, folder: Path) -> None:
        """Compare the adapter's file with what PEFT made of it, which is silent about layers that only one side has.

        Raises:
            UserError: the base has other layers than the adapter was made for.
        """
        file, prefix = folder / "adapter_model.safetensors", getattr(self.model.base_model, "prefix", None)
        if not file.is_file() or not prefix:  # prompt learning methods have no tensors in layers
            return
        with safe_open(file, framework="pt") as stream:
            stored = {key for key in stream.keys() if f".{prefix}" in key}  # noqa: SIM118 (not a mapping)
        loaded = {
            key for key in get_peft_model_state_dict(self.model, save_embedding_layers=False) if f".{prefix}" in key
        }
        for found, verb in ((stored - loaded, "only the adapter has"), (loaded - stored, "only the base has")):
            if found and stored & loaded:  # with no key in common PEFT has translated the names of an old file
                raise UserError(
                    f"the adapter was made for another base: {verb} {len(found)} of its tensors, e.g. {min(found)};"
                    " pass the base it was trained on"
                )

    def canary(self, prompt: str) -> dict[str, float]:
        """Run one prompt through base and adapter; raise where the adapter is not applied or the result is not finite.

        Returns:
            max_logit_change: largest absolute difference of the last token's logits.
        """
        input_ids, attention_mask = (part.to(self.device) for part in self.tok_batch_encode([prompt]))
        with torch.no_grad():
            adapted = self.model(input_ids, attention_mask=attention_mask).logits[0, -1].float()
            with self.model.disable_adapter():
                plain = self.model(input_ids, attention_mask=attention_mask).logits[0, -1].float()
        if not torch.isfinite(adapted).all():
            raise UserError("the adapted model gives logits that are not finite; try --dtype float32")
        change = (adapted - plain).abs().max().item()
        if change == 0.0:
            raise UserError(
                "base and adapter give the same logits: the adapter is not applied, or it was never trained;"
                " the score would be the base's"
            )
        return {"max_logit_change": change}


def load_task(name: str, template: str, data: str) -> Any:
    """Return lm-eval's task object for one of the project's tasks, without scanning lm-eval's own thousands."""
    manager = TaskManager(
        include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"template": template, "data": data}
    )
    return manager.load([name])["tasks"][name]


def evaluate(model: PromptModel, task: Any, generation: dict[str, Any], limit: int | None, seed: int) -> dict[str, Any]:
    """Run one task and return lm-eval's result with the samples."""
    result = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False, include_path=str(TASKS_FOLDER)),
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        gen_kwargs=generation,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert result is not None, "lm-eval returns a result on process 0, and there is one process"
    return dict(result)
