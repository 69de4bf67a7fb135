"""Answers from vLLM, with the exported LoRA applied per request. vLLM is optional and imported only here.

vLLM serves a LoRA whose names it does not know as the base model, without a word (vllm#34186), so the canary matters
more here than anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polar.errors import UserError
from polar.export import VLLM_MAX_LORA_RANKS
from polar_eval.backend import Answer, Generation

CHUNK = 2048  # prompts between two writes of the sample cache; vLLM batches within a chunk as it likes


def served_rank(r: int) -> int:
    """Return the `max_lora_rank` to start vLLM with: it takes certain numbers only, and pads factors with zeros.

    Args:
        r: largest rank of the adapter.

    Raises:
        UserError: vLLM takes no rank as large.
    """
    found = next((allowed for allowed in VLLM_MAX_LORA_RANKS if allowed >= r), None)
    if found is None:
        raise UserError(
            f"adapter rank {r}: vLLM takes at most {VLLM_MAX_LORA_RANKS[-1]}; score with --backend hf, or export with"
            " --format merged and score that"
        )
    return found


def engine_arguments(
    base: Path, adapter: Path | None, dtype: str, tensor_parallel: int, batch_size: int | None, seed: int
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`.

    Args:
        base: model folder.
        adapter: folder of a plain LoRA; None for the base alone.
        dtype: auto, float32, bfloat16 or float16.
        tensor_parallel: GPUs that share the base.
        batch_size: most sequences at once; None: vLLM's choice, by memory.
        seed: of sampling.

    Raises:
        UserError: an adapter that is no LoRA, or too large a rank.
    """
    arguments: dict[str, Any] = {
        "model": str(base),
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel,
        "seed": seed,
        "disable_log_stats": True,
        "generation_config": "vllm",  # not the base's own sampling settings
    }
    if batch_size is not None:
        arguments["max_num_seqs"] = batch_size
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA" or config.get("use_dora"):
            kind = "DoRA" if config.get("use_dora") else config["peft_type"]
            raise UserError(f"adapter {adapter}: vLLM serves plain LoRA, not {kind}; score with --backend hf")
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": served_rank(rank)}
    return arguments


def sampling_arguments(generation: Generation, eos: int | None) -> dict[str, Any]:
    """Return the arguments of `vllm.SamplingParams` for writing an answer."""
    arguments: dict[str, Any] = {
        "max_tokens": generation.limit,
        "temperature": generation.temperature if generation.sampled else 0.0,
        "stop": list(generation.stops),
        **generation.extra,
    }
    if eos is not None:
        arguments["stop_token_ids"] = [eos]
    return arguments


class VLLMBackend:
    """A vLLM engine. See `engine_arguments` for the arguments.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        arguments = engine_arguments(base, adapter, dtype, tensor_parallel, batch_size, seed)
        vllm = import_vllm()
        self._vllm, self._batch_size = vllm, batch_size
        self.engine = vllm.LLM(**arguments)
        self.tokenizer = self.engine.get_tokenizer()
        self.max_length = int(self.engine.llm_engine.model_config.max_model_len)
        self._dtype = str(self.engine.llm_engine.model_config.dtype).removeprefix("torch.")
        self._lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, str(adapter))

    def describe(self) -> dict[str, Any]:
        """Return backend, dtype, device, batch size (0: vLLM's own scheduling)."""
        return {
            "backend": "vllm",
            "dtype": self._dtype,
            "device": "cuda",
            "batch_size": self._batch_size or 0,
            "batch_size_given": self._batch_size is not None,
        }

    def generate(self, prompts: Sequence[list[int]], generation: Generation) -> Iterator[list[Answer]]:
        """Write an answer to each prompt; see `Backend`."""
        parameters = self._vllm.SamplingParams(**sampling_arguments(generation, self.tokenizer.eos_token_id))
        for start in range(0, len(prompts), CHUNK):
            outputs = [output.outputs[0] for output in self._run(prompts[start : start + CHUNK], parameters)]
            yield [Answer(output.text, output.finish_reason == "length") for output in outputs]

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[float, bool]]]:
        """Score continuations; see `Backend`."""
        parameters = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            outputs = self._run([context + rest for context, rest in part], parameters)
            yield [
                read_logprobs(output.prompt_logprobs[len(context) :], rest)
                for output, (context, rest) in zip(outputs, part, strict=True)
            ]

    def canary(self, prompt: list[int]) -> dict[str, float]:
        """Score one prompt with and without the adapter; raise where the adapter is not applied.

        Returns:
            max_logit_change: largest absolute difference of the prompt's log-probabilities.
        """
        parameters = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        adapted, plain = (
            [read_logprobs([entry], [token])[0] for entry, token in zip(output.prompt_logprobs[1:], prompt[1:])]  # noqa: B905
            for output in (self._run([prompt], parameters, lora)[0] for lora in (self._lora, None))
        )
        change = max(abs(a - b) for a, b in zip(adapted, plain, strict=True))
        if change == 0.0:
            raise UserError(
                "vLLM gives the same log-probabilities with and without the adapter: it does not know the names in it;"
                " score with --backend hf, or export with --format merged and score that"
            )
        return {"max_logit_change": change}

    def _run(self, prompts: Sequence[list[int]], parameters: Any, lora: Any = ...) -> list[Any]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        chosen = self._lora if lora is ... else lora
        return list(self.engine.generate(inputs, parameters, use_tqdm=False, lora_request=chosen))


def read_logprobs(entries: Sequence[dict[int, Any]], tokens: Sequence[int]) -> tuple[float, bool]:
    """Return (sum of log-probabilities, whether each token is the likeliest) from vLLM's prompt_logprobs.

    Args:
        entries: by position, token id -> object with `logprob`, for the token itself and the likeliest one.
        tokens: what stands there.
    """
    values = [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]
    greedy = all(
        max(entry.values(), key=lambda found: found.logprob).logprob == value
        for entry, value in zip(entries, values, strict=True)
    )
    return float(sum(values)), greedy


def import_vllm() -> Any:
    """Return the package vllm."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"--backend vllm needs vLLM ({error}): pip install vllm, on a machine with GPUs; or pass --backend hf"
        ) from error
    return vllm
