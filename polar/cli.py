"""The `polar` command: names the commands and hands over to the module that does the work, imported only then."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from polar.errors import UserError

# command -> (module with add_arguments(parser) and run(args), extra that it needs, what it does)
COMMANDS = {
    "export": ("polar.export", "eval", "write an adapter as plain LoRA, or merged into its base"),
    "convert": ("polar.convert", "eval", "write any low-rank adapter as PoLAR, also of lower rank"),
    "combine": ("polar.combine", "eval", "write the weighted sum of adapters as PoLAR"),
    "spectrum": (
        "polar.spectrum_command",
        "plots",
        "spectra and subspaces of adapters or checkpoints, with plots",
    ),
    "ranks": ("polar.ranks", "plots", "choose adapter ranks from the spectra of a base model"),
    "eval": ("polar_eval.command", "eval", "score an adapter with lm-eval"),
    "report": ("polar_eval.report", "plots", "compare runs: tables and plots"),
}
TRAIN_HELP = "train an adapter; also: torchrun ... -m polar.train, deepspeed ... --module polar.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polar COMMAND ...` and return its exit code: 0, or 2 after one line about what the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command == "train":
        from polar import train

        return train.main(arguments[1:])
    try:
        return _dispatch(command, arguments)
    except UserError as error:
        print(f"polar: error: {error}", file=sys.stderr)
        return 2


def _dispatch(command: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="polar", description="PoLAR fine-tuning of large language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help=TRAIN_HELP, add_help=False)
    module = None
    for name, (module_name, extra, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, description=text)
        if name == command:
            module = _import(name, module_name, extra)
            module.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    if module is not None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        module.run(parsed)
    return 0


def _import(command: str, module_name: str, extra: str):  # type: ignore[no-untyped-def]  # a module, duck-typed
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("polar", "polar_eval") and error.name != "polar_eval":
            raise
        raise UserError(f"polar {command} needs {error.name}: pip install 'polar[{extra}]'") from error


def command() -> NoReturn:
    """Run the command line of this process."""
    from polar.launch import end_process

    end_process(main())


if __name__ == "__main__":
    command()
