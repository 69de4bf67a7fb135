"""Train the demo's base model from scratch: a tiny Gemma-3 that solves the word problems of `SEEN_KINDS`.

    python -m demo.make_base --out demo/base --seed 0

writes a tokenizer (byte-level BPE, digits one by one) and a Gemma-3 model of 0.85 million parameters. The seed
fixes data, initial weights and order; the exact weights still depend on the machine's floating-point kernels and on
the number of threads. `base_report.json` beside the weights holds the accuracy per kind, the new kind included.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from demo.problems import NEW_KINDS, SEEN_KINDS, Problem, problems
from polar.files import atomic_directory, write_json
from polar.templates import load_template

TEMPLATE = load_template("question_answer")
VOCABULARY_SIZE = 512
DRILL_SHARE = 0.25  # of the rows of a batch: bare sums, since a word problem spends 60 tokens on one or two of them
NUM_DRILLS = 12
IGNORED_LABEL = -100


def train_tokenizer(seed: int, num_problems: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated problems: any text round-trips, every digit is a token of its own."""
    texts = ("".join(text(p)) for p in islice(problems(SEEN_KINDS, seed), num_problems))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Gemma3ForCausalLM:
    """A Gemma-3 text model with random weights: 4 layers, 3 sliding and 1 global, as wide as the arithmetic needs."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma3ForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of seen kinds and drills, padded on the right, labels on what is to be answered only.

    Returns:
        `input_ids`, `attention_mask`, `labels`, each (size, longest) int64.
    """
    stream, rng = problems(SEEN_KINDS, seed), random.Random(seed)
    num_drills = round(DRILL_SHARE * size)
    while True:
        drills = [encode_drill(tokenizer, rng) for _ in range(num_drills)]
        yield pad([*drills, *(encode(tokenizer, p) for p in islice(stream, size - num_drills))], tokenizer.pad_token_id)


def text(problem: Problem) -> tuple[str, str]:
    """Prompt and response of a problem, as `polar.train` and `polar eval` make them too."""
    row = problem.row()
    return TEMPLATE.prompt(row), TEMPLATE.full_response(row, problem.answer)


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of prompt + answer + eos and their labels."""
    prompt, response = text(problem)
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED_LABEL] * len(prompt_ids) + response_ids


def encode_drill(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row of bare calculations; labels on the results only."""
    input_ids, labels = [tokenizer.bos_token_id], [IGNORED_LABEL]
    for _ in range(NUM_DRILLS):
        operator = rng.choice("+-*")
        largest = 6 if operator == "*" else 40
        left, right = rng.randint(2, largest), rng.randint(2, largest)
        if operator == "-":
            left += right
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        given = tokenizer(f"{left}{operator}{right}=", add_special_tokens=False)["input_ids"]
        asked = tokenizer(f"{result}\n", add_special_tokens=False)["input_ids"]
        input_ids += given + asked
        labels += [IGNORED_LABEL] * len(given) + asked
    return input_ids, labels


def pad(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack rows of different length, padding on the right."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED_LABEL] * (longest - len(labels)) for _, labels in rows]),
    }


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[Problem]) -> float:
    """Share of the problems whose greedy answer ends in the right `#### N`."""
    model.eval()
    num_right = 0
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        prompts = tokenizer([text(p)[0] for p in part], return_tensors="pt", padding=True)
        out = model.generate(**prompts, max_new_tokens=120, do_sample=False)
        texts = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        num_right += sum(
            t.split("####")[-1].strip() == p.answer.split("####")[-1].strip() for t, p in zip(texts, part, strict=True)
        )
    model.train()
    return num_right / len(rows)


def pretrain(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay over freshly generated problems; no problem list is ever repeated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05)
    stream, started, num_tokens = batches(tokenizer, arguments.batch, arguments.seed + 1), time.time(), 0
    for step in range(arguments.steps):
        progress = step / arguments.steps
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        batch = next(stream)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += int(batch["attention_mask"].sum())
        if (step + 1) % 100 == 0:
            seconds = time.time() - started
            print(
                f"step {step + 1} loss {loss.item():.4f} {num_tokens / seconds:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            seen = list(islice(problems(SEEN_KINDS, 10_000), 100))
            new = list(islice(problems(NEW_KINDS, 10_001), 50))
            print(
                f"  seen {accuracy(model, tokenizer, seen):.2f} new {accuracy(model, tokenizer, new):.2f}", flush=True
            )


def report(
    model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy per kind on problems of another seed, and what was run."""
    kinds = SEEN_KINDS | NEW_KINDS
    scores = {
        kind: accuracy(model, tokenizer, list(islice(problems({kind: generator}, arguments.seed + 20_000), 100)))
        for kind, generator in kinds.items()
    }
    return {
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "num_parameters": model.num_parameters(),
        "torch": torch.__version__,
        "accuracy_by_kind": scores,
        "kinds_never_seen": list(NEW_KINDS),
    }


def main(argv: list[str] | None = None) -> None:
    """Train, measure, save in bf16."""
    parser = argparse.ArgumentParser(description="Train the demo's tiny Gemma-3 base model from scratch.")
    parser.add_argument("--out", default="demo/base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    arguments = parser.parse_args(argv)
    tokenizer = train_tokenizer(arguments.seed)
    model: Any = build_model(tokenizer, arguments.seed)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, arguments)
    # Measured as it is used: rounded to bf16 in the file, computed in fp32.
    model.to(torch.bfloat16).float()
    result = report(model, tokenizer, arguments)
    print(result, flush=True)
    with atomic_directory(Path(arguments.out)) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "base_report.json", result)


if __name__ == "__main__":
    main()
