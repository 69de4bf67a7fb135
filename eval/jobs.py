"""What is to be scored, settled and checked before any weights are loaded: options, subject, and one job per task."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polar.adapter_file import WEIGHTS_NAME, find_adapter, read_config
from polar.base_checkpoint import resolve_base
from polar.errors import UserError
from polar.templates import load_template, trained_template
from polar_eval.catalog import ScoringTask, find_data
from polar_eval.results import RESULT_NAME, prompt_facts
from polar_eval.world import World

DEFAULT_TEMPLATE = "alpaca"
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class ScoreOptions:
    """How to score.

    Attributes:
        data: a local file, or a hub name with its config behind a colon; None: the task's own on the hub.
        data_dir: folder with a file per task, see `ScoringTask.files`; None: none.
        template: prompt template; None: the run's own where the adapter lies in a run folder, else alpaca.
        limit: score the first so many problems; None: all.
        batch_size: prompts per batch; None: found on the way (`polar_eval.batching`).
        max_new_tokens: generation limit; None: the task's own.
        dtype: of the base: auto (as its files), float32, bfloat16 or float16.
        device: cuda, cuda:N or cpu; None: this process's GPU if there is one.
        parallelize: spread the base over all GPUs of this machine.
        backend: hf or vllm.
        tensor_parallel: GPUs that share the base under vLLM.
        seed: of everything that lm-eval draws; greedy decoding draws nothing.
    """

    data: str | None = None
    data_dir: str | None = None
    template: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str | None = None
    parallelize: bool = False
    backend: str = "hf"
    tensor_parallel: int = 1
    seed: int = 0

    def check(self, world: World) -> None:
        """Raise a UserError for a value that cannot be."""
        for name in ("limit", "batch_size", "max_new_tokens", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r}: choose auto, float32, bfloat16 or float16")
        if self.backend not in BACKENDS:
            raise UserError(f"backend {self.backend!r}: choose {' or '.join(BACKENDS)}")
        if self.data is not None and self.data_dir is not None:
            raise UserError("--data and --data_dir: give one of them")
        if world.size > 1 and self.backend == "vllm":
            raise UserError("--backend vllm: vLLM starts its own processes; run one, with --tensor_parallel N")
        if world.size > 1 and self.parallelize:
            raise UserError("--parallelize: spreads one copy over all GPUs; run one process, or leave it out")


@dataclass(frozen=True)
class Subject:
    """Who is scored: an adapter on its base, or a base alone."""

    base: str
    adapter: Path | None

    def describe_adapter(self) -> dict[str, Any] | None:
        """Return folder, method and hash of the adapter."""
        if self.adapter is None:
            return None
        file = self.adapter / WEIGHTS_NAME
        return {
            "folder": str(self.adapter),
            "peft_type": read_config(self.adapter)["peft_type"],
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        }

    def identity(self, options: ScoreOptions) -> dict[str, Any]:
        """Return what decides the answer to a prompt, apart from the prompt and the generation settings."""
        folder = resolve_base(self.base)
        adapter = self.describe_adapter()
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        files = [(file.resolve().name, file.stat().st_size) for file in sorted(folder.glob("*.safetensors"))]
        return {
            "adapter": adapter and [adapter["sha256"], json.dumps(read_config(self.adapter), sort_keys=True)],  # type: ignore[arg-type]
            "base": [config, files, [file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))]],
            "dtype": options.dtype,
            "backend": options.backend,
            "seed": options.seed,
        }


@dataclass
class Job:
    """One task with its data, requests and output folder."""

    task: ScoringTask
    data: str
    template: str | None
    out: Path | None
    loaded: Any
    requests: list[Any]
    identity: str
    seconds: float

    @property
    def cache_folder(self) -> Path | None:
        """Where the answers of an unfinished scoring are."""
        return None if self.out is None else self.out.with_name(f".{self.out.name}.answers")

    def finished(self) -> dict[str, Any] | None:
        """Return the result in `out`, if it is this job's."""
        file = None if self.out is None else self.out / RESULT_NAME
        if file is None or not file.is_file():
            return None
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None
        return result if isinstance(result, dict) and result.get("identity") == self.identity else None


def settle(
    adapter: str | os.PathLike[str] | None,
    tasks: Sequence[ScoringTask],
    base: str | None,
    world: World,
    options: ScoreOptions,
) -> tuple[Subject, ScoreOptions]:
    """Check arguments and settle the template."""
    options.check(world)
    if options.data is not None and len(tasks) > 1:
        raise UserError("--data is one task's data; with several tasks pass --data_dir FOLDER")
    folder = None if adapter is None else find_adapter(adapter)
    base = base or (None if folder is None else read_config(folder).get("base_model_name_or_path"))
    if not base:
        raise UserError("no base model named; pass --base MODEL")
    if any(task.generates and not task.stock for task in tasks):
        template = options.template or trained_template(folder or Path(base))
        if template is None:
            template = DEFAULT_TEMPLATE
            if world.rank == 0:
                print(
                    f"polar: note: nothing beside {adapter or base} says which prompts it was trained on, so {template}"
                    " is used; --template NAME changes it",
                    file=sys.stderr,
                )
        load_template(template)  # a wrong name should not wait for imports and weights
        options = replace(options, template=template)
    if options.backend == "vllm":
        from polar_eval.vllm_backend import import_vllm

        import_vllm()
    return Subject(base, folder), options


def prepare(
    subject: Subject,
    tasks: Sequence[ScoringTask],
    outs: Sequence[str | os.PathLike[str] | None],
    options: ScoreOptions,
) -> list[Job]:
    """Read the data of all tasks and write their prompts."""
    sources = [find_data(task, options.data, options.data_dir) for task in tasks]
    try:
        from polar_eval.harness import LoadedTask
    except ModuleNotFoundError as error:
        raise UserError(f"polar eval needs {error.name}; install it: pip install 'polar[eval]'") from error
    who = subject.identity(options)
    jobs = []
    for task, out, data in zip(tasks, outs, sources, strict=True):
        begin = time.perf_counter()
        template = options.template if task.generates and not task.stock else None
        loaded = LoadedTask(task, template, data)
        requests = loaded.prepare(options.max_new_tokens, options.limit, options.seed)
        decisive = [who, task.name, loaded.version, loaded.generation, prompt_facts(requests)["prompt_sha256"]]
        identity = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
        target = None if out is None else Path(out)
        seconds = time.perf_counter() - begin
        jobs.append(Job(task, data, template, target, loaded, requests, identity, seconds))
    return jobs
