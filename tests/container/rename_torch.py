"""Give the installed torch another version number, in its metadata and in `torch.__version__`."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path


def main(version: str) -> None:
    """Rename torch to `version`."""
    distribution = importlib.metadata.distribution("torch")
    folder = Path(str(distribution.locate_file(f"torch-{distribution.version}.dist-info")))
    target = folder.with_name(f"torch-{version}.dist-info")
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    renamed = metadata.replace(f"Version: {distribution.version}\n", f"Version: {version}\n", 1)
    assert renamed != metadata, "METADATA names no version"
    shutil.copytree(folder, target)  # a folder of another layer cannot be renamed
    (target / "METADATA").write_text(renamed, encoding="utf-8")
    record = (folder / "RECORD").read_text(encoding="utf-8")
    (target / "RECORD").write_text(record.replace(folder.name, target.name), encoding="utf-8")
    shutil.rmtree(folder)
    source = Path(str(distribution.locate_file("torch/version.py")))
    text, count = re.subn(r"^__version__ = .*$", f"__version__ = {version!r}", source.read_text(), flags=re.M)
    assert count == 1, f"{source} has {count} lines with a version"
    source.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
