"""Prompt and response -> token ids, with the same prompt ids that lm-eval sends to the model.

The rules, and where they come from:

- **Prompt.** `tokenizer(prompt)` with the tokenizer's own special tokens, or without any when the text already starts
  with BOS: what `lm_eval.models.huggingface.HFLM.tok_encode` does (0.4.13). So BOS is there exactly once if the
  tokenizer puts it there (Gemma, Llama), and not at all where the tokenizer does not (GPT-2, Qwen).
- **Response.** Tokenised together with the prompt, then cut off behind the prompt's ids, which is what lm-eval does for
  log-likelihoods (`_encode_pair`) and what a model that continues the prompt sees. Where a token spans the border, the
  prompt's own ids stay and the response is tokenised for itself.
- **EOS.** Exactly one, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polar.errors import UserError


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one row; no EOS yet."""

    prompt: list[int]
    response: list[int]
    spans_border: bool
    """A token of the joint text covers the end of the prompt and the start of the response."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response, without EOS."""
        return len(self.prompt) + len(self.response)


class PairTokenizer:
    """A tokenizer with the rules of this module.

    Args:
        tokenizer: any transformers tokenizer, or a processor that has one.

    Raises:
        UserError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.eos is None:
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise UserError(f"the tokenizer {name} has no EOS token: set eos_token in its tokenizer_config.json")
        self._start_text = self.tokenizer.decode([self.eos if self.bos is None else self.bos])
        probe = self._encode(["a"], special=True)[0]
        self.adds_bos = self.bos is not None and probe[0] == self.bos
        self.adds_eos = probe[-1] == self.eos
        self.special = frozenset({self.bos, self.eos} - {None})

    def notes(self) -> list[str]:
        """Say what is unusual about this tokenizer's special tokens."""
        notes = []
        if self.bos is not None and self.bos != self.eos and not self.adds_bos:
            notes.append(
                f"the tokenizer has a BOS token ({self._start_text!r}) but does not add it, neither here nor in scoring"
            )
        if self.adds_eos:
            notes.append(
                "the tokenizer adds EOS to every text: it is removed behind the prompt here, but lm-eval leaves it in "
                "scoring prompts: set add_eos_token to false in tokenizer_config.json"
            )
        return notes

    def without_eos(self, response: str) -> str:
        """Return a response text without the EOS that some files write at its end; ours is added as a token."""
        while response.rstrip().endswith(self.tokenizer.eos_token):
            response = response.rstrip().removesuffix(self.tokenizer.eos_token)
        return response

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[TokenPair]:
        """Tokenise rows.

        Args:
            prompts: as `Template.prompt` returns them.
            responses: as `Template.full_response` returns them, of equal length, `without_eos`.
        """
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        prompt_ids = self.encode_prompts(prompts)
        joint_ids = self.encode_prompts(texts)
        pairs = []
        for prompt, response, ids, joint in zip(prompts, responses, prompt_ids, joint_ids, strict=True):
            spans = joint[: len(ids)] != ids
            tail = self._response_alone(prompt, response, ids) if spans else joint[len(ids) :]
            pairs.append(TokenPair(ids, tail, spans))
        return pairs

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise as lm-eval tokenises scoring prompts; without the EOS that a few tokenizers add."""
        started = [text.startswith(self._start_text) for text in texts]
        ids = self._encode(texts, special=True)
        for index in [i for i, starts in enumerate(started) if starts]:
            ids[index] = self._encode([texts[index]], special=False)[0]
        if self.adds_eos:
            ids = [
                row[:-1] if row and row[-1] == self.eos and not starts else row
                for row, starts in zip(ids, started, strict=True)
            ]
        return ids

    def _response_alone(self, prompt: str, response: str, prompt_ids: list[int]) -> list[int]:
        """Tokenise a response whose first token would have merged with the prompt's last one.

        SentencePiece-style tokenizers put a space before a text of its own; the second try avoids it with a line break
        in front, whose ids are cut off again.
        """
        alone = self._encode([response], special=False)[0]
        line_break = self._encode(["\n"], special=False)[0]
        behind_break = self._encode(["\n" + response], special=False)[0]
        candidates = [alone]
        if behind_break[: len(line_break)] == line_break:
            candidates.append(behind_break[len(line_break) :])
        before = self._decode(prompt_ids)
        for candidate in candidates:
            if self._decode(prompt_ids + candidate) == before + response:
                return candidate
        return alone

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        # verbose=False: length is checked against max_length, so the tokenizer's warning about its own is noise
        return self.tokenizer(
            list(texts), add_special_tokens=special, return_attention_mask=False, padding=False, verbose=False
        )["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
