"""A tiny DeBERTa-v2 whose files look like the published base's, and GLUE files in the official download's format."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import torch

TARGETS = '["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]'
WORDS = ["the", "cat", "dog", "sees", "likes", "a", "red", "house", "never", "always", '"quoted', "and", "it's", "old"]
# Header of the official train.tsv, None for CoLA, which has none.
HEADERS: dict[str, list[str] | None] = {
    "cola": None,
    "sst2": ["sentence", "label"],
    "mrpc": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "stsb": [
        *("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")
    ],
    "qqp": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "mnli": [
        *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
        *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
    ],
    "qnli": ["index", "question", "sentence", "label"],
    "rte": ["index", "sentence1", "sentence2", "label"],
}
LABELS = {
    "mnli": ["entailment", "neutral", "contradiction"],
    **{task: ["entailment", "not_entailment"] for task in ("qnli", "rte")},
    **{task: ["0", "1"] for task in ("cola", "sst2", "mrpc", "qqp")},
}
TEXT_COLUMNS = {
    "mrpc": ["#1 String", "#2 String"],
    "qqp": ["question1", "question2"],
    "qnli": ["question", "sentence"],
    "sst2": ["sentence"],
}


def public_lines(task: str, number: int, seed: int = 0) -> list[str]:
    """Return rows of a task as lines of the official TSV, header first where it has one."""
    draw, header = random.Random(f"{task} {seed}"), HEADERS[task]
    lines = ["\t".join(header)] if header else []
    for index in range(number):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2)]
        label = f"{draw.randint(0, 50) / 10:.3f}" if task == "stsb" else draw.choice(LABELS[task])
        if header is None:
            lines.append(f"gj04\t{label}\t{'' if label == '1' else '*'}\t{texts[0]}")
            continue
        fields = dict.fromkeys(header, str(index))
        columns = TEXT_COLUMNS.get(task, ["sentence1", "sentence2"])
        fields |= dict(zip(columns, texts, strict=False)) | {header[-1] if task != "mrpc" else "Quality": label}
        lines.append("\t".join(fields[name] for name in header))
    return lines


def write_task(folder: Path, task: str, train: int, dev: int) -> Path:
    """Write train.tsv and dev.tsv (for MNLI dev_matched.tsv and dev_mismatched.tsv) to `folder/task`."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    stems = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
    for seed, (stem, number) in enumerate([("train", train), *((stem, dev + i) for i, stem in enumerate(stems))]):
        mark = "\ufeff" if task == "mrpc" else ""
        text = mark + "\n".join(public_lines(task, number, seed)) + "\n"
        (folder / task / f"{stem}.tsv").write_text(text, encoding="utf-8")
    return folder


def make_deberta(folder: Path, texts: list[str] | None = None) -> Path:
    """Save a random DeBERTa-v2 with DeBERTa-v3's settings, and a SentencePiece model as its only tokenizer file.

    As in the published base, there is a language-model head and neither pooler nor classifier. No dropout, so that runs
    can be compared.

    Args:
        folder: where to.
        texts: what the tokenizer learns; by default `public_lines`.
    """
    import sentencepiece
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    folder.mkdir(parents=True, exist_ok=True)
    texts = texts or [line for task in HEADERS for line in public_lines(task, 60, seed=9)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=250,
        hard_vocab_limit=False,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        **{"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
        minloglevel=3,
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    config = DebertaV2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        relative_attention=True,
        position_buckets=16,
        max_relative_positions=-1,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DebertaV2ForMaskedLM(config).save_pretrained(folder)
    return folder
