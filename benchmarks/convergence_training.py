"""One training of benchmarks/convergence.py: the methods, and the loop that both problems share."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import polar
from polar.constrain import FACTOR_NAMES
from polar.stiefel import orthonormality_error

PAPER_PENALTY = 5e-3  # lambda of the paper's scripts, in the convention of its code
WARM_UP = 0.03  # share of the steps; then cosine to zero: what `polar train` does by default
NUM_POINTS = 40  # of a stored curve
DIVERGED = 1e3  # times the first loss


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        step: a manifold step of `polar.constrain`, `landing_nxn`, or `lora`.
        optimizer: AdamW, SGD (momentum 0.9) or StiefelAdamW, without weight decay.
        options: further arguments of `polar.constrain`; `reference_width` True stands for the problem's own width.
        label: what the name shows of the options.
    """

    step: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.step, self.label, self.optimizer)))


@dataclass
class Run:
    """What one training of some seeds gave.

    Attributes:
        steps: steps after which the loss was measured.
        losses: per seed, the loss after those steps; inf where it diverged.
        orthonormality: per seed, the largest norm(X^T X - I)_F at the end; empty for LoRA.
        cpu_ms, wall_ms: median over the steps.
    """

    steps: list[int]
    losses: list[list[float]]
    orthonormality: list[float]
    cpu_ms: float
    wall_ms: float


def landing_nxn(X: Tensor, G: Tensor, penalty: float) -> Tensor:
    """Landing field `(G X^T - X G^T) X + penalty X (X^T X - I)` through an n x n matrix, as the paper's code does it.

    Args:
        X: (n, r).
        G: (n, r), the Euclidean gradient.
        penalty: in the `upstream` convention.
    """
    A = G @ X.T - X @ G.T
    return A @ X + penalty * X @ (X.T @ X - torch.eye(X.shape[1]))


@contextmanager
def manifold_step(method: Method, model: nn.Module, width: float) -> Iterator[Callable[[], None]]:
    """Constrain the model; yields what a loop has to call between backward and the optimizer's step."""
    if method.step == "lora":
        yield lambda: None
        return
    if method.step == "landing_nxn":
        factors = stiefel_factors(model)

        def replace_gradients() -> None:
            for X in factors:
                assert X.grad is not None
                X.grad = landing_nxn(X.detach(), X.grad, PAPER_PENALTY)

        yield replace_gradients
        return
    options = {key: width if key == "reference_width" else value for key, value in method.options.items()}
    handle = polar.constrain(model, method.step, **options)  # type: ignore[arg-type]
    try:
        yield lambda: None
    finally:
        handle.remove()  # its hooks are called in the steps of every optimizer


def stiefel_factors(model: nn.Module) -> list[nn.Parameter]:
    """The parameters X and Y of a model, in its order."""
    return [p for name, p in model.named_parameters() if name.split(".")[-2] in FACTOR_NAMES]


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """The base optimizer at its defaults, without weight decay."""
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, foreach=True)
    if name == "StiefelAdamW":
        return polar.StiefelAdamW(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, foreach=True)


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate in step 0 .. steps - 1: linear warm-up, then half a cosine to zero."""
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Problem:
    """What both problems share: the loop.

    Attributes:
        name: of the problem, with what varies.
        steps: optimizer steps of one training.
        seeds: of the final comparison; `sweep_seeds`, a part of them, choose the learning rate.
        width: reference width of the option of that name.
        floor: losses below count as equal.
    """

    name: str
    steps: int
    seeds: tuple[int, ...]
    sweep_seeds: tuple[int, ...]
    width: float
    floor = 0.0

    def build(self, method: Method, seeds: Sequence[int]) -> tuple[nn.Module, Callable[[int], Tensor]]:
        """A model, and its loss per seed before step t; the sum over the seeds is what is minimised."""
        raise NotImplementedError

    def measure(self, model: nn.Module, losses: Tensor) -> list[float]:
        """The loss per seed that is reported, given that of the step."""
        raise NotImplementedError

    def run(self, method: Method, rate: float, seeds: Sequence[int], steps: int | None = None) -> Run:
        """Train. Independent seeds may be trained together: no number of one enters another."""
        model, loss_of = self.build(method, seeds)
        optimizer = make_optimizer(method.optimizer, [p for p in model.parameters() if p.requires_grad], rate)
        steps = steps or self.steps
        curve = Curve(steps, self.measured_at(steps))
        clock = Clock()
        with manifold_step(method, model, self.width) as before_step:
            for step in range(steps):
                with clock:
                    losses = loss_of(step)
                if not curve.take(step, partial(self.measure, model, losses)):
                    break
                with clock:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * rate_factor(step, steps)
                    optimizer.zero_grad()
                    losses.sum().backward()
                    before_step()
                    try:
                        optimizer.step()
                    except FloatingPointError:  # a factor is not finite: the rate is far too high
                        break
                clock.lap()
            else:
                curve.take(steps, lambda: self.measure(model, loss_of(steps)))
        errors = [float(orthonormality_error(X.detach())) for X in stiefel_factors(model)]
        share = len(errors) // len(seeds)
        worst = [max(errors[k * share : (k + 1) * share]) for k in range(len(seeds))] if errors else []
        return Run(*curve.finished(len(seeds)), worst, clock.median_ms("cpu"), clock.median_ms("wall"))

    def measured_at(self, steps: int) -> set[int]:
        """Steps at which the loss is reported, 0 and `steps` among them."""
        return {round(k * steps / NUM_POINTS) for k in range(NUM_POINTS + 1)}


class Curve:
    """Losses per seed after some of the steps."""

    def __init__(self, steps: int, measured_at: set[int]) -> None:
        self.steps, self.measured_at = steps, measured_at
        self.taken: list[int] = []
        self.found: list[list[float]] = []

    def take(self, step: int, measure: Callable[[], list[float]]) -> bool:
        """Measure where the curve has a point; returns whether training should go on."""
        if step not in self.measured_at:
            return True
        self.taken.append(step)
        self.found.append(measure())
        return all(value <= DIVERGED * first for value, first in zip(self.found[-1], self.found[0], strict=True))

    def finished(self, num_seeds: int) -> tuple[list[int], list[list[float]]]:
        """Steps, and losses per seed; inf from where training diverged."""
        if self.taken[-1] != self.steps:
            self.taken.append(self.steps)
            self.found.append([math.inf] * num_seeds)
        columns = zip(*self.found, strict=True)
        return self.taken, [[value if math.isfinite(value) else math.inf for value in column] for column in columns]


class Clock:
    """Processor and wall time of steps, each of which may be timed in several pieces."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []
        self._begin = self._sum = (0.0, 0.0)

    def __enter__(self) -> None:
        self._begin = time.process_time(), time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        end = time.process_time(), time.perf_counter()
        self._sum = self._sum[0] + end[0] - self._begin[0], self._sum[1] + end[1] - self._begin[1]

    def lap(self) -> None:
        """End a step."""
        self.laps.append(self._sum)
        self._sum = (0.0, 0.0)

    def median_ms(self, kind: Literal["cpu", "wall"]) -> float:
        """Median over the steps; nan where there was none."""
        return 1e3 * statistics.median(lap[kind == "wall"] for lap in self.laps) if self.laps else math.nan
