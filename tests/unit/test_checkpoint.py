"""Checkpoints: whole or skipped, rotated, of this run only, and everything in them continues bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from polar import checkpoint
from polar.engine_state import whole_optimizer_state, whole_values, write_optimizer_state, write_values
from polar.errors import UserError
from polar.resume import _loss_scale, _set_loss_scale
from polar.run_folder import continue_run_folder
from polar.shards import FactorSlice


def _write(folder: Path, text: str = "{}") -> Path:
    with checkpoint.new_checkpoint(folder) as temporary:
        checkpoint.write_tensors(temporary, {"value/w": torch.arange(6.0).view(2, 3)})
        for name in (checkpoint.STATE, checkpoint.RANDOM):
            (temporary / name).write_text(text)
    return folder


# Whole or damaged


def _truncate(folder: Path) -> None:
    path = folder / checkpoint.TENSORS
    path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / checkpoint.TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / checkpoint.TENSORS).write_bytes(content)


DAMAGES = {
    "truncated": (_truncate, "bytes of"),
    "a flipped bit": (_flip_a_bit, "is not what was written"),
    "a file is missing": (lambda f: (f / checkpoint.RANDOM).unlink(), "random_state.json is missing"),
    "no manifest": (lambda f: (f / checkpoint.MANIFEST).unlink(), "no training state"),
    "half a manifest": (lambda f: (f / checkpoint.MANIFEST).write_text('{"format": 1, "fi'), "cannot be used"),
    "a list": (lambda f: (f / checkpoint.MANIFEST).write_text("[]"), "cannot be used"),
    "another format": (lambda f: (f / checkpoint.MANIFEST).write_text('{"format": 99}'), "format is 99"),
    "an empty manifest": (lambda f: (f / checkpoint.MANIFEST).write_text('{"format": 1, "files": {}}'), "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_with_a_line(tmp_path: Path, damage: str) -> None:
    harm, reason = DAMAGES[damage]
    for step in (2, 10, 9):
        assert checkpoint.why_damaged(_write(tmp_path / f"checkpoint-{step}")) is None
    (tmp_path / ".checkpoint-11.incomplete-x").mkdir()
    harm(tmp_path / "checkpoint-10")
    lines: list[str] = []
    assert checkpoint.find_checkpoint(tmp_path, lines.append) == tmp_path / "checkpoint-9"
    assert len(lines) == 1
    assert "checkpoint-10" in lines[0]
    assert reason in lines[0]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), checkpoint.new_checkpoint(tmp_path / "checkpoint-1") as temporary:
        (temporary / "half").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.find_checkpoint(tmp_path, print) is None


@pytest.mark.parametrize(
    ("tensor", "problem"), [(torch.tensor([1.0, torch.nan]), "not finite"), (torch.empty(0, 3), "empty")]
)
def test_tensors_that_hold_nothing_are_refused(tmp_path: Path, tensor: torch.Tensor, problem: str) -> None:
    with pytest.raises(RuntimeError, match=f"exp_avg/w.*{problem}"):
        checkpoint.write_tensors(tmp_path, {"exp_avg/w": tensor})


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "best", "left"),
    [
        ((1, 2, 3), 3, None, None, {1, 2, 3}),
        ((1, 2, 3), 3, 2, None, {2, 3}),
        ((8, 9, 10), 10, 1, None, {10}),  # by number, not by name
        ((1, 2, 3), 3, 1, 1, {1, 3}),
        ((1, 2, 3, 4), 4, 3, 1, {1, 3, 4}),
        ((1, 2, 9), 2, 1, None, {2}),  # 9 is damaged: the run resumed before it
        ((1, 2, 9), 2, 2, None, {1, 2}),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, steps, newest, limit, best, left) -> None:
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()  # not ours
    best_folder = str(tmp_path / f"checkpoint-{best}") if best else None
    checkpoint.rotate(tmp_path, tmp_path / f"checkpoint-{newest}", limit, best_folder)
    assert {checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)} == left
    assert (tmp_path / "checkpoint-final").is_dir()


# The same run


def test_settings_that_may_and_may_not_change() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        values = {"learning_rate": 0.001, "adapter": {"r": 4}, "output_dir": "a", "deepspeed": None, "save_steps": 5}
        return checkpoint.settings_of(json.dumps(values | changes)) | {"base": "b", "data": "d"}

    free = identity(output_dir="b", deepspeed="ds_configs/zero3.json", save_steps=7, per_device_train_batch_size=2)
    checkpoint.check_same_run(Path("run"), identity(), free)
    for other, words in (
        (identity(learning_rate=0.01), "learning_rate 0.001 (now 0.01)"),
        (identity(adapter={"r": 8}), "adapter.r 4 (now 8)"),
        (identity(weight_decay=0.1), "weight_decay None (now 0.1)"),
        (identity() | {"base": "c"}, "another base model (b, now c)"),
        (identity() | {"data": "e"}, "other training data"),
    ):
        with pytest.raises(UserError) as caught:
            checkpoint.check_same_run(Path("run"), identity(), other)
        assert words in str(caught.value)
        assert "--overwrite" in str(caught.value)


def test_base_model_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    first = checkpoint._base_identity(str(tmp_path), None)
    assert first == checkpoint._base_identity(f"{tmp_path}/", None)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    assert first != checkpoint._base_identity(str(tmp_path), None)
    assert checkpoint._base_identity("google/gemma", "v1") != checkpoint._base_identity("google/gemma", None)


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    kept = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + '{"step": 3}\n{"st')
    (tmp_path / "provenance.json").write_text('{"world_size": 2}')
    (tmp_path / ".checkpoint-3.incomplete-abc").mkdir()
    for world_size in (3, 4):
        continue_run_folder(tmp_path, "a: 1\n", {"world_size": world_size}, len(kept))
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance == {"world_size": 2, "resumed": [{"world_size": 3}, {"world_size": 4}]}
    assert not list(tmp_path.glob(".checkpoint-*"))


# What continues bit for bit


def _draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()]


def test_random_numbers_continue() -> None:
    random.gauss(0, 1)  # leaves the second of a pair behind, as standard_normal(1) does
    np.random.standard_normal(1)
    saved = json.loads(json.dumps(checkpoint.random_state()))
    expected = [_draw(), _draw()]
    checkpoint.set_random_state(saved)
    assert [_draw(), _draw()] == expected


class _Shapes(nn.Module):
    """Parameters of 0 to 3 dimensions, one that never gets a gradient, one in bf16, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.number = nn.Parameter(torch.tensor(0.5))
        self.vector = nn.Parameter(torch.randn(3))
        self.matrix = nn.Parameter(torch.randn(5, 3))
        self.cube = nn.Parameter(torch.randn(2, 3, 5))
        self.narrow = nn.Parameter(torch.randn(3).bfloat16())
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.linspace(-1, 1, 5) + step
        y = (
            torch.einsum("abc,c->b", self.cube, x)
            + self.number * (self.matrix.T @ x)
            + self.vector
            + self.narrow.float()
        )
        return (y * self.frozen).square().sum()


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_continues(name: str) -> None:
    def steps(model: _Shapes, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            model.loss(number).backward()
            optimizer.step()

    def start() -> tuple[_Shapes, torch.optim.Optimizer]:
        model = _Shapes()
        return model, OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)

    model, optimizer = start()
    steps(model, optimizer, range(3))
    values = whole_values(model)
    state = whole_optimizer_state(model, optimizer, keep=True)
    assert not state.problem
    assert values.keys() == {"number", "vector", "matrix", "cube", "narrow", "unused"}
    steps(model, optimizer, range(3, 6))
    expected, expected_state = whole_values(model), whole_optimizer_state(model, optimizer, keep=True)

    again, fresh = start()
    write_values(again, values.__getitem__)
    keys = {name: sorted(moments) for name, moments in state.moments.items()}
    write_optimizer_state(again, fresh, keys, state.steps, lambda name, key: state.moments[name][key])
    steps(again, fresh, range(3, 6))
    assert all(torch.equal(value, expected[name]) for name, value in whole_values(again).items())
    found = whole_optimizer_state(again, fresh, keep=True)
    assert found.steps == expected_state.steps
    for name_, moments in expected_state.moments.items():
        assert all(torch.equal(found.moments[name_][key], value) for key, value in moments.items())


