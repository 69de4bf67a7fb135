"""What polar adds to the Trainer: optimizer groups, dtypes, logs, the best adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polar.build_model import build_model, load_tokenizer, plan_model
from polar.data import prepare
from polar.engine_state import whole_values
from polar.errors import UserError
from polar.run_config import RunConfig, parse_run
from polar.saved_adapter import check_saved_adapter
from polar.trainer import PolarSFTTrainer, separate_theta


@pytest.fixture
def config(tmp_path, tiny_gemma3, tiny_rows) -> RunConfig:
    return parse_run(
        [
            *("--model_name_or_path", str(tiny_gemma3), "--train_dataset", str(tiny_rows)),
            *("--output_dir", str(tmp_path / "run"), "--dtype", "float32", "--val_split", "8"),
            *("--adapter.r", "4", "--adapter.target_modules", '["q_proj", "down_proj"]'),
            *("--learning_rate", "1e-3", "--theta_learning_rate", "5e-3", "--weight_decay", "0.1"),
            *("--template", "question_answer", "--per_device_train_batch_size", "4", "--max_steps", "2"),
        ]
    )


@pytest.fixture
def trainer(config, tmp_path, monkeypatch) -> Iterator[PolarSFTTrainer]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(config.model)
    data = prepare(config.data, tokenizer, config.training.max_length, seed=0)
    made = PolarSFTTrainer(
        model=build_model(config),
        args=config.training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        theta_learning_rate=config.training.theta_learning_rate,
    )
    yield made
    made.manifold_handle.remove()  # its model may outlive the test, and would see other tests' optimizers


def _groups(trainer: PolarSFTTrainer) -> dict[str, dict]:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_decay_and_learning_rate_by_kind_of_parameter(trainer) -> None:
    groups = _groups(trainer)
    assert groups.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(groups) == 2 * 2 * 3
    for name, group in groups.items():
        is_theta = "polar_Theta" in name
        assert group["weight_decay"] == (0.1 if is_theta else 0.0)
        assert group["lr"] == (5e-3 if is_theta else 1e-3)
    # The Trainer logs the learning rate of the first group.
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_separate_theta_keeps_one_rate_without_its_own() -> None:
    theta, factor = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [theta, factor]}, {"params": []}], lr=0.1)
    separate_theta(optimizer, [theta], None)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


def test_factors_are_fp32_and_orthonormal_when_the_optimizer_is_made(trainer) -> None:
    """TRL casts the trainable parameters of a quantised base to bf16 in its constructor."""
    for _, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    groups = _groups(trainer)
    parameters = dict(trainer.model.named_parameters())
    for name in groups:
        assert parameters[name].dtype == torch.float32
        if "polar_Theta" not in name:
            X = parameters[name].detach().double()
            torch.testing.assert_close(X.T @ X, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_adapter_on_disk_is_the_best_by_validation(trainer, config) -> None:
    path = Path(config.training.output_dir) / "adapter" / "adapter_model.safetensors"
    name, theta = next((n, p) for n, p in trainer.model.named_parameters() if "polar_Theta" in n)
    for loss, value in ((2.0, 1.0), (1.0, 2.0), (3.0, 3.0)):
        theta.data.fill_(value)
        trainer._determine_best_metric({"eval_loss": loss}, None)
    saved = load_file(path)[name.replace(".default", "")]
    assert torch.equal(saved, torch.full((4, 4), 2.0))
    assert path.stat().st_mode & 0o444 == 0o444  # readable for the group, unlike safetensors' own 0600


def test_log_writes_json_lines_and_stops_at_nan(trainer, config) -> None:
    path = Path(config.training.output_dir) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.model.train()
    trainer.log({"loss": 1.5, "learning_rate": 1e-3})
    record = json.loads(path.read_text())
    assert "stable_rank" not in record  # Theta is zero before the first step, and dW has none
    assert record["loss"] == 1.5
    assert record["step"] == 0
    assert record["orthonormality_error"] < 1e-5
    with pytest.raises(UserError, match="loss is nan at step 0: lower learning_rate"):
        trainer.log({"loss": math.nan})
    assert json.loads(path.read_text().splitlines()[1])["loss"] is None


def test_saved_adapter_is_read_back(trainer, tmp_path) -> None:
    state = whole_values(trainer.model)
    trainer.save_adapter(tmp_path / "good")
    check_saved_adapter(tmp_path / "good", state, orthonormality_bound=1e-5)
    with pytest.raises(RuntimeError, match="11 are trained"):
        check_saved_adapter(tmp_path / "good", dict(list(state.items())[1:]), orthonormality_bound=None)
    factor = next(p for name, p in trainer.model.named_parameters() if "polar_X" in name)
    factor.data.mul_(1.1)
    with pytest.raises(RuntimeError, match="off the Stiefel manifold"):
        trainer.save_adapter(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_plan_counts_what_is_built(trainer, config) -> None:
    """Independent computation: the real model on the CPU."""
    plan = plan_model(config)
    parameters = dict(trainer.model.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    assert plan.num_trainable == sum(p.numel() for p in trainable.values())
    assert plan.num_factors == 2 * 2 * 2 == trainer.manifold_handle.num_factors
    assert plan.num_base == sum(p.numel() for name, p in parameters.items() if name not in trainable)
    assert plan.base_bytes == 4 * plan.num_base
    assert {kind: m.num_modules for kind, m in plan.modules.items()} == {"q_proj": 2, "down_proj": 2}
    assert plan.largest_factor == max(p.numel() for p in trainable.values())


def test_shipped_zero3_config_keeps_27b_factors_resident() -> None:
    config = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero3.json").read_text())
    zero = config.pop("zero_optimization")
    assert zero["stage3_param_persistence_threshold"] >= 32 * 21504  # r = 32, up_proj of Gemma-3-27B
    flat = [v for value in config.values() for v in (value.values() if isinstance(value, dict) else [value])]
    assert set(flat) == {"auto"}  # batch, clipping and precision belong to the run's own config
