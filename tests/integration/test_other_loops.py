"""Loops that know nothing of polar, with the one line `polar.constrain(model)` added to each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import polar

STEPS = 4


@pytest.fixture(autouse=True)
def own_accelerator_state() -> Iterator[None]:
    """accelerate keeps one state per process; a test with other settings must neither find nor leave one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_model(folder: Path) -> PeftModel:
    torch.manual_seed(0)
    config = polar.PolarConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"], init_theta="identity")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def make_rows(number: int = 32, length: int = 24) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 200, (number, length))]


def worst_error(model: nn.Module) -> float:
    factors = [p for name, p in model.named_parameters() if "polar_X" in name or "polar_Y" in name]
    assert len(factors) == 8
    products = [p.detach().double().numpy().T @ p.detach().double().numpy() for p in factors]
    return max(float(np.linalg.norm(product - np.eye(4))) for product in products)


def optimizers() -> dict[str, Any]:
    import bitsandbytes

    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
        "adamw 8-bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=64),
    }


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "adamw foreach", "sgd momentum", "adamw 8-bit"])
def test_plain_loop(tiny_gemma3: Path, name: str) -> None:
    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    optimizer: Optimizer = optimizers()[name]([p for p in model.parameters() if p.requires_grad])
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for row in make_rows(STEPS):
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_transformers_trainer_with_checkpointing_and_accumulation(tiny_gemma3: Path, tmp_path: Path) -> None:
    model = make_model(tiny_gemma3)
    model.enable_input_require_grads()
    handle = polar.constrain(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=make_rows()).train()
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6


def test_accelerate_with_accumulation_and_bf16_autocast(tiny_gemma3: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision="bf16")
    model = make_model(tiny_gemma3)
    polar.constrain(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(make_rows(3 * STEPS), batch_size=1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert worst_error(model) < 3e-6


def test_torch_compile_of_the_model(tiny_gemma3: Path) -> None:
    """The hooks are outside of what is compiled; `eager` traces with dynamo and needs no compiler."""
    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for row in make_rows(2):
        compiled(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.steps == 2
    assert worst_error(model) < 3e-6