def test_8bit_moments_continue_and_are_refused_where_they_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def start() -> tuple[nn.Linear, Any]:
        torch.manual_seed(0)
        model = nn.Linear(64, 64)  # bitsandbytes keeps 8 bits from 4096 elements on
        return model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01)

    def steps(model: nn.Linear, optimizer: Any, number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 64)).square().sum().backward()
            optimizer.step()

    model, optimizer = start()
    steps(model, optimizer, 3)
    values, state = whole_values(model), whole_optimizer_state(model, optimizer, keep=True)
    assert state.moments["weight"]["state1"].dtype == torch.uint8
    steps(model, optimizer, 3)
    again, fresh = start()
    keys = {name: sorted(moments) for name, moments in state.moments.items()}
    write_values(again, values.__getitem__)
    write_optimizer_state(again, fresh, keys, state.steps, lambda name, key: state.moments[name][key])
    steps(again, fresh, 3)
    assert torch.equal(again.weight, model.weight)

    flat = torch.zeros(5000)  # as ZeRO would hold it
    item = FactorSlice("weight", 64, 64, 0, 4096, flat, 0, None)
    monkeypatch.setattr("polar.engine_state.resolve", lambda parameters, model: {"weight": item})
    fresh.state[flat] = {"state1": torch.zeros(5000), "step": 3}
    assert "flat partition" in whole_optimizer_state(again, fresh, keep=True).problem
    with pytest.raises(UserError, match="cannot be cut: resume on one process"):
        write_optimizer_state(again, fresh, keys, state.steps, lambda name, key: state.moments[name][key])


SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
SCHEDULERS += ["inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"]
SCHEDULER_OPTIONS = {"cosine_with_min_lr": {"min_lr": 0.01}, "warmup_stable_decay": {"num_decay_steps": 4}}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_continues_through_json(name: str) -> None:
    def start() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
        options = SCHEDULER_OPTIONS.get(name)
        return optimizer, get_scheduler(name, optimizer, 3, 12, scheduler_specific_kwargs=options)

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, numbers: range) -> list[float]:
        found = []
        for number in numbers:
            optimizer.step()
            schedule.step(*([1.0 + number] if name == "reduce_lr_on_plateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, schedule = start()
    rates(optimizer, schedule, range(5))
    saved, rate = json.loads(json.dumps(schedule.state_dict())), optimizer.param_groups[0]["lr"]
    expected = rates(optimizer, schedule, range(5, 18))
    optimizer, schedule = start()
    schedule.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = rate
    assert rates(optimizer, schedule, range(5, 18)) == expected


def test_loss_scale_continues() -> None:
    def trainer(**scale: Any) -> Any:
        scaler = torch.amp.GradScaler("cpu", **scale)
        scaler.scale(torch.ones(()))  # torch makes the tensor of the scale at the first use
        deepspeed = SimpleNamespace(cur_scale=scale.get("init_scale", 4.0), cur_iter=0, last_overflow_iter=-1)
        optimizer = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=deepspeed))
        return SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), optimizer=optimizer)

    first, second = trainer(init_scale=128.0), trainer(init_scale=4.0)
    first.optimizer.optimizer.loss_scaler.cur_iter = 7
    _set_loss_scale(second, json.loads(json.dumps(_loss_scale(first))))
    assert second.accelerator.scaler.get_scale() == 128.0
    assert vars(second.optimizer.optimizer.loss_scaler) == vars(first.optimizer.optimizer.loss_scaler)
