"""Real public data that a clone does not hold: a folder beside the repository, or POLAR_SHARED_DATA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def shared_data(name: str) -> Path:
    """Return a folder of the real data, e.g. "gsm8k"; skip where it is not there, fail where it must be (in CI)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("POLAR_SHARED_DATA", default))
    if not folder.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} must exist in CI; POLAR_SHARED_DATA names another place")
        pytest.skip(f"no real data: {folder} does not exist")
    return folder / name


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
