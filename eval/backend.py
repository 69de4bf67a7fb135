"""What a model must be able to do to be scored, and the lm-eval model that drives it.

    lm-eval task -> requests (text) -> Scorer: token ids, longest first, known answers from the cache, this process's
    share -> backend (transformers or vLLM): answers -> Scorer: all processes' answers, in lm-eval's order -> metrics

Tokenisation is that of training (`polar.pair_tokens`). Every process runs the same lm-eval code on all requests, and
computes the answers of every n-th of those that are missing; so the metrics need no merging, whatever they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from polar.errors import UserError
from polar.launch import from_main_process, on_all_ranks
from polar.pair_tokens import PairTokenizer
from polar_eval.progress import Progress
from polar_eval.sample_cache import SampleCache
from polar_eval.world import World

STOCK_LIMIT_TOKENS = 256  # lm-eval's limit for tasks that name none


@dataclass(frozen=True)
class Generation:
    """How to write an answer.

    Attributes:
        limit: most new tokens.
        stops: texts that end the answer; they are not part of it.
        sampled: draw tokens instead of taking the likeliest.
        temperature: of drawing.
        extra: further settings of the backend, e.g. top_p.
    """

    limit: int
    stops: tuple[str, ...] = ()
    sampled: bool = False
    temperature: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A generated text; `truncated`: it ended at the limit, by neither EOS nor a stop text."""

    text: str
    truncated: bool


class Backend(Protocol):
    """A loaded model. Both methods take the longest item first and yield answers batch by batch, in the same order."""

    tokenizer: Any
    max_length: int
    """Tokens of prompt and answer that the model takes."""

    def generate(self, prompts: Sequence[list[int]], generation: Generation) -> Iterator[list[Answer]]:
        """Write an answer to each prompt (token ids)."""
        ...

    def loglikelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[float, bool]]]:
        """Return, for each (context, continuation), log p(continuation | context) and whether it is the greedy one."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return backend, dtype, device, batch size."""
        ...


