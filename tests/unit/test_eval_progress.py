"""What is shown while scoring where no terminal is: a line now and then, on the first process only."""

from __future__ import annotations

import pytest

from polar_eval import progress
from polar_eval.progress import Progress


@pytest.mark.parametrize("shown", [True, False])
def test_lines_come_every_half_minute(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    counter = Progress("gsm8k", 1000, shown)
    for _ in range(10):
        now[0] += 10
        counter.advance(100)
    counter.close()
    lines = capsys.readouterr().err.splitlines()
    expected = [f"gsm8k: {done} of 1000, 10/s, {left} min left" for done, left in ((300, 1), (600, 1), (900, 0))]
    assert lines == (expected if shown else [])
