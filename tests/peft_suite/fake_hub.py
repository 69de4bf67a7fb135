"""A Hugging Face cache with tiny random models under the names that PEFT's tests load: no hub access is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REVISION = "0" * 40


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return hub name -> (model class of transformers, arguments of its configuration)."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = {**size, **tokens, "num_key_value_heads": 2, "max_position_embeddings": 64}
    gpt2 = {**tokens, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    opt = {**tokens, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt |= {"word_embed_proj_dim": 16, "max_position_embeddings": 64}
    opt["vocab_size"] = 2000  # one test wants an adapter to be less than a tenth of its model
    opt_small = {**opt, "num_hidden_layers": 12}
    gemma = {**llama, "head_dim": 8, "sliding_window": 16}
    bart = {**tokens, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    bart |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    bert = {**size, **tokens, "max_position_embeddings": 64}
    roberta = {**bert, "type_vocab_size": 1, "max_position_embeddings": 66}
    classifiers = {"RobertaForSequenceClassification": roberta, "BertForSequenceClassification": bert}
    deberta = {**bert, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    clip = {**size, **tokens, "projection_dim": 16, "max_position_embeddings": 64}
    return {
        "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", opt),
        "peft-internal-testing/opt-125m": ("OPTForCausalLM", opt_small),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", llama),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", gemma),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", gpt2),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", bart),
        "peft-internal-testing/tiny-random-BertModel": ("BertModel", bert),
        **{f"peft-internal-testing/tiny-random-{c}": (c, config) for c, config in classifiers.items()},
        "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", deberta),
        "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", clip),
    }


def build(cache: Path) -> None:
    """Write the models into `cache` in the layout of huggingface_hub, once."""
    import torch
    import transformers

    for name, (model_class, config) in models().items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model = getattr(transformers, model_class)
        model(model.config_class(**config)).save_pretrained(folder / "snapshots" / REVISION)
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)
