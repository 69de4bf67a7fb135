"""`constrain` on a GPU against the float64 reference: stacked products, TF32 and fused optimizers, GradScaler.

Run by hand where there is a GPU: python -m pytest tests/gpu
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polar
from tests import reference
from tests.distributed import network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LR = 0.05


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> None:
    for inputs, targets in network.make_problem()[2]:
        h, t = (torch.tensor(a, dtype=torch.float32, device="cuda") for a in (inputs, targets))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(h), t)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("step", ["retract_polar", "retract_qr", "landing", "euclidean_penalty"])
@pytest.mark.parametrize("execution", ["sharded", "gather"])
@pytest.mark.parametrize("optimizer_options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_equals_the_float64_reference(step: Any, execution: Any, optimizer_options: dict[str, bool]) -> None:
    values, weights, batches = network.make_problem()
    final, _, _ = reference.train(
        values, weights, network.SCALES, batches, lr=LR, manifold_step=step, penalty=0.3, convention="textbook"
    )
    model = network.make_network(values, weights).cuda()
    polar.constrain(model, step, landing_penalty=0.3, manifold_execution=execution)
    trainable = [p for p in model.parameters() if p.requires_grad]
    train(model, torch.optim.Adam(trainable, lr=LR, **optimizer_options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach().cpu().double().numpy()
            np.testing.assert_allclose(value, final[name.removesuffix(".default")], atol=1e-4, err_msg=name)


def test_retraction_keeps_fp32_accuracy_when_the_loop_allows_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        values, weights, _ = network.make_problem()
        model = network.make_network(values, weights).cuda()
        handle = polar.constrain(model)
        train(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR))
        assert handle.orthonormality_error() < 3e-6
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    values, weights, _ = network.make_problem()
    models = [network.make_network(values, weights).cuda() for _ in range(2)]
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cuda", init_scale=1024.0)), strict=True):
        polar.constrain(model, "landing", landing_penalty=0.3)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR, fused=fused)
        train(model, optimizer, scaler)
    for (name, plain), (_, scaled) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.allclose(plain, scaled, atol=1e-4), name
