"""Reading adapters: what is accepted, and that each kind of damage gives one line with the value and the fix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar.adapter_file import find_adapter, read_adapter
from polar.errors import UserError
from tests.tiny_models import write_adapter, write_gemma3

SIZES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.mlp.down_proj": (10, 40)}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_delta_and_its_norm_agree_with_the_documented_format(tmp_path: Path, theta: str, use_rslora: bool) -> None:
    patterns = {
        "rank_pattern": {"model.layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 3.0},
    }
    expected = write_adapter(tmp_path / "a", SIZES, theta=theta, use_rslora=use_rslora, **patterns)
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.modules) == set(SIZES)
    for name, module in adapter.modules.items():
        delta = module.X.double() @ module.core() @ module.Y.double().T
        torch.testing.assert_close(delta, expected[name], rtol=1e-12, atol=1e-12)
        assert module.delta_norm() == pytest.approx(torch.linalg.norm(expected[name]).item(), rel=1e-6)
    assert adapter.modules["model.layers.1.mlp.down_proj"].r == 7


def test_run_folder_and_adapter_folder_are_found(tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "adapter", SIZES)
    assert find_adapter(tmp_path / "run") == tmp_path / "run" / "adapter"
    assert find_adapter(tmp_path / "run" / "adapter") == tmp_path / "run" / "adapter"


def test_unfinished_run_points_to_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint-10"):
        find_adapter(tmp_path / "run")


def test_missing_folder_file_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, problem in (("none", "no such folder"), ("empty", "neither adapter_config.json"), ("file", "is a file")):
        with pytest.raises(UserError, match=problem):
            find_adapter(tmp_path / name)


def _set(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[key] = value
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _drop(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        del tensors[key]
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return change


DAMAGE = {
    "truncated": (_truncate, "truncated or corrupt.*copy or save"),
    "pickle": (_pickle_only, "adapter_model.bin: pickles are not opened.*save_pretrained"),
    "nan": (
        _set(f"{FIRST}.polar_X", torch.full((24, 4), float("nan"))),
        "q_proj.polar_X holds NaN or Inf.*earlier checkpoint",
    ),
    "inf": (_set(f"{FIRST}.polar_Theta", torch.full((4, 4), float("inf"))), "polar_Theta holds NaN or Inf"),
    "integers": (_set(f"{FIRST}.polar_Theta", torch.ones(4, 4, dtype=torch.int32)), "is torch.int32"),
    "transposed factor": (
        _set(f"{FIRST}.polar_X", torch.ones(4, 24)),
        r"q_proj.polar_X has shape \(4, 24\), expected \(n, 4\)",
    ),
    "n below r": (_set(f"{FIRST}.polar_Y", torch.ones(3, 4)), r"shape \(3, 4\), expected \(n, 4\) with n >= 4"),
    "other rank": (_config(r=5), r"expected \(n, 5\)"),
    "theta vector": (_set(f"{FIRST}.polar_Theta", torch.ones(4)), r"polar_Theta has shape \(4,\), expected \(4, 4\)"),
    "empty (ZeRO-3 shard)": (
        _set(f"{FIRST}.polar_X", torch.empty(0)),
        r"q_proj.polar_X is empty, shape \(0,\): a ZeRO-3",
    ),
    "missing Theta": (_drop(f"{FIRST}.polar_Theta"), "q_proj lacks polar_Theta"),
    "missing Y": (_drop(f"{FIRST}.polar_Y"), "q_proj lacks polar_Y"),
    "extra key": (_set(f"{FIRST}.lora_A.weight", torch.ones(4, 4)), "unexpected key .*lora_A.weight"),
    "key without prefix": (_set("q_proj.polar_X", torch.ones(4, 4)), "unexpected key q_proj.polar_X"),
    "unknown theta": (_config(theta="dense"), "theta 'dense' is none of full, diagonal, identity"),
    "identity with Theta": (_config(theta="identity"), "unexpected key .*polar_Theta"),
    "r of zero": (_config(r=0), "r = 0 must be a positive integer"),
    "r with a fraction": (_config(r=4.5), "r = 4.5 must be a positive integer"),
    "rank_pattern of text": (
        _config(rank_pattern={"q_proj": "x"}),
        r"rank_pattern\['q_proj'\] = 'x' must be a positive",
    ),
    "rank_pattern as a list": (_config(rank_pattern=["q_proj"]), "must map names to numbers"),
    "alpha_pattern of null": (_config(alpha_pattern={"q_proj": None}), r"alpha_pattern\['q_proj'\] = None must be"),
    "alpha not a number": (_config(alpha="8"), "alpha = '8' must be a positive number"),
    "another method": (_config(peft_type="LORA"), "holds a LORA adapter"),
    "broken config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable as JSON"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    write_adapter(tmp_path / "a", SIZES)
    read_adapter(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "a")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_factors_off_the_manifold_are_noted_not_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", SIZES)
    assert read_adapter(tmp_path / "a").notes == []
    _set(f"{FIRST}.polar_X", torch.ones(24, 4))(tmp_path / "a")
    (note,) = read_adapter(tmp_path / "a").notes
    assert "not orthonormal" in note and "q_proj" in note


def test_modules_to_save_are_kept_apart(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", SIZES, modules_to_save=["lm_head"])
    _set("base_model.model.lm_head.weight", torch.ones(3, 16))(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.other_tensors) == {"lm_head.weight"}
    assert set(adapter.modules) == set(SIZES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_gemma3(tmp_path_factory.mktemp("base")))


BASE_SIZES = {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in range(2)}


def test_the_right_base_is_accepted(tmp_path: Path, base: str) -> None:
    write_adapter(tmp_path / "a", BASE_SIZES)
    adapter = read_adapter(tmp_path / "a", base)
    assert set(adapter.modules) == set(BASE_SIZES) and not adapter.renamed


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {name: (48, 32) for name in BASE_SIZES},
            r"another base: .*q_proj is \(48, 32\) in the adapter and \(32, 32\)",
        ),
        (BASE_SIZES | {"model.layers.7.self_attn.q_proj": (32, 32)}, "1 of its 3 modules are not in .*layers.7"),
        (dict([next(iter(BASE_SIZES.items()))]), "does not cover .*layers.1.self_attn.q_proj is missing"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, base: str, sizes: dict[str, tuple[int, int]], message: str) -> None:
    write_adapter(tmp_path / "a", sizes)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a", base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "no such folder"),
        ("", "no such folder"),
        ("polar-tests/not-in-the-cache", "not in the hub cache"),
    ],
)
def test_a_base_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_adapter(tmp_path / "a", BASE_SIZES)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a", name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["layers.0.self_attn.q_proj"]},
            "1 modules that its target_modules do not select.*layers.1",
        ),
        ({"target_modules": "("}, r"target_modules '\('.*restore the file"),
        ({"exclude_modules": 5}, "exclude_modules 5.*restore the file"),
    ],
)
def test_selection_and_file_must_agree(tmp_path: Path, base: str, changes: dict[str, object], message: str) -> None:
    write_adapter(tmp_path / "a", BASE_SIZES)
    _config(**changes)(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(tmp_path / "a", base)
    assert "\n" not in str(caught.value)


def test_a_model_folder_without_config(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE_SIZES)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        read_adapter(tmp_path / "a", str(tmp_path / "model"))
