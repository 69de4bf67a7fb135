"""Small tokenizers that differ where real ones do (BOS, spaces in front, EOS behind), and rows to tokenise."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from polar.data import PreparedData, load_template, prepare
from polar.run_config import DataArguments

LETTERS = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def _gemma(texts: list[str]) -> PreTrainedTokenizerFast:
    """Spaces become a visible mark, nothing is put in front, line breaks merge with what is before, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # real pieces have the mark only in front
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _train(tokenizer, texts, [f"<0x{byte:02X}>" for byte in range(256)], LETTERS)
    return _with_bos(tokenizer)


def _llama2(texts: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's old way: a space of its own before the text, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _train(tokenizer, texts, [f"<0x{byte:02X}>" for byte in range(256)], LETTERS)
    return _with_bos(tokenizer)


def _llama3(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, BOS is added."""
    return _with_bos(_byte_level(texts))


def _gpt2(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level; one token is BOS, EOS and padding, and none is added."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(texts), eos_token="<eos>", bos_token="<eos>")


def _qwen(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level, no BOS at all; punctuation takes line breaks behind it into its token."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"""[ ]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, texts, [], pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def _adds_eos(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level; BOS in front and EOS behind every text."""
    tokenizer = _byte_level(texts)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


KINDS = {"gemma": _gemma, "llama2": _llama2, "llama3": _llama3, "gpt2": _gpt2, "qwen": _qwen, "adds_eos": _adds_eos}


def _byte_level(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, texts, [], pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _train(tokenizer: Tokenizer, texts: list[str], more_special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL + more_special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)


def _with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


WORDS = ["apples", "pears", "Anna", "Ben", "buys", "sells", "twice", "as many", "how much", "does", "it", "cost"]


def sentence(seed: int) -> str:
    """Return five words and a number."""
    draw = np.random.default_rng(seed)
    return " ".join([*draw.choice(WORDS, size=5), str(draw.integers(1000))]) + "?"


ROWS = [
    {"question": sentence(i), "answer": f"It is {i} x 2 = <<{i}*2={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(60)
]
TEXTS = [load_template("alpaca").prompt(row) + " " + row["answer"] for row in ROWS]


@functools.cache
def small_tokenizers() -> dict[str, Any]:
    """One tokenizer of each kind, trained on the prompts and responses of ROWS."""
    return {kind: make(TEXTS) for kind, make in KINDS.items()}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(
    tmp_path: Path, rows: list[Any], tokenizer: Any, max_length: int | None = None, **settings: Any
) -> PreparedData:
    """Write rows to a file and prepare it with seed 0."""
    data = DataArguments(train_dataset=write_jsonl(tmp_path / "rows.jsonl", rows), **settings)
    return prepare(data, tokenizer, max_length, seed=0)
