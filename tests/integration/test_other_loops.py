"""Loops that know nothing of polar, with the one line `polar.constrain(model)` added to each.

Each is compared with a plain loop written out here that gets the same batches in the same order; a last group of tests
runs loops without even that line, where the adapter's own configuration asks for a field in the backward.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

import polar
from tests.tiny import addition_rows

Batch = dict[str, torch.Tensor]
STEPS = 4
LR = 1e-2
LANDING = {"landing_penalty": 0.3, "landing_convention": "upstream"}


@pytest.fixture(autouse=True)
def own_accelerator_state() -> Iterator[None]:
    """accelerate keeps one state per process; a test with other settings must neither find nor leave one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_config(**options: Any) -> polar.PolarConfig:
    return polar.PolarConfig(
        r=4, alpha=8, target_modules=["q_proj", "down_proj"], init_theta="identity", task_type="CAUSAL_LM", **options
    )


def make_model(folder: Path, config: PeftConfig | None = None, **loading: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, **loading)
    torch.manual_seed(0)
    return get_peft_model(base, config or make_config())


def make_rows(number: int = 32, length: int = 24) -> list[Batch]:
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 200, (number, length))]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by their names inside of any wrapper."""
    named = {name[name.index("layers.") :]: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(named) == 12
    return named


def worst_error(model: nn.Module) -> float:
    factors = [p for name, p in model.named_parameters() if "polar_X" in name or "polar_Y" in name]
    assert len(factors) == 8
    products = [p.detach().double().numpy().T @ p.detach().double().numpy() for p in factors]
    return max(float(np.linalg.norm(product - np.eye(4))) for product in products)


def recorded(collate: Callable[[Any], Batch], batches: list[Batch]) -> Callable[[Any], Batch]:
    """A collator that also keeps what it made, which is the data order of a loop."""

    def collate_and_keep(rows: Any) -> Batch:
        batch = collate(rows)
        batches.append({key: value.clone() for key, value in batch.items()})
        return batch

    return collate_and_keep


def train_by_hand(
    folder: Path,
    batches: list[Batch],
    accumulation: int = 1,
    max_grad_norm: float | None = 1.0,
    autocast: bool = False,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """STEPS AdamW steps on the mean loss over the label tokens of `accumulation` batches; the trained parameters."""
    model = make_model(folder)
    handle = polar.constrain(model, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    for first in range(0, STEPS * accumulation, accumulation):
        micro_batches = batches[first : first + accumulation]
        num_labels = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        for batch in micro_batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                logits = model(**inputs).logits.float()
            targets = batch["labels"][:, 1:].reshape(-1)
            (F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / num_labels).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.steps == STEPS
    handle.remove()
    return trained(model)


def assert_same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    got = trained(model)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=name)


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


def run_trainer(model: PeftModel, folder: Path, **arguments: Any) -> list[Batch]:
    """HF Trainer as a script would use it; returns its batches."""
    model.enable_input_require_grads()
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer, batches = Trainer(model=model, args=settings, train_dataset=make_rows()), []
    trainer.data_collator = recorded(trainer.data_collator, batches)
    trainer.train()
    return batches


def test_transformers_trainer_with_checkpointing_and_accumulation(tiny_gemma3: Path, tmp_path: Path) -> None:
    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    batches = run_trainer(model, tmp_path)
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6
    assert_same(model, train_by_hand(tiny_gemma3, batches, accumulation=2))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # SFTConfig's own default
@pytest.mark.parametrize("quantised", [False, True])
def test_trl_sft_trainer(tiny_gemma3: Path, tmp_path: Path, quantised: bool) -> None:
    """Text rows, TRL's tokenisation, collator, loss and checkpointing. It casts the adapters of a quantised base."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    loading = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if quantised else {}
    settings = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=make_model(tiny_gemma3, **loading),
        args=settings,
        train_dataset=Dataset.from_list([{"text": f"{r['question']} {r['answer']}"} for r in addition_rows(32)]),
        processing_class=AutoTokenizer.from_pretrained(tiny_gemma3),
    )
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.bfloat16 if quantised else torch.float32}
    handle = polar.constrain(trainer.model)  # undoes SFTTrainer's cast of a quantised base's adapter
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}
    start = {name: value.detach().clone() for name, value in trained(trainer.model).items()}
    batches: list[Batch] = []
    trainer.data_collator = recorded(trainer.data_collator, batches)
    trainer.train()
    assert handle.steps == STEPS
    assert worst_error(trainer.model) < 3e-6
    assert all(not torch.equal(value, start[name]) for name, value in trained(trainer.model).items())
    if not quantised:
        assert_same(trainer.model, train_by_hand(tiny_gemma3, batches, accumulation=2))


def test_accelerate_with_accumulation_and_bf16_autocast(tiny_gemma3: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision="bf16")
    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    batches: list[Batch] = []
    collate = recorded(torch.utils.data.default_collate, batches)
    loader = torch.utils.data.DataLoader(make_rows(3 * STEPS), batch_size=1, shuffle=True, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6
    assert_same(model, train_by_hand(tiny_gemma3, batches, accumulation=3, autocast=True))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # advice for large data
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # a hint where SLURM is installed
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # lightning 2.6.6 on torch 2.13
def test_lightning_with_accumulation_and_clipping(tiny_gemma3: Path, tmp_path: Path) -> None:
    """Automatic optimization calls `step(closure)`, and backward and clipping happen inside of the closure."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Optimizer:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.AdamW(trainable, lr=LR, weight_decay=0.0)

    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    batches: list[Batch] = []
    collate = recorded(torch.utils.data.default_collate, batches)
    loader = torch.utils.data.DataLoader(make_rows(), batch_size=2, shuffle=True, collate_fn=collate)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model.train()), loader)
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6
    assert_same(model, train_by_hand(tiny_gemma3, batches, accumulation=2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_of_the_model(tiny_gemma3: Path, backend: str) -> None:
    """The hooks are outside of what is compiled; these backends trace with dynamo and need no compiler."""
    torch._dynamo.reset()
    batches = [{key: value[None] for key, value in row.items()} for row in make_rows(STEPS)]
    model = make_model(tiny_gemma3)
    handle = polar.constrain(model)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    for batch in batches:
        compiled(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.steps == STEPS
    assert worst_error(model) < 3e-6
    assert_same(model, train_by_hand(tiny_gemma3, batches))


# No line of ours: adapter_config.json asks for the field.


def test_a_trainer_script_that_only_reads_adapter_config_json(tiny_gemma3: Path, tmp_path: Path) -> None:
    """As PEFT's method comparison does: the configuration from a folder, the rest of the script from others."""
    make_config(backward_field="landing", gradient_accumulation_steps=2, **LANDING).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backward_field"] == "landing"
    model = make_model(tiny_gemma3, PeftConfig.from_pretrained(tmp_path))
    # Clipping acts on the field here and on the gradient in `constrain`, so only without it are the two the same.
    batches = run_trainer(model, tmp_path, max_grad_norm=0.0)
    hooks = {"manifold_step": "landing", **LANDING}
    assert_same(model, train_by_hand(tiny_gemma3, batches, accumulation=2, max_grad_norm=None, **hooks))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo of torch 2.13 does so
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{"backward_field": "tangent"}, {"backward_field": "landing", **LANDING}])
def test_torch_compile_takes_the_field_into_one_graph(backend: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = polar.PolarConfig(target_modules="x", init_factors="gaussian", init_weights=False, **options)
    layer = polar.PolarLinear(nn.Linear(13, 9), "default", config, r=3, alpha=6.0)
    x, gradients = torch.randn(5, 13), []
    for call in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-6)
