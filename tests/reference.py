"""The slow, obvious reference: whole factors, float64, textbook formulas, its own Adam, one process.

Shares no code with `polar`: numpy does the linear algebra and the gradients are written out by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Kingma and Ba 2015, Algorithm 1, per parameter name."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    step_count: int = 0
    exp_avg: dict[str, Array] = field(default_factory=dict)
    exp_avg_sq: dict[str, Array] = field(default_factory=dict)

    def step(self, values: dict[str, Array], grads: dict[str, Array]) -> None:
        self.step_count += 1
        for name, grad in grads.items():
            m = self.beta1 * self.exp_avg.get(name, np.zeros_like(grad)) + (1 - self.beta1) * grad
            v = self.beta2 * self.exp_avg_sq.get(name, np.zeros_like(grad)) + (1 - self.beta2) * grad**2
            self.exp_avg[name], self.exp_avg_sq[name] = m, v
            corrected = m / (1 - self.beta1**self.step_count)
            scale = np.sqrt(v / (1 - self.beta2**self.step_count)) + self.eps
            values[name] = values[name] - self.lr * corrected / scale


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


def train(
    values: dict[str, Array],
    weights: list[Array],
    scales: list[float],
    batches: list[tuple[Array, Array]],
    *,
    lr: float,
    manifold_step: str,
    penalty: float = 0.0,
    convention: str = "textbook",
    max_grad_norm: float | None = None,
) -> tuple[dict[str, Array], Adam, list[float]]:
    """Train and return the final values, the optimizer and the losses."""
    values, adam, losses = dict(values), Adam(lr), []
    for inputs, targets in batches:
        loss, grads = network_gradients(values, weights, scales, inputs, targets)
        losses.append(loss)
        if max_grad_norm is not None:
            norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
            grads = {name: grad * min(1.0, max_grad_norm / (norm + 1e-6)) for name, grad in grads.items()}
        for name in grads:
            if name.endswith("Theta") or manifold_step == "none":
                continue
            if manifold_step == "landing":
                grads[name] = landing_field(values[name], grads[name], penalty, convention)
            elif manifold_step == "euclidean_penalty":
                X = values[name]
                grads[name] = grads[name] + penalty * X @ (X.T @ X - np.eye(X.shape[1]))
            else:
                grads[name] = tangent_project(values[name], grads[name])
        adam.step(values, grads)
        retraction = {"retract_polar": polar_factor, "retract_qr": qr_retraction}.get(manifold_step)
        if retraction is not None:
            for name in values:
                if not name.endswith("Theta"):
                    values[name] = retraction(values[name])
    return values, adam, losses
