"""The two problems of benchmarks/convergence.py.

    factorisation    min over X, Theta, Y of 1/2 norm(X Theta Y^T - A)_F^2; A has rank r_A and a geometric spectrum
    language model   the demo's tiny Gemma-3 learns a kind of word problem that it has not seen

LoRA, B A in the place of X Theta Y^T, is the Burer-Monteiro form that the paper compares with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import polar
from benchmarks.convergence_training import Method, Problem
from polar.constrain import FACTOR_NAMES

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).resolve().parents[1]


class LowRank(nn.Module):
    """X Theta Y^T for several seeds, as a PoLAR layer starts: X, Y uniform on the manifold, Theta = 0."""

    def __init__(self, rows: int, columns: int, r: int, seeds: Sequence[int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            adapter = nn.Module()
            for name, n in zip(FACTOR_NAMES, (rows, columns), strict=True):
                Q = torch.linalg.qr(torch.randn(n, r, generator=generator))[0].contiguous()
                setattr(adapter, name, nn.ParameterDict({"default": nn.Parameter(Q)}))
            adapter.polar_Theta = nn.Parameter(torch.zeros(r, r))
            self.adapters.append(adapter)

    def forward(self) -> tuple[Tensor, Tensor]:
        """X Theta (S, rows, r) and Y^T (S, r, columns)."""
        X, Y = (torch.stack([getattr(a, name)["default"] for a in self.adapters]) for name in FACTOR_NAMES)
        return X @ torch.stack([a.polar_Theta for a in self.adapters]), Y.mT  # type: ignore[misc]


class LowRankLora(nn.Module):
    """B A for several seeds, as PEFT's LoRA starts: A uniform in 1 / sqrt(columns), B = 0."""

    def __init__(self, rows: int, columns: int, r: int, seeds: Sequence[int]) -> None:
        super().__init__()
        self.B = nn.ParameterList([torch.zeros(rows, r) for _ in seeds])
        draws = [torch.rand(r, columns, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.A = nn.ParameterList([(2 * draw - 1) / math.sqrt(columns) for draw in draws])

    def forward(self) -> tuple[Tensor, Tensor]:
        """B (S, rows, r) and A (S, r, columns)."""
        return torch.stack(list(self.B)), torch.stack(list(self.A))


@dataclass
class Factorisation(Problem):
    """Low-rank matrix factorisation; reported is norm(X Theta Y^T - A)_F^2 / norm(A)_F^2.

    Attributes:
        condition: largest over smallest nonzero singular value of A; the largest is 1.
        r: rank of the factors, at least `target_rank`, the rank of A.
    """

    condition: float
    r: int
    target_rank: int = 8
    rows: int = 200
    columns: int = 150
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    floor: float = 1e-10  # fp32: a relative error of 1e-5

    def __post_init__(self) -> None:
        self.name = f"condition {self.condition:g}, r = {self.r}"
        self.sweep_seeds = self.seeds
        self.width = float(self.columns)

    def target(self, seed: int) -> Tensor:
        """A (rows, columns) with singular values 1, ..., 1 / condition in geometric progression."""
        generator = torch.Generator().manual_seed(1000 + seed)
        U, V = (
            torch.linalg.qr(torch.randn(n, self.target_rank, generator=generator, dtype=torch.float64))[0]
            for n in (self.rows, self.columns)
        )
        exponents = torch.linspace(0, 1, self.target_rank, dtype=torch.float64)
        return ((U * self.condition**-exponents) @ V.T).float()

    def build(self, method: Method, seeds: Sequence[int]) -> tuple[nn.Module, Callable[[int], Tensor]]:
        kind = LowRankLora if method.step == "lora" else LowRank
        model = kind(self.rows, self.columns, self.r, seeds)
        A = torch.stack([self.target(seed) for seed in seeds])
        self._norms = A.square().sum((1, 2))
        return model, lambda step: 0.5 * torch.baddbmm(A, *model(), beta=-1).square().sum((1, 2))

    def measure(self, model: nn.Module, losses: Tensor) -> list[float]:
        return (2 * losses.detach() / self._norms).tolist()


@dataclass
class LanguageModel(Problem):
    """The demo's base on the kind of word problem that it has not seen; reported is the validation loss per token.

    Attributes:
        batch: problems per step; a seed has its own problems in its own order, the same for every method.
        num_validation: problems of the validation loss, the same for all seeds.
        evaluations: how often the validation loss is measured after the start.
    """

    steps: int = 30
    r: int = 8
    alpha: int = 32
    batch: int = 4
    num_validation: int = 20
    evaluations: int = 5
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    sweep_seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        self.name = f"language model, r = {self.r}"

    @cached_property
    def base(self) -> Any:
        """The demo's base in fp32 and its tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = ROOT / "demo" / "base"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.config.use_cache = False
        return model, AutoTokenizer.from_pretrained(folder)

    @property
    def width(self) -> float:  # type: ignore[override]
        return float(self.base[0].config.hidden_size)

    @cached_property
    def batches(self) -> tuple[dict[str, Tensor], dict[int, list[dict[str, Tensor]]]]:
        """The validation batch, and the training batches of each seed; no problem occurs twice."""
        from demo.make_base import encode, pad
        from demo.problems import NEW_KINDS, distinct_problems

        tokenizer = self.base[1]
        counts = [self.num_validation, *[self.steps * self.batch] * len(self.seeds)]
        encoded = [[encode(tokenizer, p) for p in part] for part in distinct_problems(NEW_KINDS, counts, seed=0)]
        validation, *parts = encoded
        bounds = [k * self.batch for k in range(self.steps + 1)]
        training = {
            seed: [pad(part[a:b], tokenizer.pad_token_id) for a, b in pairwise(bounds)]
            for seed, part in zip(self.seeds, parts, strict=True)
        }
        return pad(validation, tokenizer.pad_token_id), training

    def build(self, method: Method, seeds: Sequence[int]) -> tuple[nn.Module, Callable[[int], Tensor]]:
        (seed,) = seeds
        torch.manual_seed(seed)
        config = (
            LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=TARGETS)
            if method.step == "lora"
            else polar.PolarConfig(r=self.r, alpha=self.alpha, target_modules=TARGETS)
        )
        model: nn.Module = get_peft_model(copy.deepcopy(self.base[0]), config)
        batches = self.batches[1][seed]
        # After the last step only `measure` counts: any batch will do.
        return model, lambda step: model(**batches[min(step, len(batches) - 1)]).loss[None]

    def measure(self, model: nn.Module, losses: Tensor) -> list[float]:
        model.eval()
        with torch.no_grad():
            loss = model(**self.batches[0]).loss.item()
        model.train()
        return [loss]

    def measured_at(self, steps: int) -> set[int]:
        return {round(k * steps / self.evaluations) for k in range(self.evaluations + 1)}
