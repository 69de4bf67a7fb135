"""Answers survive a killed process, and never reach another adapter, prompt or setting."""

from __future__ import annotations

from pathlib import Path

from polar_eval.sample_cache import SampleCache


def test_written_answers_are_read_again_by_any_process(tmp_path: Path) -> None:
    for rank in range(2):
        cache = SampleCache(tmp_path / "answers", {"adapter": "a"}, rank)
        cache.add([(cache.key("generate", f"prompt {rank}"), [f"text {rank} \u2028 \U0001f600", False])])
        cache.close()
    other = SampleCache(tmp_path / "answers", {"adapter": "a"}, 5)
    known = other.read()
    assert known[other.key("generate", "prompt 1")] == ["text 1 \u2028 \U0001f600", False]
    assert len(known) == 2
    other.remove()
    assert not (tmp_path / "answers").exists()


def test_a_torn_line_is_left_out_and_the_file_goes_on(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, {})
    cache.add([("a", 1), ("b", 2)])
    cache.close()
    file = tmp_path / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    again = SampleCache(tmp_path, {})
    assert again.read() == {"a": 1}
    again.add([("c", 3)])
    again.close()
    assert SampleCache(tmp_path, {}).read() == {"a": 1, "c": 3}


def test_key_depends_on_everything_that_decides_the_answer() -> None:
    settings = {"limit": 8, "stops": ["x"]}
    keys = {
        SampleCache(None, {"adapter": adapter, "dtype": dtype}).key(kind, prompt, limit)
        for adapter in ("a", None)
        for dtype in ("float32", "bfloat16")
        for kind in ("generate", "loglikelihood")
        for prompt in ("p", "q")
        for limit in (settings, {**settings, "limit": 9})
    }
    assert len(keys) == 32
    same = [SampleCache(None, {"adapter": "a"}, rank).key("generate", "p", dict(settings)) for rank in range(2)]
    assert same[0] == same[1]


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = SampleCache(None, {})
    cache.add([("a", 1)])
    assert cache.read() == {} and not list(tmp_path.iterdir())
