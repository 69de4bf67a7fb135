"""An experiment folder on a CPU with a tiny model: what the suite does with it, in a few steps, and what must hold.

Configuration by stock PEFT, training parameters over the suite's defaults, bf16 base with fp32 factors, that optimizer,
schedule and clipping, no hook of ours; then loss, greedy generation, the base's loss with the adapter disabled,
save_pretrained, and the same logits from what was saved. Rows are in MetaMathQA's format.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.leaderboard.folders import PARAMETERS_FILE
from polar.errors import UserError

# The suite's defaults for what a dry run uses; a test compares them with a checkout's, where there is one.
DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "autocast_adapter_dtype": True,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
}
WARMUP_SHARE = 0.1  # of the steps, under the cosine schedule
NUM_HELD_OUT = 8
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """A problem and its worked answer."""

    query: str
    response: str


@dataclass(frozen=True)
class Setting:
    """What the experiments of one dry run share.

    Attributes:
        model: folder or hub name of a causal language model with its tokenizer.
        rows: the first NUM_HELD_OUT are held out, the others trained on, in their order, again and again.
        steps: optimizer steps.
    """

    model: str
    rows: Sequence[Row]
    steps: int


def generated_rows(number: int, seed: int = 0) -> list[Row]:
    """Word problems of the kind that the demo's base has not seen, their answers as MetaMathQA ends them."""
    from demo.problems import NEW_KINDS, problems

    found = itertools.islice(problems(NEW_KINDS, seed), number)
    return [Row(p.question, f"{p.answer}\nThe answer is: {p.answer.rpartition('#### ')[2]}") for p in found]


def read_rows(source: str, number: int) -> list[Row]:
    """The first rows of a file, as query and response or as question and answer."""
    from polar.rows import read_rows, recognise

    rows = []
    for place, row in itertools.islice(read_rows(source, "train", "--data"), number):
        _, columns = recognise(set(row) & {"query", "response", "question", "answer"}, f"{source}, row {place}")
        rows.append(Row(row[columns.prompt], row[columns.response]))
    if len(rows) <= NUM_HELD_OUT:
        raise UserError(f"--data {source} has {len(rows)} rows: {NUM_HELD_OUT} are held out, give more")
    return rows


def dry_run(folder: Path, setting: Setting, save_to: Path | None = None) -> dict[str, Any]:
    """Take one experiment folder through the suite's steps.

    Args:
        folder: with `adapter_config.json` and, if not all is default, `training_params.json`.
        setting: model, rows, steps.
        save_to: where the adapter stays; a temporary folder without.

    Returns:
        Losses per token before and after on held-out rows, and of the first and last fifth of the steps; orthonormality
        errors, sizes, seconds; `broken`, what does not hold, empty if all does.
    """
    import peft

    begin = time.perf_counter()
    own = folder / PARAMETERS_FILE
    parameters = {**DEFAULTS, **(json.loads(own.read_text(encoding="utf-8")) if own.exists() else {})}
    torch.manual_seed(parameters["seed"])
    config = peft.PeftConfig.from_pretrained(str(folder))
    base, tokenizer = load(setting.model, parameters)
    texts = [(parameters["query_template"].format(query=row.query), row.response) for row in setting.rows]
    tokens = [tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id] for prompt, answer in texts]
    tokens = [ids[: parameters["max_seq_length"]] for ids in tokens]
    held_out = pad(tokens[:NUM_HELD_OUT], tokenizer.eos_token_id)
    base_loss = loss_of(base.eval(), held_out)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=parameters["autocast_adapter_dtype"])
    before, error_before = loss_of(model.eval(), held_out), orthonormality_error(model)
    losses = train(model.train(), tokens[NUM_HELD_OUT:], tokenizer.eos_token_id, parameters, setting.steps)
    after = loss_of(model.eval(), held_out)
    with model.disable_adapter():
        disabled = loss_of(model, held_out)
    prompt = tokenizer(texts[0][0], return_tensors="pt")
    answer = model.generate(
        **prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    size, same = save_and_reload(model, setting.model, parameters, held_out, save_to)
    fifth = max(1, setting.steps // 5)
    holds = {
        "a loss is not finite": all(map(math.isfinite, [before, after, *losses])),
        f"disable_adapter gives loss {disabled}, the base {base_loss}": disabled == base_loss,
        "nothing was generated": answer.shape[1] > prompt["input_ids"].shape[1],
        "the saved adapter gives other logits": same,
        "the adapter did not move": after != before,
    }
    return {
        "experiment": f"{folder.parent.name}/{folder.name}",
        "field": getattr(config, "backward_field", "-"),
        "steps": setting.steps,
        "train_loss_first": sum(losses[:fifth]) / fifth,
        "train_loss_last": sum(losses[-fifth:]) / fifth,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "orthonormality_error_before": error_before,
        "orthonormality_error": orthonormality_error(model),
        "num_trainable_params": model.get_nb_trainable_parameters()[0],
        "file_size_kib": size / 1024,
        "wall_s": time.perf_counter() - begin,
        "broken": [what for what, does in holds.items() if not does],
    }


def load(name: str, parameters: dict[str, Any]) -> tuple[Any, Any]:
    """The base model, frozen by nobody yet, and its tokenizer with EOS as padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, parameters["dtype"])), tokenizer


def train(model: Any, tokens: Sequence[list[int]], eos: int, parameters: dict[str, Any], steps: int) -> list[float]:
    """Train on token rows, batch after batch, and return the loss of each step."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = getattr(torch.optim, parameters["optimizer_type"])(model.parameters(), **parameters["optimizer_kwargs"])
    scheduler = None
    if parameters["lr_scheduler"] == "cosine":
        scheduler = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_SHARE * steps), steps)
    rows, losses = itertools.cycle(tokens), []
    for _ in range(steps):
        batch = pad(list(itertools.islice(rows, parameters["batch_size"])), eos)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if parameters["grad_norm_clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), parameters["grad_norm_clip"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def pad(rows: Sequence[list[int]], eos: int) -> dict[str, Tensor]:
    """(rows, longest) ids, mask and labels, padded on the right; no label on padding."""
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows])
    ids = torch.tensor([ids + [eos] * (longest - len(ids)) for ids in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.inference_mode()
def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    """Mean loss per token."""
    return float(model(**batch).loss)


def orthonormality_error(model: Any) -> float:
    """The largest norm(X^T X - I)_F of a factor, computed in fp32; NaN in a model without PoLAR adapters."""
    from polar import stiefel

    names = ("polar_X", "polar_Y")
    factors = [p for name, p in model.named_parameters() if any(part in names for part in name.split("."))]
    return max((float(stiefel.orthonormality_error(p.detach().float())) for p in factors), default=math.nan)


def save_and_reload(
    model: Any, base: str, parameters: dict[str, Any], batch: dict[str, Tensor], save_to: Path | None
) -> tuple[int, bool]:
    """Bytes of adapter_model.safetensors, and whether it gives the same logits on a fresh base."""
    import peft

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(save_to or temporary)
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(load(base, parameters)[0], folder).eval()
        with torch.inference_mode():
            same = torch.equal(model(**batch).logits, again(**batch).logits)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size, same
