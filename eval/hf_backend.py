"""Answers from a transformers model on this process's device, with or without a PEFT adapter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from polar.errors import UserError
from polar_eval.backend import Answer, Generation
from polar_eval.batching import BatchSize, max_rows, run_batches

DEFAULT_LENGTH = 2048  # where neither config nor tokenizer says how many tokens the model takes
NO_LENGTH = 10**9  # tokenizers without a limit say 10^30


class HFBackend:
    """A transformers model.

    Args:
        base: model folder.
        adapter: folder of an adapter that PEFT itself loads; None for the base alone.
        dtype: auto (as the base's files), float32, bfloat16 or float16.
        device: cuda, cuda:N or cpu.
        parallelize: spread the base over all GPUs of this machine.
        batch_size: prompts per batch; None finds it.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        dtype: str = "auto",
        device: str = "cpu",
        parallelize: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.unk_token or self.tokenizer.eos_token
        placement = {"device_map": "auto"} if parallelize else {}
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **placement
        )
        if not parallelize:
            model.to(device)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        self.model: Any = model.eval()
        plain: Any = model.get_base_model() if adapter is not None else model
        self._keeps_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self.device, self.batch_size = plain.device, batch_size
        text = plain.config.get_text_config()
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        lengths = [value for name in names if (value := getattr(text, name, None))]
        own = self.tokenizer.model_max_length
        self.max_length = int(lengths[0] if lengths else own if own < NO_LENGTH else DEFAULT_LENGTH)
        self._eos = self._clean_generation_config(plain)
        self._largest_batch = 0
        if adapter is not None:
            self._check_adapter(adapter)

    def _clean_generation_config(self, plain: Any) -> list[int]:
        """Leave the base's own sampling settings behind, which `generate` would mix in; return its EOS tokens."""
        eos = plain.generation_config.eos_token_id
        found = {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id} - {None}
        plain.generation_config = GenerationConfig(
            eos_token_id=sorted(found),
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        return sorted(found)

    def describe(self) -> dict[str, Any]:
        """Return backend, dtype, device, batch size (the largest used where none was given)."""
        return {
            "backend": "hf",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "batch_size": self.batch_size or self._largest_batch,
            "batch_size_given": self.batch_size is not None,
        }

    def _size(self, num_tokens: int, kept: int = 1) -> BatchSize:
        if self.batch_size is not None:
            return BatchSize(self.batch_size)
        return BatchSize(None, max_rows(self.model.config, num_tokens, kept, self.device, self.model.dtype))

    def generate(self, prompts: Sequence[list[int]], generation: Generation) -> Iterator[list[Answer]]:
        """Write an answer to each prompt; see `Backend`."""
        settings: dict[str, Any] = {"max_new_tokens": generation.limit, "do_sample": generation.sampled}
        if generation.sampled:
            settings |= {"temperature": generation.temperature}
        settings |= generation.extra
        stops = StopTexts(self.tokenizer, generation.stops)

        def run(batch: Sequence[list[int]]) -> tuple[list[Answer], float]:
            input_ids, attention_mask = self._padded_left(batch)
            stops.begin(len(batch), input_ids.shape[1])
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    stopping_criteria=StoppingCriteriaList([stops]),
                    **settings,
                )
            rows = output[:, input_ids.shape[1] :].tolist()
            lengths = [self._length(row, stops.ends[index]) for index, row in enumerate(rows)]
            answers = [
                Answer(
                    stops.cut(str(self.tokenizer.decode(row[:length], skip_special_tokens=True))),
                    truncated=stops.ends[index] is None and length == len(row) == generation.limit
                    and row[-1] not in self._eos,
                )
                for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
            ]  # fmt: skip
            return answers, float(sum(lengths))

        for batch, answers in run_batches(prompts, run, self._size(len(prompts[0]) + generation.limit)):
            self._largest_batch = max(self._largest_batch, len(batch))
            yield answers

    def _length(self, row: list[int], stopped: int | None) -> int:
        """Return how many tokens of a row the model wrote before it ended; behind them stands padding."""
        end = stopped if stopped is not None else len(row)
        return next((place for place, token in enumerate(row[:end]) if token in self._eos), end)

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[float, bool]]]:
        """Score continuations; see `Backend`. Pairs that give the model the same tokens share one row of the batch."""
        longest = len(pairs[0][0]) + len(pairs[0][1])
        kept = max(len(continuation) for _, continuation in pairs)

        def run(batch: Sequence[tuple[list[int], list[int]]]) -> tuple[list[tuple[float, bool]], float]:
            rows: dict[tuple[int, ...], int] = {}
            places = [rows.setdefault((*context, *rest[:-1]), len(rows)) for context, rest in batch]
            width = max(map(len, rows))
            first = min(len(context) for context, _ in batch) - 1  # position of the first logits that are needed
            logits = self._logits(list(rows), width, first)
            results = []
            for (context, rest), place in zip(batch, places, strict=True):
                begin = len(context) - 1 - first
                scores = logits[place, begin : begin + len(rest)].float().log_softmax(-1)
                tokens = torch.tensor(rest, device=scores.device)
                value = scores.gather(1, tokens[:, None]).sum().item()
                results.append((value, bool((scores.argmax(-1) == tokens).all())))
            return results, float(len(rows) * width)

        for batch, results in run_batches(pairs, run, self._size(longest, kept)):
            self._largest_batch = max(self._largest_batch, len(batch))
            yield results

    def _logits(self, rows: Sequence[tuple[int, ...]], width: int, first: int) -> torch.Tensor:
        """Return the logits of positions `first` and later, (len(rows), width - first, vocabulary).

        Padding stands on the right, where a causal model cannot see it, so no mask is needed. With a vocabulary of
        262,144 the logits of a prompt are most of the memory, hence `logits_to_keep`.
        """
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        with torch.inference_mode():
            if self._keeps_logits:
                return self.model(input_ids, logits_to_keep=width - first, use_cache=False).logits
            return self.model(input_ids, use_cache=False).logits[:, first:]

    def _padded_left(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and attention_mask, both (len(rows), longest) int64."""
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = [[*[pad] * (longest - len(row)), *row] for row in rows]
        mask = [[*[0] * (longest - len(row)), *[1] * len(row)] for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _check_adapter(self, folder: Path) -> None:
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

    def canary(self, prompt: list[int]) -> dict[str, float]:
        """Run one prompt through base and adapter; raise where the adapter is not applied or the result is not finite.

        Returns:
            max_logit_change: largest absolute difference of the last token's logits.
        """
        row = [tuple(prompt)]
        adapted = self._logits(row, len(prompt), len(prompt) - 1).float()
        with self.model.disable_adapter():
            plain = self._logits(row, len(prompt), len(prompt) - 1).float()
        if not torch.isfinite(adapted).all():
            raise UserError("the adapted model gives logits that are not finite; try --dtype float32")
        change = (adapted - plain).abs().max().item()
        if change == 0.0:
            raise UserError(
                "base and adapter give the same logits: the adapter is not applied, or it was never trained;"
                " the score would be the base's"
            )
        return {"max_logit_change": change}


class StopTexts(StoppingCriteria):
    """Ends each row of a batch at its own first stop text.

    Decoding every row at every step would cost more than a small model itself. So a row is decoded only when its newest
    token holds the last character of a stop text, which is remembered per token.

    Args:
        tokenizer: decodes.
        stops: the texts.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self._may_end: dict[int, bool] = {}
        self._last_characters = {text[-1] for text in self.stops}
        self._tail = max((len(text.encode()) for text in self.stops), default=0) + 1  # tokens, at least a byte each

    def begin(self, num_rows: int, prompt_length: int) -> None:
        """Start a batch whose prompts are padded to `prompt_length`."""
        self.prompt_length = prompt_length
        self.ends: list[int | None] = [None] * num_rows
        """Number of new tokens at which a row stopped; None: it did not."""

    def cut(self, text: str) -> str:
        """Return what stands before the first stop text."""
        for stop in self.stops:
            text = text.partition(stop)[0]
        return text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.stops:
            num_new = input_ids.shape[1] - self.prompt_length
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.ends[row] is None and self._can_end(token):
                    tail = input_ids[row, -min(num_new, self._tail) :]
                    text = self.tokenizer.decode(tail, skip_special_tokens=False)
                    if any(stop in text for stop in self.stops):
                        self.ends[row] = num_new
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _can_end(self, token: int) -> bool:
        if token not in self._may_end:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            # A token that is a part of a character decodes to the replacement character.
            self._may_end[token] = "\ufffd" in text or bool(self._last_characters & set(text))
        return self._may_end[token]
