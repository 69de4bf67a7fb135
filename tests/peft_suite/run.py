"""Run PEFT's own test suite on POLAR.

The sdist of the installed PEFT version holds its tests; it is downloaded once into .cache/. Tables of cases get rows
for POLAR when pytest collects them (plugin.py, cases.py); two modules that are written for LoRA and LoKr run a second
time under our names. Where a test loads a model from the hub it finds a tiny random one of the same architecture.

Exit code 0: every test that applies to POLAR passed, or failed as `cases.py` says with a reason.

    python tests/peft_suite/run.py [arguments for pytest]
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from cases import RENAMED_MODULES
from fake_hub import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Modules that exercise any tuner. Left out, since they test one other method, a GPU, or a tokenizer or data set of the
# hub: test_<method>.py, test_gpu_examples, test_common_gpu, test_stablediffusion, test_vision_models, ...
MODULES = [
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_config.py",
    "test_polar_lora_conversion.py",
    "test_polar_low_level_api.py",
]


def main(arguments: list[str]) -> int:
    version = importlib.metadata.version("peft")
    cache = ROOT / ".cache" / "peft_suite"
    tests = fetch_tests(version, cache)
    rename_modules(tests)
    build(cache / "hub")
    environment = {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
    }
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), f"--rootdir={tests.parent}"]
    command += [
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-n",
        "2",
        "--dist",
        "worksteal",
        "-q",
        "--tb=short",
        *arguments,
    ]
    command += [str(tests / name) for name in MODULES]
    return subprocess.run(command, cwd=tests.parent, env=environment, check=False).returncode


def fetch_tests(version: str, cache: Path) -> Path:
    """Return the folder with the tests of this PEFT version, downloading the sdist where it is not there yet."""
    tests = cache / f"peft-{version}" / "tests"
    sdist = cache / f"peft-{version}.tar.gz"
    if not sdist.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Building metadata would install PEFT's build requirements; those that are installed will do.
        options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--quiet", "--dest", str(cache)]
        command = [sys.executable, "-m", "pip", "download", *options, f"peft=={version}"]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"peft_suite: cannot download the sdist of peft=={version}; put it into {cache} by hand")
    if not tests.exists():
        with tarfile.open(sdist) as archive:
            archive.extractall(cache, filter="data")
    (tests / "__init__.py").touch()  # the tests import each other relatively; the sdist lacks this file
    return tests


def rename_modules(tests: Path) -> None:
    """Write the modules of RENAMED_MODULES as test_polar_*.py with the other method's names replaced."""
    for name, replacements in RENAMED_MODULES.items():
        text = (tests / name).read_text(encoding="utf-8")
        for old, new in replacements:
            if old not in text:
                raise SystemExit(f"peft_suite: {old!r} is not in {name} any more; adapt RENAMED_MODULES in cases.py")
            text = text.replace(old, new)
        text = text.replace("\nfrom peft import (", "\nfrom polar import PolarConfig\nfrom peft import (", 1)
        (tests / name.replace("test_", "test_polar_", 1)).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
