"""What is sent to vLLM and how its answers are read. vLLM itself needs a GPU and does not run here.

A stand-in with vLLM's interface, computed by transformers, checks the reading: positions of log-probabilities, stop
reasons, the canary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from polar.errors import UserError
from polar.export import VLLM_MAX_LORA_RANKS, export_lora
from polar_eval.backend import Generation
from polar_eval.hf_backend import HFBackend
from polar_eval.vllm_backend import VLLMBackend, engine_arguments, import_vllm, sampling_arguments, served_rank
from tests.tiny_models import linear_sizes, write_adapter


@pytest.mark.parametrize(("r", "served"), [(1, 1), (2, 8), (8, 8), (10, 16), (33, 64), (257, 320), (512, 512)])
def test_rank_is_rounded_up_to_what_vllm_takes(r: int, served: int) -> None:
    assert served_rank(r) == served


def test_a_rank_beyond_vllm_is_an_error() -> None:
    with pytest.raises(UserError, match="rank 513: vLLM takes at most 512"):
        served_rank(VLLM_MAX_LORA_RANKS[-1] + 1)


def test_zero_padding_to_the_served_rank_is_exact(tmp_path: Path, tiny_gemma3: Path) -> None:
    """vLLM pads A and B with zeros to max_lora_rank: bit for bit the same B A in float64 and no term more."""
    sizes = linear_sizes(AutoModelForCausalLM.from_pretrained(tiny_gemma3))
    write_adapter(tmp_path / "adapter", sizes, r=5, base_model_name_or_path=str(tiny_gemma3))
    export_lora(tmp_path / "adapter", tmp_path / "lora", canary=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    rank = served_rank(5)
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        wide_A = torch.zeros(rank, A.shape[1], dtype=torch.float64)
        wide_B = torch.zeros(B.shape[0], rank, dtype=torch.float64)
        wide_A[: A.shape[0]], wide_B[:, : B.shape[1]] = A, B
        assert torch.allclose(wide_B @ wide_A, B @ A, rtol=0, atol=1e-15)


def write_config(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 10, **fields}))
    return folder


def test_engine_arguments(tmp_path: Path) -> None:
    plain = engine_arguments(Path("base"), None, "auto", 2, None, 7)
    assert plain["tensor_parallel_size"] == 2 and plain["seed"] == 7 and "enable_lora" not in plain
    assert "max_num_seqs" not in plain
    lora = engine_arguments(Path("base"), write_config(tmp_path / "a"), "bfloat16", 1, 64, 0)
    assert lora["enable_lora"] and lora["max_lora_rank"] == 16 and lora["max_num_seqs"] == 64
    pattern = write_config(tmp_path / "b", rank_pattern={"q_proj": 40, "k_proj": 4})
    assert engine_arguments(Path("base"), pattern, "auto", 1, None, 0)["max_lora_rank"] == 64
    for fields, name in (({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True}, "DoRA")):
        with pytest.raises(UserError, match=f"not {name}; score with --backend hf"):
            engine_arguments(Path("base"), write_config(tmp_path / name, **fields), "auto", 1, None, 0)


def test_sampling_arguments() -> None:
    greedy = sampling_arguments(Generation(9, ("a", "b")), eos=1)
    assert greedy == {"max_tokens": 9, "temperature": 0.0, "stop": ["a", "b"], "stop_token_ids": [1]}
    drawn = sampling_arguments(Generation(9, (), True, 0.7, {"top_p": 0.9}), eos=None)
    assert drawn == {"max_tokens": 9, "temperature": 0.7, "stop": [], "top_p": 0.9}


def test_without_vllm_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"--backend vllm needs vLLM .*pip install vllm.*--backend hf"):
        import_vllm()


class StandIn:
    """`vllm.LLM` as the backend uses it, one prompt at a time, by transformers without a cache."""

    def __init__(self, model: str, **arguments: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024, dtype=torch.float32))

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, prompts: list[Any], parameters: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        return [self._one(prompt["prompt_token_ids"], parameters) for prompt in prompts]

    @torch.no_grad()
    def _one(self, ids: list[int], parameters: Any) -> Any:
        scores = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]  # vLLM: nothing predicts the first token
        for place, token in enumerate(ids[1:]):
            best = int(scores[place].argmax())
            entries.append({key: SimpleNamespace(logprob=scores[place, key].item()) for key in (token, best)})
        new: list[int] = []
        text, reason = "", "length"
        while len(new) < parameters.max_tokens:
            new.append(int(self.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in parameters.stop_token_ids:
                new, reason = new[:-1], "stop"
                break
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            if any(stop in text for stop in parameters.stop):
                text, reason = min((text.partition(stop)[0] for stop in parameters.stop), key=len), "stop"
                break
        output = SimpleNamespace(text=text, finish_reason=reason)
        return SimpleNamespace(outputs=[output], prompt_logprobs=entries)


def test_answers_are_read_like_those_of_transformers(tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ModuleType("vllm")
    vllm.LLM = StandIn  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **fields: SimpleNamespace(**{"stop": [], "stop_token_ids": [], **fields})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    ours, theirs = VLLMBackend(tiny_gemma3, None), HFBackend(tiny_gemma3, None)
    prompts = [ours.tokenizer(text)["input_ids"] for text in ("What is 12 + 7?", "What is 3 + 4?", "a")]
    free = next(theirs.generate(prompts, Generation(6)))
    stop = free[0].text[1:3] or "x"
    for generation in (Generation(6), Generation(6, (stop,))):
        assert next(ours.generate(prompts, generation)) == next(theirs.generate(prompts, generation))
    pairs = [(prompts[0], prompts[1][1:]), (prompts[2], prompts[1][1:3])]
    greedy = theirs.model(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    pairs.append((prompts[0], [greedy]))
    pairs.sort(key=lambda pair: -len(pair[0] + pair[1]))
    found, expected = next(ours.loglikelihoods(pairs)), next(theirs.loglikelihoods(pairs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [best for _, best in found] == [best for _, best in expected] and sum(best for _, best in found) >= 1
    with pytest.raises(UserError, match="does not know the names in it"):
        ours.canary(prompts[0])  # the stand-in applies no adapter, which is what the canary is for