class Scorer(LM):
    """An lm-eval model over a backend.

    Args:
        backend: the loaded model.
        world: this process and its peers.
        cache: answers of an interrupted scoring; replaced for each task.
    """

    def __init__(self, backend: Backend, world: World, cache: SampleCache | None = None) -> None:
        super().__init__()
        self.backend, self.world = backend, world
        self.tokens = PairTokenizer(backend.tokenizer)
        self.begin_task("", cache or SampleCache(None, {}))

    def begin_task(self, label: str, cache: SampleCache) -> None:
        """Start counting afresh, with the cache of the next task."""
        self.label, self.cache = label, cache
        self.truncated: dict[str, bool] = {}
        self.num_requests = self.num_resumed = 0

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer lm-eval's generation requests; `truncated` says, by prompt, which ones ended at the limit."""
        prompts = [request.args[0] for request in requests]
        settings = [_generation(request.args[1]) for request in requests]
        ids = self.tokens.encode_prompts(prompts)
        answers: list[Any] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: repr(settings[index]))
        for _, group in itertools.groupby(order, key=lambda index: repr(settings[index])):
            chosen = list(group)
            generation = settings[chosen[0]]
            self._check_room([ids[index] for index in chosen], generation.limit)
            asked = [(prompts[index], asdict(generation), index if generation.sampled else 0) for index in chosen]

            def run(items: Sequence[Any], generation: Generation = generation) -> Iterator[list[Any]]:
                for batch in self.backend.generate(items, generation):
                    yield [[answer.text, answer.truncated] for answer in batch]

            found = self._answers("generate", asked, [ids[index] for index in chosen], len, run, not generation.sampled)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        self.truncated = {prompt: answer[1] for prompt, answer in zip(prompts, answers, strict=True)}
        return [answer[0] for answer in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Answer lm-eval's requests for the log-likelihood of a continuation behind a context."""
        texts = [tuple(request.args) for request in requests]
        return self._loglikelihoods(texts, self._encode_pairs(texts))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Answer lm-eval's requests for the log-likelihood of whole texts, in windows of the model's length."""
        windows, owners = [], []
        start = self._start_token()
        for number, request in enumerate(requests):
            ids = self.tokens.encode_prompts([request.args[0]])[0]  # with BOS behind BOS, as lm-eval
            for window in get_rolling_token_windows(ids, start, self.backend.max_length, 1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        texts = [(requests[owner].args[0], str(place)) for place, owner in enumerate(owners)]
        for owner, (value, _) in zip(owners, self._loglikelihoods(texts, windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihoods(
        self, texts: Sequence[tuple[Any, ...]], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        self._check_room([context + continuation[:-1] for context, continuation in pairs], 0)

        def length(pair: tuple[list[int], list[int]]) -> int:
            return len(pair[0]) + len(pair[1])

        found = self._answers("loglikelihood", texts, pairs, length, self.backend.loglikelihoods, True)
        return [(float(value), bool(greedy)) for value, greedy in found]

    def _answers(
        self,
        kind: str,
        asked: Sequence[Any],
        items: Sequence[Any],
        length: Callable[[Any], int],
        run: Callable[[Sequence[Any]], Iterator[list[Any]]],
        cached: bool,
    ) -> list[Any]:
        """Return one answer per request: known, computed here, or computed by another process. Collective."""
        keys = [self.cache.key(kind, request) for request in asked]
        known: dict[str, Any] = from_main_process(self.cache.read) if cached else {}
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        self.num_requests += len(keys)
        self.num_resumed += sum(key in known for key in keys)
        order = sorted(missing, key=lambda key: (-length(missing[key]), key))
        own = order[self.world.rank :: self.world.size]

        def work() -> dict[str, Any]:
            new: dict[str, Any] = {}
            progress = Progress(self.label, len(own), shown=self.world.rank == 0)
            remaining = iter(own)
            for batch in run([missing[key] for key in own]) if own else ():
                answers = list(zip(itertools.islice(remaining, len(batch)), batch, strict=True))
                new.update(answers)
                if cached:
                    self.cache.add(answers)
                progress.advance(len(batch))
            progress.close()
            return new

        known |= self.world.merge(on_all_ranks(work))
        return [known[key] for key in keys]

    def _encode_pairs(self, texts: Sequence[tuple[Any, ...]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise (context, continuation); white space at the end of a context belongs to the continuation."""
        contexts = [context.rstrip() for context, _ in texts]
        continuations = [
            context[len(stripped) :] + continuation
            for (context, continuation), stripped in zip(texts, contexts, strict=True)
        ]
        pairs = []
        for context, pair in zip(contexts, self.tokens.encode(contexts, continuations), strict=True):
            if context:
                pairs.append((pair.prompt, pair.response))
            else:  # scored behind BOS, or EOS where the tokenizer has no BOS
                pairs.append(([self._start_token()], self._without_start(pair.prompt + pair.response)))
        return pairs

    def _start_token(self) -> int:
        return int(self.tokens.eos if self.tokens.bos is None else self.tokens.bos)

    def _without_start(self, ids: list[int]) -> list[int]:
        return ids[1:] if ids and ids[0] == self._start_token() else ids

    def _check_room(self, prompts: Sequence[list[int]], limit: int) -> None:
        """Raise where prompt and answer do not fit; lm-eval would cut the prompt's beginning, BOS and instruction."""
        longest, room = max(len(ids) for ids in prompts), self.backend.max_length
        if longest + limit <= room:
            return
        if longest >= room:
            raise UserError(f"the longest prompt has {longest} tokens and the model takes {room}; leave such rows out")
        raise UserError(
            f"max_new_tokens {limit}: the longest prompt has {longest} tokens and the model takes {room};"
            f" pass --max_new_tokens {room - longest} or less"
        )


def _generation(settings: dict[str, Any]) -> Generation:
    """Read lm-eval's generation settings, in any of its spellings."""
    plain = dict(normalize_gen_kwargs(settings, STOCK_LIMIT_TOKENS))
    stops = plain.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else stops
    temperature = float(plain.pop("temperature", 0.0) or 0.0)
    sampled = bool(plain.pop("do_sample", False)) and temperature > 0
    limit = int(plain.pop("max_gen_toks"))
    return Generation(limit, tuple(filter(None, stops)), sampled, temperature if sampled else 1.0, plain)
