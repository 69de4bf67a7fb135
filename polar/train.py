"""The training command, top to bottom.

python -m polar.train --config configs/X.yaml [--key value ...]
torchrun --nproc_per_node 2 -m polar.train --config configs/X.yaml
deepspeed --num_gpus 8 --module polar.train --config configs/X.yaml --deepspeed ds_configs/zero3.json
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar.errors import UserError
from polar.launch import (
    end_process,
    from_main_process,
    join_deepspeed,
    local_environment,
    on_all_ranks,
    rank,
    shut_down,
)

if TYPE_CHECKING:
    from polar.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 after one line about what the user can fix.

    Args:
        argv: the command line without the program's name; that of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_packages()
        local_environment(arguments)
        _run(arguments)
    except UserError as error:
        if rank() == 0:
            print(f"polar: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # launchers kill the other processes when one ends: let the main one speak first
        return 2
    finally:
        shut_down()
    return 0


def _check_packages() -> None:
    missing = [name for name in ("accelerate", "datasets", "trl") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training needs {', '.join(missing)}: pip install 'polar[train]'")


def _run(argv: list[str]) -> None:
    from polar.noise import silence_known_noise

    silence_known_noise()
    from polar.run_config import parse_run

    config = parse_run(argv)  # sets up the device, the process group and the DeepSpeed config
    training = config.training
    if training.deepspeed:
        join_deepspeed()
    on_all_ranks(lambda: config.validate(training.world_size))
    check_reporters(training.report_to)

    from polar.build_model import build_model, load_tokenizer, plan_model
    from polar.checkpoint import run_identity
    from polar.run_ranks import compute_missing_ranks, find_ranks
    from polar.summary import describe_run, plan_steps

    find_ranks(config)
    tokenizer = on_all_ranks(lambda: load_tokenizer(config.model, needs_eos=config.glue_task is None))
    plan = on_all_ranks(lambda: plan_model(config))
    data = on_all_ranks(lambda: _prepare_data(config, tokenizer))
    steps = plan_steps(config, len(data.train))
    identity = on_all_ranks(lambda: run_identity(config, data.report["fingerprint"]))
    checkpoint = from_main_process(lambda: _find_checkpoint(config, identity)) if training.resume else None
    if rank() == 0:
        print(describe_run(config, plan, data, steps), flush=True)
    if training.dry_run or (training.resume and _is_finished(config)):
        return

    computed = compute_missing_ranks(config)
    if computed and rank() == 0:
        print(computed, flush=True)
    model = on_all_ranks(lambda: build_model(config))
    _open_folder(config, data.report, checkpoint)
    trainer = _make_trainer(config, model, tokenizer, data, identity)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stop.reason:
        if rank() == 0:
            trainer.stop.honoured()
            print(_stopped(trainer), flush=True)
        return
    trainer.finish()
    _close_folder(config, trainer)


def _prepare_data(config: RunConfig, tokenizer: Any) -> Any:
    training = config.training
    if config.glue_task is not None:
        from polar.glue_data import prepare_glue

        return prepare_glue(config.data, config.glue_task, tokenizer, training.max_length)
    from polar.data import prepare

    return prepare(config.data, tokenizer, training.max_length, training.seed)


def _is_finished(config: RunConfig) -> bool:
    """Tell whether the run in the folder has reached its end; says so on the main process."""
    from polar.run_folder import read_done

    done = read_done(Path(config.training.output_dir))
    if done is not None and rank() == 0:
        print(f"nothing to do: this run was finished at step {done['step']} (done.json)", flush=True)
    return done is not None


def _stopped(trainer: Any) -> str:
    state = trainer.state
    return (
        f"stopped at step {state.global_step} of {state.max_steps} by {trainer.stop.reason}: "
        f"{trainer.args.output_dir}/checkpoint-{state.global_step} is saved; the same command with --resume continues"
    )


def _close_folder(config: RunConfig, trainer: Any) -> None:
    """Write done.json, the last file of a run. Collective."""
    from polar.files import write_json
    from polar.run_folder import DONE
    from polar.summary import engine_name

    outcome = {**trainer.outcome(), "engine": engine_name(config)}
    if rank() == 0:
        trainer.stop.honoured()  # asked too late to stop anything
        write_json(Path(config.training.output_dir) / DONE, outcome)
        print(f"adapter of step {trainer.adapter_step}: {trainer.adapter_folder}", flush=True)


def check_reporters(report_to: list[str]) -> None:
    """Refuse a tracker whose package is missing, before anything is loaded.

    Raises:
        UserError: with the line that installs it.
    """
    for name in report_to:
        package = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"report_to {name}: the package is not installed: pip install {package}")


def _find_checkpoint(config: RunConfig, identity: dict[str, Any]) -> Path | None:
    """Return the checkpoint that --resume continues from, None to start afresh; says which. On the main process.

    Raises:
        UserError: the checkpoint, or the run in the folder, was made with other settings.
    """
    from polar.checkpoint import check_same_run, find_checkpoint, read_state, settings_of

    folder = Path(config.training.output_dir)
    checkpoint = find_checkpoint(folder, lambda line: print(line, flush=True))
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_same_run(checkpoint, state["settings"], identity)
        processes = f"{state['world_size']} process{'es' * (state['world_size'] > 1)}"
        print(
            f"resuming from {checkpoint}: step {state['step']} of {state['max_steps']}, made by {processes}", flush=True
        )
        return checkpoint
    if (folder / "config.yaml").is_file():  # never replace another run because it has no checkpoint
        earlier = settings_of((folder / "config.yaml").read_text(encoding="utf-8"))
        check_same_run(folder, earlier, {k: v for k, v in identity.items() if k not in ("base", "data")})
    print(f"no checkpoint to resume from in {folder}: starting afresh", flush=True)
    return None


def _open_folder(config: RunConfig, data_report: dict[str, Any], checkpoint: Path | None) -> None:
    from polar.checkpoint import read_state
    from polar.files import write_json
    from polar.run_folder import collect_provenance, continue_run_folder, open_run_folder
    from polar.run_ranks import RANKS_NAME
    from polar.summary import engine_name

    training = config.training

    def open_it() -> None:
        if rank() == 0:
            provenance = collect_provenance(training.world_size, str(training.device), engine_name(config))
            ranks = config.adapter.ranks
            if ranks is not None:
                provenance["ranks"] = ranks.provenance()
            folder = Path(training.output_dir)
            if checkpoint is None:
                open_run_folder(folder, config.to_yaml(), data_report, provenance)
                if ranks is not None:
                    write_json(folder / RANKS_NAME, ranks.content)
            else:
                provenance["checkpoint"] = checkpoint.name
                metrics_bytes = read_state(checkpoint)["logging"]["metrics_bytes"]
                continue_run_folder(folder, config.to_yaml(), provenance, metrics_bytes)

    on_all_ranks(open_it)


def _make_trainer(config: RunConfig, model: Any, tokenizer: Any, data: Any, identity: dict[str, Any]) -> Any:
    manifold = {key: value for key, value in vars(config.manifold).items() if value is not None}
    second_moment = manifold.pop("second_moment")
    options = {
        "model": model,
        "args": config.training,
        "train_dataset": data.train,
        "eval_dataset": data.validation,
        "processing_class": tokenizer,
        "manifold": manifold,
        "second_moment": second_moment,
        "theta_learning_rate": config.training.theta_learning_rate,
        "run_identity": identity,
    }
    if config.glue_task is not None:
        from polar.glue_trainer import PolarGlueTrainer, about_run

        return PolarGlueTrainer(task=config.glue_task, parts=data.parts, about=about_run(config, data), **options)
    from polar.trainer import PolarSFTTrainer

    return PolarSFTTrainer(**options)


if __name__ == "__main__":
    end_process(main())
