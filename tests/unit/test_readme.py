"""README shows what the result files say, and names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_numbers_and_engines_are_those_of_the_result_files_and_of_the_code() -> None:
    assert readme.with_generated_parts(TEXT) == TEXT


def test_every_module_of_the_package_is_in_the_flow_and_every_named_file_exists() -> None:
    table = TEXT.partition("## The flow")[2]
    named = set(re.findall(r"`(?:polar/)?([a-z0-9_]+\.py)`", table))
    modules = {path.name for path in (ROOT / "polar").glob("*.py")} - {"__init__.py"}
    assert modules <= named
    for path in re.findall(r"`((?:polar|eval|demo|benchmarks|tests|configs|ds_configs)/[\w./*-]*)`", TEXT):
        assert list(ROOT.glob(path.rstrip("/"))), path
