"""The bases that the recipes name: their architectures in real size, without weights, and tiny with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3Config, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from tests.small_tokenizers import small_tokenizers
from tests.tiny_models import write_multimodal_gemma3

# Published configurations. The number of parameters is the hub's, an independent check of the sizes.
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
VISION |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}


@dataclass(frozen=True)
class Base:
    """One base. `sizes`: hidden, intermediate, layers, query width, key and value width of the language model."""

    model: Callable[[], PreTrainedConfig]
    architecture: str
    tokenizer: str
    num_parameters: int
    sizes: tuple[int, int, int, int, int]

    def num_trainable(self, r: int, *, theta: bool) -> int:
        """r (d_in + d_out) on q, k, v, up and down of every layer, and r^2 for Theta."""
        hidden, intermediate, layers, query, key = self.sizes
        pairs = [(hidden, query), (hidden, key), (hidden, key), (hidden, intermediate), (intermediate, hidden)]
        return layers * sum(r * (d_in + d_out) + (r * r if theta else 0) for d_in, d_out in pairs)


def _gemma3(sizes: tuple[int, int, int, int, int], heads: int, key_heads: int, head_dim: int) -> Gemma3Config:
    hidden, intermediate, layers, _, _ = sizes
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": head_dim}
    return Gemma3Config(text_config=text | {"vocab_size": 262208}, vision_config=VISION)


def _llama(intermediate: int, key_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=intermediate, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=key_heads, vocab_size=vocabulary,
    )  # fmt: skip


GEMMA3_27B, GEMMA3_12B = (5376, 21504, 62, 4096, 2048), (3840, 15360, 48, 4096, 2048)
LLAMA2 = Base(lambda: _llama(11008, 32, 32000), "LlamaForCausalLM", "llama2", 6738415616, (4096, 11008, 32, 4096, 4096))
BASES = {
    "metamathqa_gemma3_27b": Base(
        lambda: _gemma3(GEMMA3_27B, 32, 16, 128),
        "Gemma3ForConditionalGeneration", "gemma", 27432406640, GEMMA3_27B,
    ),
    "commonsense_gemma3_12b": Base(
        lambda: _gemma3(GEMMA3_12B, 16, 8, 256),
        "Gemma3ForConditionalGeneration", "gemma", 12187325040, GEMMA3_12B,
    ),
    "commonsense_gemma2_2b": Base(
        Gemma2Config, "Gemma2ForCausalLM", "gemma", 2614341888, (2304, 9216, 26, 2048, 1024)
    ),
    "commonsense_llama2_7b": LLAMA2,
    "math10k_llama_7b": LLAMA2,
    "commonsense170k_llama3_8b": Base(
        lambda: _llama(14336, 8, 128256), "LlamaForCausalLM", "llama3", 8030261248, (4096, 14336, 32, 4096, 1024)
    ),
}  # fmt: skip


def write_real_size(folder: Path, recipe: str) -> Path:
    """Write config.json of the real architecture, and a small tokenizer; no weights."""
    base = BASES[recipe]
    config = base.model()
    config.architectures = [base.architecture]
    config.save_pretrained(folder)
    small_tokenizers()[base.tokenizer].save_pretrained(folder)
    return folder


def write_tiny(folder: Path, recipe: str) -> Path:
    """Write a random base of the same architecture and module names (a vision tower too), hidden size 32."""
    base = BASES[recipe]
    tokenizer = small_tokenizers()[base.tokenizer]
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    if base.architecture.startswith("Gemma3"):
        write_multimodal_gemma3(folder, vocab_size=len(tokenizer))
    elif base.architecture.startswith("Gemma2"):
        Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=64)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, Path]:
    """Write 24 rows for each recipe, and for the tasks that are trained: of the hub, and in LLM-Adapters' packaging."""
    rows = {
        "metamathqa": [
            {"query": f"Add {i} and {i}.", "response": f"The answer is: {2 * i}", "type": "x"} for i in range(24)
        ],
        "instruction": [
            {"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}.", "answer": str(i + 1)}
            for i in range(24)
        ],
        "piqa": [
            {"goal": f"To carry {i} apples,", "sol1": "take a bag.", "sol2": "take a fork.", "label": i % 2}
            for i in range(24)
        ],
        "winogrande": [
            {"sentence": f"Ann paid Ben {i}, so _ was glad.", "option1": "Ann", "option2": "Ben", "answer": "2"}
            for i in range(24)
        ],
        "boolq": [
            {
                "instruction": f"Please answer the following question with true or false, question: is {i} even?\n\n"
                "Answer format: true/false",
                "output": "the correct answer is true",
                "answer": "true",
            }
            for i in range(24)
        ],
    }
    files = {}
    for name, content in rows.items():
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(content))
    return files
