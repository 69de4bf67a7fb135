"""A small PoLAR network with ragged shapes, the same one as in tests/reference.py, for every engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

ADAPTER = "default"
# (d_out, d_in, r): odd sizes, so that ZeRO cuts rows; r differs; r = 1 and r = n occur.
LAYERS = [(11, 13, 3), (5, 11, 4), (9, 5, 5), (3, 9, 1), (6, 3, 3)]
SCALES = [2.0, 1.0, 0.5, 3.0, 1.5]


class PolarLayer(nn.Module):
    """h -> tanh(h (W0 + s X Theta Y^T)^T) with the parameter names of the tuner."""

    def __init__(self, W0: np.ndarray, X: np.ndarray, Theta: np.ndarray, Y: np.ndarray, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(W0, dtype=torch.float32), requires_grad=False)
        self.scale = scale
        for name, value in (("polar_X", X), ("polar_Theta", Theta), ("polar_Y", Y)):
            parameter = nn.Parameter(torch.tensor(value, dtype=torch.float32))
            setattr(self, name, nn.ParameterDict({ADAPTER: parameter}))

    def forward(self, h: Tensor) -> Tensor:
        X, Theta, Y = self.polar_X[ADAPTER], self.polar_Theta[ADAPTER], self.polar_Y[ADAPTER]
        return torch.tanh(h @ self.weight.T + self.scale * ((h @ Y) @ Theta.T) @ X.T)


def make_problem(
    seed: int = 0, steps: int = 5, rows: int = 24
) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Initial values by name, frozen weights, one (inputs, targets) per step; rows divide by 1 to 4 and twice those."""
    rng = np.random.default_rng(seed)
    values, weights = {}, []
    for k, (d_out, d_in, r) in enumerate(LAYERS):
        weights.append(rng.standard_normal((d_out, d_in)) / np.sqrt(d_in))
        values[f"{k}.polar_X"] = np.linalg.qr(rng.standard_normal((d_out, r)))[0]
        values[f"{k}.polar_Theta"] = rng.standard_normal((r, r))
        values[f"{k}.polar_Y"] = np.linalg.qr(rng.standard_normal((d_in, r)))[0]
    batches = [
        (rng.standard_normal((rows, LAYERS[0][1])), rng.standard_normal((rows, LAYERS[-1][0]))) for _ in range(steps)
    ]
    return values, weights, batches


def make_network(values: dict[str, np.ndarray], weights: list[np.ndarray]) -> nn.Sequential:
    return nn.Sequential(
        *(
            PolarLayer(W0, *(values[f"{k}.polar_{part}"] for part in ("X", "Theta", "Y")), scale)
            for k, (W0, scale) in enumerate(zip(weights, SCALES, strict=True))
        )
    )


def add_frozen_adapter(model: nn.Sequential, name: str = "other") -> None:
    """Give each layer a second adapter, of rank 2 where it fits, that is not trained."""
    for layer in model:
        for part in ("polar_X", "polar_Theta", "polar_Y"):
            container = getattr(layer, part)
            value = container[ADAPTER].detach()[:, :2].contiguous()
            container[name] = nn.Parameter(value[:2] if part == "polar_Theta" else value, requires_grad=False)
