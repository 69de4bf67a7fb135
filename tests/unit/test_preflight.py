"""Each check of the preflight, on real folders; the ranks together are in tests/distributed/test_preflight.py."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polar import preflight, preflight_checks, preflight_network
from polar.errors import UserError
from polar.preflight import Report, describe
from polar.preflight_checks import Finding
from tests.integration.commands import free_port

BASE = Path(__file__).resolve().parents[2] / "demo" / "base"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch) -> Path:
    """An offline hub cache that holds the demo's base under the name polar/tiny, laid out as the hub library does."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--polar--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(BASE, snapshot)
    (cache / "models--polar--tiny" / "refs").mkdir()
    (cache / "models--polar--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_model_in_the_offline_cache_is_whole_or_wrong(hub_cache: Path) -> None:
    found = preflight_checks.check_model("polar/tiny", None, asks_hub=True)
    assert [f.fix for f in found] == [""] and "hub cache" in found[0].value
    (hub_cache / "model.safetensors").rename(hub_cache / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (hub_cache / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken,) = preflight_checks.check_model("polar/tiny", None, asks_hub=True)
    assert "model-00001-of-00002.safetensors" in broken.value and "hf download polar/tiny" in broken.fix
    (absent,) = preflight_checks.check_model("polar/other", None, asks_hub=True)
    assert "polar/other is not in the cache" in absent.value and "HF_HUB_OFFLINE" in absent.fix


def test_model_folder(tmp_path: Path) -> None:
    assert not preflight_checks.check_model(str(BASE), None, asks_hub=True)[0].fix
    for name in (str(tmp_path), str(tmp_path / "absent"), None):
        assert preflight_checks.check_model(name, None, asks_hub=True)[0].fix


def test_data_set_in_the_offline_cache(tmp_path: Path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (tmp_path / "openai___gsm8k" / "main" / "0.0.0" / "abc").mkdir(parents=True)
    assert not preflight_checks.check_data("train_dataset", "openai/gsm8k:main")[0].fix
    assert preflight_checks.check_data("train_dataset", "openai/gsm8k:socratic")[0].fix
    assert preflight_checks.check_data("train_dataset", "meta-math/MetaMathQA")[0].fix


def test_disk_and_memory_against_the_need(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    (fine,) = preflight_checks.check_run_folder(str(run), 0)
    assert not fine.fix and fine.amount == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.05)
    assert preflight_checks.check_run_folder(str(run), 1e9)[0].fix
    assert not run.exists() and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert "is a file" in preflight_checks.check_run_folder(str(tmp_path / "file"), 0)[0].value
    assert preflight_checks.check_host_memory(1e6)[0].fix
    assert not preflight_checks.check_host_memory(0.001)[0].fix


def test_folder_that_cannot_be_written() -> None:
    assert preflight_checks.check_run_folder("/proc/polar", 0)[0].fix  # even root may not write there


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_granted_gpus_that_torch_does_not_see_are_a_problem(monkeypatch) -> None:
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert not preflight_checks.check_device(False, 0, None)[0].fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert not preflight_checks.check_device(False, 0, None)[0].fix
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    assert "SLURM_JOB_GPUS=0" in preflight_checks.check_device(False, 0, None)[0].value
    assert not preflight_checks.check_device(True, 0, None)[0].fix


def test_versions_and_devices_are_compared_with_the_other_ranks() -> None:
    here = preflight_checks.versions()
    assert {"polar", "torch", "polar's source"} <= here.keys()
    assert not preflight_checks.check_versions(here, dict(here))[0].fix
    (other,) = preflight_checks.check_versions(here | {"torch": "2.9.0"}, here)
    assert other.fix and "torch 2.9.0" in other.value
    gpus = [{"device": "A"}, {"device": "B"}, {"device": "A"}, {"device": "cpu"}]
    assert "rank 2" in preflight.check_same_devices(0, gpus)[0].value
    assert preflight.check_same_devices(1, gpus) == []
    assert "no GPU" in preflight.check_same_devices(3, gpus)[0].value
    assert preflight.check_same_devices(0, [{"device": "cpu"}, {"device": "cpu"}]) == []


def test_table_has_one_line_per_problem_and_node() -> None:
    wrong = Finding("model", "absent", "fetch it")
    reports = [Report(rank, f"n{rank // 4}", [Finding("device", "H100")]) for rank in range(8)]
    for rank, amount in ((0, 5.0), (1, 3.0)):
        reports[rank].findings.append(Finding("host memory", f"{amount} GiB", amount=amount))
    for rank in (2, 5, 6):
        reports[rank].findings.append(wrong)
    lines = describe(reports, "1 s").splitlines()
    assert "8 ranks (n0: 0-3, n1: 4-7)" in lines[0]
    assert lines[1:] == [
        "  device       H100",
        "  host memory  3.0 GiB (the least of 2)",
        "  model        WRONG on rank 2,5-6",
        "problem on n0, rank 2: model: absent: fetch it",
        "problem on n1, rank 5-6: model: absent: fetch it",
        "preflight: 2 problems",
    ]
    assert describe(reports[:1], "1 s").endswith("nothing wrong")


def test_ranks_that_do_not_come_are_named(monkeypatch) -> None:
    """World of 4: rank 2 never starts, rank 3 leaves after the first exchange; the others end all the same."""
    monkeypatch.setattr(preflight_network, "LEAST_WAIT_S", 0.3)
    port, results = str(free_port()), {}

    def run(rank: int) -> None:
        environment = {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = preflight_network.Ranks(environment, wait_s=2)
        results[rank] = [ranks.exchange("facts", rank * 10)]
        if rank != 3:
            results[rank].append(ranks.exchange("reports", rank))
            ranks.leave()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (0, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    facts = [0, 10, None, 30]
    assert results == {0: [facts, [0, 1, None, None]], 1: [facts, [0, 1, None, None]], 3: [facts]}


def test_unreachable_rank_0_is_one_line() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(UserError, match=r"rank 1 .* cannot reach 127\.0\.0\.1:"):
        preflight_network.Ranks(environment, wait_s=0.5)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        preflight_network.Ranks({"RANK": "0"}, wait_s=0.5)


def test_a_wrong_sum_is_a_problem(monkeypatch) -> None:
    """gloo in a world of one, whose sum gets one flipped element."""
    ranks = preflight_network.Ranks({}, wait_s=30)
    try:
        assert not any(f.fix for f in preflight_network.check_all_reduce(ranks, False, 1, None))
        torch.distributed.destroy_process_group()
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor[7:8].neg_())
        ranks = preflight_network.Ranks({}, wait_s=30)
        wrong = preflight_network.check_all_reduce(ranks, False, 1, None)[0]
        assert wrong.fix and "1 of 262,144 sums are wrong" in wrong.value
    finally:
        torch.distributed.destroy_process_group()


def test_slow_all_reduce_and_silent_transport(monkeypatch) -> None:
    ranks = SimpleNamespace(rank=1, world_size=2, deadline=0.0)
    monkeypatch.setattr(preflight_network, "LEAST_WAIT_S", 0.1)
    monkeypatch.setattr(preflight_network, "_time_all_reduce", lambda *_: 0.01)
    fine, slow = (preflight_network.check_all_reduce(ranks, False, 10, need)[0] for need in (1.0, 1.1))
    assert fine.amount == pytest.approx(10 * 2**20 / 0.01 / 1e9) and not fine.fix and slow.fix
    stuck = threading.Event()
    monkeypatch.setattr(preflight_network, "_time_all_reduce", lambda *_: stuck.wait())
    assert "no answer in time" in preflight_network.check_all_reduce(ranks, False, 10, None)[0].value
    stuck.set()


NCCL_LOG = """\
n1:7:7 [0] NCCL INFO NCCL version 2.27.5+cuda12.9
n1:7:9 [0] NCCL INFO NET/{0} : Using [0]mlx5_0:1/IB [RO]; OOB ib0:10.0.0.1<0>
n1:7:9 [0] NCCL INFO Using network {0}
n1:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:7:9 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:7:9 [0] NCCL INFO Channel 00/0 : 9[1] -> 0[0] [receive] via NET/{0}/0/GDRDMA
"""


def test_transport_of_nccl() -> None:
    fast = preflight_network.describe_nccl(NCCL_LOG.format("IB"), ["mlx5_0"])
    expected = "NCCL 2.27.5+cuda12.9, network IB, channels of rank 0: 2 P2P/CUMEM/read, 1 NET/IB/0/GDRDMA"
    assert (fast.value, fast.fix) == (expected, "")
    assert preflight_network.describe_nccl(NCCL_LOG.format("Socket"), ["mlx5_0"]).fix
    assert not preflight_network.describe_nccl(NCCL_LOG.format("Socket"), []).fix


def test_one_process_from_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    options = ["--model_name_or_path", str(BASE), "--train_dataset", str(rows), "--output_dir", str(tmp_path / "run")]
    options += ["--adapter.r", "4", "--need_disk_gib", "0"]
    assert preflight.main(options) == 0
    assert preflight.main([*options, "--need_host_gib", "1e6"]) == 2
    assert preflight.main([*options, "--learning_rat", "1"]) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert ["host memory" in problems[0], "settings" in problems[1], len(problems)] == [True, True, 2]
    assert sorted(tmp_path.iterdir()) == [rows]
