"""Imports point one way, and `import polar` stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lowest first. A module may import those below it, never those above. Others (data, export, ...) are free, except that
# nothing imports train.
LAYERS = ("errors", "files", "stiefel", "shards", "engine_state", "checkpoint", "factor_batch", "constrain")
LAYERS += ("resume", "trainer", "train", "cli")
HEAVY = ("deepspeed", "trl", "lm_eval", "datasets", "matplotlib")
# Each third-party engine is imported in one place; deepspeed nowhere at module level.
MAX_EXTRA_IMPORT_S = 0.2


def _modules() -> dict[str, Path]:
    files = [*(ROOT / "polar").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        names[name.replace("eval", "polar_eval", 1) if parts[0] == "eval" else name] = path
    return names


def _imports(path: Path, module_level_only: bool) -> set[str]:
    """Dotted names that a file imports; `from a.b import c` gives a.b and a.b.c."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in type_checking or (module_level_only and id(node) in functions):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_layers_import_downwards_only() -> None:
    modules = _modules()
    assert {f"polar.{layer}" for layer in LAYERS} <= modules.keys()
    for level, layer in enumerate(LAYERS):
        above = {f"polar.{name}" for name in LAYERS[level + 1 :]}
        assert not _imports(modules[f"polar.{layer}"], module_level_only=False) & above, layer


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("", ("polar.train", "polar.cli")),  # the empty name: every module but the commands themselves
        ("polar.tuner", ("polar.build_model", "polar.trainer", "polar.constrain")),
        ("polar.build_model", ("polar.trainer",)),
        ("polar.stiefel", ("torch.distributed", "torch.nn", "deepspeed")),
    ],
)
def test_nobody_imports_what_uses_it(importer: str, forbidden: tuple[str, ...]) -> None:
    commands = ("polar.cli", "polar.train")
    for name, path in _modules().items():
        if name.startswith(importer) if importer else name not in commands:
            assert not _imports(path, module_level_only=False) & set(forbidden), name


def test_deepspeed_is_imported_inside_functions_only() -> None:
    for name, path in _modules().items():
        roots = {imported.partition(".")[0] for imported in _imports(path, module_level_only=True)}
        assert "deepspeed" not in roots, name


def test_import_polar_is_light() -> None:
    """One process: what `import polar` adds after `import peft`, in modules and in seconds; the best of three."""
    code = (
        "import sys, time, json, peft\n"
        "before = set(sys.modules)\n"
        "begin = time.process_time()\n"
        "import polar\n"
        "seconds = time.process_time() - begin\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules)}\n"
        "print(json.dumps([seconds, sorted(roots)]))\n"
    )
    seconds = []
    for _ in range(3):
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        used, roots = json.loads(output)
        assert not set(HEAVY) & set(roots)
        seconds.append(used)
        if used <= MAX_EXTRA_IMPORT_S:
            break
    assert min(seconds) <= MAX_EXTRA_IMPORT_S
