"""Run the suite's `run.py`, unchanged, in a process in which PEFT knows the method POLAR.

PEFT learns of a method by an import, and the suite imports PEFT alone. So this imports polar and then does what
`python run.py ARGUMENTS` does in the current folder: the same arguments, `__main__` and first place to import from.

Usage: cd CHECKOUT/method_comparison/MetaMathQA; python .../benchmarks/leaderboard/with_polar.py ARGUMENTS
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

SCRIPT = "run.py"


def run_unchanged(arguments: list[str]) -> None:
    """Run `run.py` of the current folder with these arguments; ends as it ends."""
    folder = str(Path.cwd())
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import polar  # noqa: F401  registers POLAR with PEFT

    sys.path[0] = folder
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    run_unchanged(sys.argv[1:])
