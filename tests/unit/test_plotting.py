"""Every plot is written in one place: whole or not at all, with nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar import plotting
from polar.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    figure = plotting.new_figure(2, 1, dpi=20)
    plotting.tidy(figure.add_subplot())
    plotting.save_figure(figure, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    broken = plotting.new_figure(2, 1, dpi=20)
    broken.add_subplot().set_title("$\\notatexcommand{$")
    with pytest.raises(ValueError, match="notatexcommand"):
        plotting.save_figure(broken, path)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == ["plot.png"]


def test_nobody_else_saves_a_figure() -> None:
    for file in [*ROOT.glob("polar/**/*.py"), *ROOT.glob("eval/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        text = file.read_text(encoding="utf-8")
        assert file.name == "plotting.py" or not (".savefig(" in text or "pyplot" in text), file


def test_without_matplotlib_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'polar\[plots\]'"):
        plotting.require_matplotlib()


def test_module_types_keep_their_usual_order() -> None:
    assert plotting.ordered_types(["a.zeta", "l.0.down_proj", "l.1.q_proj", "l.0.q_proj", "l.0.Alpha"]) == [
        *("q_proj", "down_proj", "Alpha", "zeta")
    ]
