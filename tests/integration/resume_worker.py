"""Runs of test_resume_engines.py and test_resume_saves.py, in ranks forked from one process.

Usage: python resume_worker.py engines|saves FOLDER MODEL ROWS
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, STOP, ROWS = 10, 6, 68  # 8 rows validate; 60 are two epochs of 5 steps, and steps of 12 rows divide by 1 to 4
FSDP2 = ["--engine", "fsdp2"]
ZERO3 = ["--deepspeed", "ds_configs/zero3.json"]
# Where the run continues that began under ZeRO-3 on two ranks: name, ranks (0: no launcher), micro batch, engine.
ELSEWHERE: list[tuple[str, int, int, str]] = [
    ("ZeRO-3, 1 rank", 1, 6, "zero3"),
    ("ZeRO-3, 3 ranks", 3, 4, "zero3"),
    ("ZeRO-3, 4 ranks", 4, 3, "zero3"),
    ("ZeRO-2, 2 ranks", 2, 3, "zero2"),
    ("DDP, 3 ranks", 3, 2, ""),
    ("FSDP2, 2 ranks", 2, 3, "fsdp2"),
    ("one process", 0, 4, ""),
]
SIZE_LIMIT = 50_000  # bytes of a file: the adapter's fit, training_state.safetensors does not
SAVES_STEPS = 8
# States in which a kill may leave the run folder; each must occur, and the run continues from each.
SAVE_STATES: dict[str, Callable[[Path], bool]] = {
    "a file is being written": lambda run: any(run.glob(".checkpoint-*/.*.incomplete-*")),
    "tensors without manifest": lambda run: _any_without(run, "training_state.safetensors", "checkpoint.json"),
    "whole without its name": lambda run: any(run.glob(".checkpoint-*/checkpoint.json")),
    "adapter between two names": lambda run: any(run.glob(".adapter.previous-*/*")) and not (run / "adapter").exists(),
    "old checkpoint half deleted": lambda run: _any_without(run, "checkpoint-2", "checkpoint-2/checkpoint.json"),
}


def _any_without(run: Path, name: str, missing: str) -> bool:
    return any((f / name).exists() and not (f / missing).exists() for f in run.glob(".checkpoint-*.incomplete-*"))


def engine_settings(model: str, rows: str) -> list[str]:
    """Without dropout: other numbers of ranks draw other numbers."""
    return [
        *("--model_name_or_path", model, "--train_dataset", rows, "--dtype", "float32"),
        *("--template", "question_answer", "--val_split", "8", "--eval_steps", "3", "--save_steps", "3"),
        *("--adapter.r", "5", "--adapter.target_modules", '["q_proj", "v_proj", "down_proj"]'),
        *("--global_batch_size", "12", "--num_train_epochs", "2", "--learning_rate", "1e-2"),
        *("--theta_learning_rate", "2e-2", "--weight_decay", "0.1", "--logging_steps", "2"),
    ]


def stopped(run: Path, copy: Path, step: int) -> Path:
    """Copy a run as it would look if it had been killed a while after `step`: its logs and adapter have gone on."""
    shutil.copytree(run, copy)
    for folder in copy.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
            (copy / "done.json").unlink(missing_ok=True)
    return copy


class Engines:
    """A whole run, the same stopped and continued elsewhere, and one whose disk is full."""

    def __init__(self, folder: Path, model: str, rows: str) -> None:
        self.folder, self.settings = folder, engine_settings(model, rows)
        self.zero2 = folder / "zero2.json"
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        self.zero2.write_text(json.dumps({"zero_optimization": {"stage": 2}} | dict.fromkeys(auto, "auto")))

    def __call__(self) -> None:
        self.run("reference", 2, 6, "zero3")
        for name, ranks, micro_batch, engine in ELSEWHERE:
            stopped(self.folder / "reference", self.folder / name, STOP)
            self.run(name, ranks, micro_batch, engine, "--resume")
        self.asked_to_stop("asked to stop")
        self.killed("killed")
        self.full_disk("full disk")

    def arguments(self, name: str, micro_batch: int, engine: str, *more: str) -> list[str]:
        config = {"zero3": ZERO3, "zero2": ["--deepspeed", str(self.zero2)], "": [], "fsdp2": FSDP2}[engine]
        batch = ["--per_device_train_batch_size", str(micro_batch)]
        return [*self.settings, *batch, *config, "--output_dir", str(self.folder / name), *more]

    def run(self, name: str, ranks: int, micro_batch: int, engine: str, *more: str) -> None:
        arguments = self.arguments(name, micro_batch, engine, *more)
        run_ranks(ranks, lambda: train_main(arguments), self.folder / f"{name}.log")

    def asked_to_stop(self, name: str) -> None:
        """Rank 1 alone gets a signal in step 3, after which an evaluation is due; then the run goes on."""
        arguments = self.arguments(name, 6, "zero3", "--resume")

        def work() -> int:
            if os.environ["RANK"] == "1":
                act_in_step(3, signal.SIGUSR2)
            return train_main(arguments)

        run_ranks(2, work, self.folder / f"{name} 0.log")
        checkpoints = [path.name for path in (self.folder / name).glob("checkpoint-*")]
        (self.folder / f"{name}.json").write_text(json.dumps(checkpoints))
        self.run(name, 2, 6, "zero3", "--resume")

    def killed(self, name: str) -> None:
        """A rank dies, and no launcher ends the other one: in the save of step 6, then in step 8; then it ends well."""
        arguments, codes = self.arguments(name, 6, "zero3", "--resume"), []
        for rank, die in enumerate((die_in_save, die_in_step)):

            def work(rank: int = rank, die: Callable[[], None] = die) -> int:
                if os.environ["RANK"] == str(rank):
                    die()
                return train_main(arguments)

            codes.append(wait_for_ranks(start_ranks(2, work, self.folder / f"{name} {rank}.log"), timeout_s=60))
        (self.folder / f"{name}.json").write_text(json.dumps(codes))
        self.run(name, 2, 6, "zero3", "--resume")

    def full_disk(self, name: str) -> None:
        """A checkpoint that the main process cannot write must end both ranks, not leave one waiting."""
        arguments = self.arguments(name, 6, "", "--eval_strategy", "no", "--save_steps", "2")

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE_LIMIT, SIZE_LIMIT))
            return train_main(arguments)

        codes = wait_for_ranks(start_ranks(2, work, self.folder / f"{name}.log"), timeout_s=60)
        (self.folder / "full disk.json").write_text(json.dumps(codes))


def die_in_save() -> None:
    """Let this process be killed when the tensors of checkpoint-6 are written, and nothing after them."""
    from polar import checkpoint

    write = checkpoint.write_tensors

    def write_and_die(folder: Path, tensors: Any) -> None:
        write(folder, tensors)
        if ".checkpoint-6." in folder.name:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_tensors = write_and_die


def die_in_step() -> None:
    """Let this process be killed in step 8, before it joins the collectives of its backward pass."""
    act_in_step(8, signal.SIGKILL)


def act_in_step(number: int, action: signal.Signals) -> None:
    """Send this process a signal in step `number`, before the collectives of its backward pass."""
    from polar.trainer import AdapterTrainerMixin

    step = AdapterTrainerMixin.training_step

    def signal_and_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == number - 1:
            os.kill(os.getpid(), action)
        return step(self, *args, **kwargs)

    AdapterTrainerMixin.training_step = signal_and_step


class Saves:
    """One run that copies its folder whenever a file in it is about to change: what a kill at that moment leaves."""

    def __init__(self, folder: Path, model: str, rows: str) -> None:
        self.folder, self.run = folder, folder / "run"
        self.settings = [
            *engine_settings(model, rows),
            *("--adapter.dropout", "0.1", "--per_device_train_batch_size", "12", "--max_steps", str(SAVES_STEPS)),
            *("--save_steps", "2", "--eval_steps", "2", "--save_total_limit", "2", "--logging_steps", "1"),
        ]
        self.last: Any = None
        self.labels: list[str] = []
        self.flushed: list[str] = []
        self.is_copying = True

    def __call__(self) -> None:
        run_ranks(0, self.record, self.folder / "run.log")
        snapshots = sorted((self.folder / "snapshots").iterdir(), key=lambda path: int(path.name))
        for state, occurs in SAVE_STATES.items():
            found = [path for path in snapshots if occurs(path)]
            assert found, f"{state} never happened"
            copy = self.folder / state
            shutil.copytree(found[0], copy)
            arguments = [*self.settings, "--output_dir", str(copy), "--resume"]
            run_ranks(0, lambda arguments=arguments: train_main(arguments), self.folder / f"{state}.log")

    def record(self) -> int:
        """Train; every change is announced by an audit event of Python, or follows an `fsync`."""
        (self.folder / "snapshots").mkdir()
        flush = os.fsync

        def flush_and_look(descriptor: int) -> None:
            flush(descriptor)
            name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            self.flushed.append(name)
            self.snapshot(f"after fsync {name}")

        os.fsync = flush_and_look
        sys.addaudithook(self.hear)
        self.is_copying = False
        code = train_main([*self.settings, "--output_dir", str(self.run)])
        self.is_copying = True
        (self.folder / "snapshots.json").write_text(json.dumps({"labels": self.labels, "flushed": self.flushed}))
        return code

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_copying or not (event == "open" or event.startswith("os.")) or not arguments:
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        is_here = str(arguments[0]).startswith(str(self.run)) or event in ("os.remove", "os.rmdir")
        if writes and is_here:
            self.snapshot(f"before {event} {Path(str(arguments[0])).name}")

    def snapshot(self, label: str) -> None:
        if self.is_copying:
            return
        self.is_copying = True  # copying raises events of its own
        try:
            state = [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(self.run.rglob("*"))]
            if state != self.last and any(self.run.glob("checkpoint-*")):
                shutil.copytree(self.run, self.folder / "snapshots" / str(len(self.labels)))
                self.labels.append(label)
                self.last = state
        finally:
            self.is_copying = False


def train_main(arguments: list[str]) -> int:
    from polar.train import main

    return main(arguments)


def import_everything() -> None:
    """Import what a run imports, so that the forked ranks need not."""
    import datasets  # noqa: F401
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import transformers.models.gemma3.modeling_gemma3  # noqa: F401

    import polar.build_model
    import polar.summary
    import polar.train
    import polar.trainer  # noqa: F401


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tests.forked_ranks import run_ranks, start_ranks, wait_for_ranks

    import_everything()
    {"engines": Engines, "saves": Saves}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])()
