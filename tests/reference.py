"""The slow, obvious reference: whole factors, float64, textbook formulas, its own Adam, one process.

Shares no code with `polar`: numpy does the linear algebra and the gradients are written out by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


def polar_factor(A: Array) -> Array:
    U, _, Vh = np.linalg.svd(A, full_matrices=False)
    return U @ Vh


def tangent_project(X: Array, G: Array) -> Array:
    XtG = X.T @ G
    return G - X @ (XtG + XtG.T) / 2


def landing_field(X: Array, G: Array, penalty: float, convention: str) -> Array:
    """(1/2) (G X^T - X G^T) X + penalty X (X^T X - I), with its n x n matrix; `upstream` without the 1/2."""
    half = 0.5 if convention == "textbook" else 1.0
    return half * (G @ X.T - X @ G.T) @ X + penalty * X @ (X.T @ X - np.eye(X.shape[1]))


def qr_retraction(A: Array) -> Array:
    """Q of A = Q R with positive diagonal of R."""
    Q, R = np.linalg.qr(A)
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)


@dataclass
class Adam:
    """Kingma and Ba 2015, Algorithm 1, per parameter name.

    With `per_factor` the second moment of X and Y is one number, the mean of the squared gradient (Riemannian Adam).
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    per_factor: bool = False
    step_count: int = 0
    exp_avg: dict[str, Array] = field(default_factory=dict)
    exp_avg_sq: dict[str, Array] = field(default_factory=dict)

    def step(self, values: dict[str, Array], grads: dict[str, Array]) -> None:
        self.step_count += 1
        for name, grad in grads.items():
            square = grad**2
            if self.per_factor and not name.endswith("Theta"):
                square = np.full_like(grad, square.mean())
            m = self.beta1 * self.exp_avg.get(name, np.zeros_like(grad)) + (1 - self.beta1) * grad
            v = self.beta2 * self.exp_avg_sq.get(name, np.zeros_like(grad)) + (1 - self.beta2) * square
            self.exp_avg[name], self.exp_avg_sq[name] = m, v
            corrected = m / (1 - self.beta1**self.step_count)
            scale = np.sqrt(v / (1 - self.beta2**self.step_count)) + self.eps
            values[name] = values[name] - self.lr * corrected / scale

    @property
    def momentum(self) -> dict[str, Array]:
        return self.exp_avg


@dataclass
class Sgd:
    """Heavy-ball momentum: m <- mu m + g, x <- x - lr m."""

    lr: float
    mu: float = 0.9
    momentum_buffer: dict[str, Array] = field(default_factory=dict)

    def step(self, values: dict[str, Array], grads: dict[str, Array]) -> None:
        for name, grad in grads.items():
            self.momentum_buffer[name] = self.mu * self.momentum_buffer.get(name, np.zeros_like(grad)) + grad
            values[name] = values[name] - self.lr * self.momentum_buffer[name]

    @property
    def momentum(self) -> dict[str, Array]:
        return self.momentum_buffer


def network_gradients(
    values: dict[str, Array], weights: list[Array], scales: list[float], inputs: Array, targets: Array
) -> tuple[float, dict[str, Array]]:
    """Loss and gradients of `h -> tanh(h (W0 + s X Theta Y^T)^T)`, layer by layer, mean squared error at the end."""
    hidden, before = [inputs], []
    for k, (W0, s) in enumerate(zip(weights, scales, strict=True)):
        X, Theta, Y = (values[f"{k}.polar_{part}"] for part in ("X", "Theta", "Y"))
        before.append(hidden[-1] @ (W0 + s * X @ Theta @ Y.T).T)
        hidden.append(np.tanh(before[-1]))
    error = hidden[-1] - targets
    upstream = 2 * error / error.size
    grads = {}
    for k in reversed(range(len(weights))):
        X, Theta, Y = (values[f"{k}.polar_{part}"] for part in ("X", "Theta", "Y"))
        upstream = upstream * (1 - hidden[k + 1] ** 2)
        dW = upstream.T @ hidden[k]  # (d_out, d_in)
        grads[f"{k}.polar_X"] = scales[k] * dW @ Y @ Theta.T
        grads[f"{k}.polar_Theta"] = scales[k] * X.T @ dW @ Y
        grads[f"{k}.polar_Y"] = scales[k] * dW.T @ X @ Theta
        upstream = upstream @ (weights[k] + scales[k] * X @ Theta @ Y.T)
    return float((error**2).mean()), grads


def field_of(name: str, X: Array, G: Array, penalty: float, convention: str) -> Array:
    """What replaces the Euclidean gradient G of a factor, by the name of the manifold step."""
    if name == "landing":
        return landing_field(X, G, penalty, convention)
    if name == "euclidean_penalty":
        return G + penalty * X @ (X.T @ X - np.eye(X.shape[1]))
    return G if name == "none" else tangent_project(X, G)


def train(
    values: dict[str, Array],
    weights: list[Array],
    scales: list[float],
    batches: list[tuple[Array, Array]],
    *,
    manifold_step: str,
    lr: float = 0.0,
    optimizer: Adam | Sgd | None = None,
    penalty: float = 0.0,
    convention: str = "textbook",
    max_grad_norm: float | None = None,
    project_momentum: bool = False,
    reference_width: float | None = None,
) -> tuple[dict[str, Array], Any, list[float]]:
    """Train and return the final values, the optimizer (Adam with `lr` unless another is given) and the losses."""
    values, optimizer, losses = dict(values), optimizer or Adam(lr), []
    retraction = {"retract_polar": polar_factor, "retract_qr": qr_retraction}.get(manifold_step)
    factors = [name for name in values if not name.endswith("Theta")]
    for inputs, targets in batches:
        loss, grads = network_gradients(values, weights, scales, inputs, targets)
        losses.append(loss)
        if max_grad_norm is not None:
            norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
            grads = {name: grad * min(1.0, max_grad_norm / (norm + 1e-6)) for name, grad in grads.items()}
        for name in factors:
            grads[name] = field_of(manifold_step, values[name], grads[name], penalty, convention)
        before = dict(values)
        optimizer.step(values, grads)
        for name in factors:
            if reference_width is not None:
                scale = np.sqrt(reference_width / values[name].shape[0])
                values[name] = before[name] + scale * (values[name] - before[name])
            if retraction is not None:
                values[name] = retraction(values[name])
            if project_momentum:
                optimizer.momentum[name] = tangent_project(values[name], optimizer.momentum[name])
    return values, optimizer, losses
