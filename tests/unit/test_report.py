"""The report shows what the folders hold: each number is recomputed here from what was written there."""

from __future__ import annotations

import argparse
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from polar import cli
from polar.errors import UserError
from polar_eval.compare import all_scores, rows_of
from polar_eval.page import Page, to_markdown
from polar_eval.published import published_for
from polar_eval.read_runs import Found, read_results
from polar_eval.report import add_arguments, run
from polar_eval.sections import result_section, score_section, suites_of
from tests.report_runs import write_run, write_score, write_sweep

ROOT = Path(__file__).parents[2]
VALUES = {
    **{("POLAR", "boolq", seed): value for seed, value in enumerate((0.871, 0.880, 0.874))},
    **{("POLAR", "piqa", seed): value for seed, value in enumerate((0.82, 0.81, 0.84))},
    **{("LORA", "boolq", seed): value for seed, value in enumerate((0.84, 0.85))},
    ("LORA", "piqa", 0): 0.815,
}


def report(folders: list[Path], out: Path, *options: str) -> Path:
    """What `polar report` does with its arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([*map(str, folders), "--out", str(out), *options]))
    return out / "report.md"


def tables(page: str, heading: str) -> list[list[dict[str, str]]]:
    """The tables under a heading, each as its rows."""
    found: list[list[list[str]]] = [[]]
    for line in page.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [[dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]] for lines in found if lines]


def scores_of(*folders: Path, heading: str = "Commonsense reasoning") -> tuple[list[list[dict[str, str]]], Found]:
    """Tables of scores and differences, without any plot, and what was read."""
    found = read_results(folders)
    rows = rows_of(all_scores(found.runs, found.problems), found.problems)
    sections = [score_section(suite) for suite in suites_of(rows)] + [result_section(found.runs)]
    return tables(to_markdown(Page("", sections)), heading), found


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    root = write_sweep(tmp_path_factory.mktemp("sweep"), VALUES)
    write_score(root / "polar_boolq_0" / "eval_boolq_base", "boolq", 0.7, None)
    write_score(root / "lora_boolq_0" / "eval_boolq_base", "boolq", 0.7, None)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A small report with every plot; its folder had a plot of an older report, and a file of somebody else's."""
    root, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("out")
    polar = write_run(root / "polar", "POLAR", checkpoints=(20, 30))
    write_score(polar / "eval_boolq", "boolq", 0.85, polar)
    by_layer = {f"model.layers.{layer}.q_proj": r for layer, r in enumerate((4, None, 16))}
    modules = {name: {"r": r, "selected": r is not None} for name, r in by_layer.items()}
    ranks = {"format": "polar-ranks-1", "r": 16, "alpha": 32, "target_modules": "x", "rank_pattern": {}}
    lora = write_run(root / "lora", "LORA")
    (lora / "ranks.json").write_text(json.dumps({**ranks, "alpha_pattern": {}, "modules": modules}))
    (root / "broken").mkdir()
    (root / "broken" / "results.json").write_text("{")
    (out / "stable_rank_logged.png").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    report([root], out, "--title", "Two runs & more")
    return out


def row(table: list[dict[str, str]], **cells: str) -> dict[str, str]:
    """The only row with these cells."""
    found = [line for line in table if all(line.get(key) == value for key, value in cells.items())]
    assert len(found) == 1, (cells, table)
    return found[0]


def text_of(value: float, error: float) -> str:
    digits = 2 if error < 0.095 else 1
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def test_runs_that_differ_in_their_seed_are_one_row(sweep) -> None:
    (scores, _), found = scores_of(sweep)
    assert found.problems == []
    polar = row(scores, method="PoLAR", source="this report")
    by_task = {task: 100 * np.array([v for (m, t, _), v in VALUES.items() if (m, t) == ("POLAR", task)])
               for task in ("boolq", "piqa")}  # fmt: skip
    for task, title in (("boolq", "BoolQ"), ("piqa", "PIQA")):
        assert polar[title] == text_of(by_task[task].mean(), by_task[task].std(ddof=1) / np.sqrt(3))
    assert (polar["seeds"], polar["r"], polar["median stable rank"]) == ("3", "4", "3.25")
    assert (polar["training time"], polar["peak memory, GiB"]) == ("61 s", "1.50")
    assert polar["trainable parameters"] == f"{4 * (12 * 4 + 10 * 4 + 4 * 4):,}"


def test_one_seed_has_the_error_of_its_task(sweep) -> None:
    (scores, _), _ = scores_of(sweep)
    lora = row(scores, method="LoRA", source="this report")
    assert lora["PIQA"] == text_of(81.5, 100 * np.sqrt(0.815 * 0.185 / 399)) + " (n = 1)"
    assert lora["BoolQ"] == text_of(84.5, np.std([84, 85], ddof=1) / np.sqrt(2)) + " (n = 2)"
    assert lora["seeds"] == "1-2"


def test_average_is_over_all_tasks_of_the_model_or_absent(sweep, tmp_path) -> None:
    write_sweep(tmp_path, {key: value for key, value in VALUES.items() if key[0] == "POLAR"})
    for task in ("social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"):
        write_sweep(tmp_path, {("POLAR", task, seed): 0.5 + 0.01 * seed for seed in range(3)})
    (scores, _), _ = scores_of(tmp_path)
    two = [[VALUES["POLAR", task, seed] for task in ("boolq", "piqa")] for seed in range(3)]
    per_seed = [100 * np.mean([*two[seed], *[0.5 + 0.01 * seed] * 6]) for seed in range(3)]
    average = text_of(np.mean(per_seed), np.std(per_seed, ddof=1) / np.sqrt(3))
    assert row(scores, method="PoLAR", source="this report")["average"] == average
    (scores, _), _ = scores_of(sweep)  # two tasks, where the published rows have eight
    assert row(scores, method="PoLAR", source="this report")["average"] == "-"


def test_published_numbers_stand_beside_ours_with_their_source(sweep) -> None:
    (scores, _), _ = scores_of(sweep)
    link = "[PoLAR, code](https://github.com/kcc-lion/polar)"
    published = row(scores, method="PoLAR", source=link)
    assert (published["r"], published["BoolQ"], published["WinoGrande"]) == ("4", "87.49", "81.77")
    assert published["average"] == "73.26"
    assert {line["r"] for line in scores if line["source"] == link} == {"4"}, "other ranks than ours"
    assert row(scores, method="base")["BoolQ"].startswith("70.0"), "the base was scored twice and counts once"


def test_differences_inside_two_standard_errors_are_marked(sweep) -> None:
    (_, found), _ = scores_of(sweep)
    mine, error = 100 * np.mean([0.871, 0.880, 0.874]), 100 * np.std([0.871, 0.880, 0.874], ddof=1) / np.sqrt(3)
    cell = row(found, difference="PoLAR - published PoLAR")["BoolQ"]
    assert abs(mine - 87.49) < 2 * error
    assert cell == f"{mine - 87.49:+.1f} ± {error:.1f} ≈"
    lora_error = np.std([84, 85], ddof=1) / np.sqrt(2)
    cell = row(found, difference="PoLAR - LoRA")["BoolQ"]
    assert cell == f"{mine - 84.5:+.1f} ± {np.hypot(error, lora_error):.1f}", "outside: no mark"


def test_other_settings_stay_apart_and_are_named(tmp_path) -> None:
    for name, rate, seed in (("a", 4e-4, 0), ("b", 4e-4, 1), ("c", 8e-4, 0), ("d", 8e-4, 0)):
        folder = write_run(tmp_path / name, "POLAR", seed, learning_rate=rate, task="boolq", logging_steps=seed + 1)
        write_score(folder / "eval_boolq", "boolq", 0.8 + seed / 100, folder)
    (scores, *_), found = scores_of(tmp_path)
    ours = [line for line in scores if line["source"] == "this report"]
    assert {(line["settings"], line["seeds"]) for line in ours} == {
        ("learning_rate 0.0004", "2"),
        ("learning_rate 0.0008", "1"),
    }
    assert found.problems == ["d: boolq 80.00 left out: same settings and seed as c"]


def test_glue_and_stock_tasks(tmp_path) -> None:
    folder = write_run(tmp_path / "a", "POLAR")
    columns = {"matthews": {"value": 0.68, "stderr": None}, "accuracy": {"value": 0.9, "stderr": 0.01}}
    write_score(folder / "eval_glue_cola", "glue_cola", 0.5, folder, headline="matthews", columns=columns)
    other = {"word_perplexity,none": {"value": 12.5, "stderr": None}, "acc,none": {"value": 0.5, "stderr": 0.05}}
    write_score(folder / "eval_x", "lm_eval:x", 0.5, folder, headline=None, columns=other)
    (scores,), _ = scores_of(tmp_path, heading="GLUE")
    assert scores[0]["CoLA (Matthews)"] == "68.0"
    (scores,), _ = scores_of(tmp_path, heading="Other tasks")
    assert (scores[0]["lm_eval:x word_perplexity,none"], scores[0]["lm_eval:x acc,none"]) == ("12.5", "50.0 ± 5.0")
    (lines,), _ = scores_of(tmp_path, heading="Each result")
    assert row(lines, number="accuracy")["value"] == "90.0 ± 1.0"
    assert row(lines, number="word_perplexity,none")["value"] == "12.5"


def test_scores_find_their_run_and_each_folder_is_read_once(sweep, tmp_path) -> None:
    owner = write_run(tmp_path / "run", "POLAR")
    outside = write_score(tmp_path / "scores" / "boolq", "boolq", 0.9, owner)
    lonely = write_score(tmp_path / "lonely", "boolq", 0.6, Path("nowhere"))
    found = read_results([outside, lonely, lonely / "results.json"])
    assert [(one.method, one.r, len(one.results)) for one in found.runs] == [("PoLAR", "4", 1), ("PoLAR", "", 1)]
    both = read_results([sweep, sweep / "polar_boolq_0", sweep / "polar_boolq_0" / "eval_boolq"])
    assert len(both.runs) == len(VALUES)
    alone = read_results([sweep / "polar_boolq_0" / "eval_boolq"])
    assert [(one.name, len(one.results)) for one in alone.runs] == [("polar_boolq_0", 1)]


def test_the_papers_own_checkpoint_is_polar(tmp_path) -> None:
    """Its config says LORA; a lora_S among the tensors is Theta. Scored in its folder, without a run."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "parameterize_S": "identity"}
    stem = "base_model.model.model.layers.0.q_proj"
    tensors = {
        f"{stem}.lora_B.weight": torch.eye(12, 4),
        f"{stem}.lora_A.weight": torch.eye(4, 10),
        f"{stem}.lora_S.weight": torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5])),
    }
    write_score(tmp_path / "eval_boolq", "boolq", 0.9, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (only,) = read_results([tmp_path]).runs
    assert (only.method, only.r, only.stable_ranks) == ("PoLAR", "4", [pytest.approx(3.25)])


def test_what_cannot_be_read_is_a_line_each(tmp_path) -> None:
    good = write_run(tmp_path / "good", "POLAR")
    write_score(good / "eval_boolq", "boolq", 0.9, good)
    write_score(good / "eval_piqa", "piqa", 0.9, good).joinpath("results.json").write_text('{"accuracy": 1}')
    with (good / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (write_run(tmp_path / "stopped", "POLAR", checkpoints=(20,)) / "done.json").unlink()
    cut = write_run(tmp_path / "cut", "LORA") / "adapter" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    (write_run(tmp_path / "lost", "LORA") / "adapter" / "adapter_config.json").unlink()
    found = read_results([tmp_path, tmp_path / "missing"])
    assert [one.name for one in found.runs] == ["cut", "good"]
    for part in (
        r"cut/adapter/adapter_model\.safetensors: .*save the adapter again",
        r"cut: not scored; `polar eval",
        r"good/metrics\.jsonl:10: not readable",
        r"good/eval_piqa/results\.json: not a result of polar eval",
        r"stopped: not finished \(newest is checkpoint-20\), left out",
        r"lost: left out: ",
        r"missing: no such folder",
    ):
        assert any(re.search(part, problem) for problem in found.problems), (part, found.problems)
    assert all("\n" not in problem for problem in found.problems)


def test_nothing_to_report_exits_2_in_one_line(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == f"polar: error: nothing to report: {tmp_path / 'empty'}: no run and no score in it\n"
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_nothing_is_written(sweep, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'polar\[plots\]'"):
        report([sweep], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_spectra_and_ranks(written) -> None:
    page = (written / "report.md").read_text()
    polar = row(tables(page, "Training")[0], run="polar")
    assert (polar["steps"], polar["training time"], polar["starts"], polar["engine"]) == ("40", "61 s", "2", "FSDP2")
    assert (polar["last loss"], polar["best validation loss"]) == ("0.0500", "0.1250")
    assert polar["largest orthonormality error"] == "4.0e-06"
    stable = {line["run"]: line for line in tables(page, "Stable rank")[0]}
    assert (stable["polar"]["median"], stable["lora"]["largest"]) == ("3.25", "1.00")
    assert tables(page, "Ranks by layer") == [
        [{"layers": "q", "adapted": "2 of 3", "lowest r": "4", "median r": "10", "highest r": "16"}]
    ]
    assert "broken/results.json: not readable as JSON" in page


def test_plots_are_pictures_and_old_ones_go(written) -> None:
    names = re.findall(r"!\[.*?\]\((\w+)\.png\)", (written / "report.md").read_text())
    assert names == [
        "stable_rank",
        "stable_rank_by_type",
        "stable_rank_evolution",
        "ranks_1",
        "loss",
        "orthonormality_error",
    ]
    for name in names:
        data = (written / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", data[16:24])) > 200
        assert "<svg" in (written / f"{name}.svg").read_text()
    expected = {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == expected | {"report.md", "report.html", "notes.txt"}


class Reader(HTMLParser):
    """Elements, text and ids of a page; open elements must be closed in order."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def html(written) -> Reader:
    reader = Reader()
    reader.feed((written / "report.html").read_text())
    assert reader.open == []
    return reader


def test_html_needs_nothing_from_elsewhere(html, written) -> None:
    for tag, attributes in html.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "srcset", "data", "action", "poster", "style", "fill", "stroke"):
            assert "//" not in attributes.get(name, ""), (tag, attributes)
        if "href" in attributes and tag != "a":
            assert attributes["href"].startswith(("#", "data:image/png;base64,")), (tag, attributes["href"][:40])
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", (written / "report.html").read_text(), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    policy = [a["content"] for tag, a in html.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")


def test_html_is_for_phones_and_for_all_readers(html) -> None:
    metas = {a.get("name"): a.get("content") for tag, a in html.elements if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    ids = [a["id"] for _, a in html.elements if "id" in a]
    assert len(ids) == len(set(ids)), "the plots have ids of their own"
    labels = {a["aria-labelledby"] for _, a in html.elements if "aria-labelledby" in a}
    links = {a["href"][1:] for _, a in html.elements if a.get("href", "").startswith("#")}
    assert labels and links and labels | links <= set(ids)
    assert all(a["scope"] == "col" for tag, a in html.elements if tag == "th")
    regions = [a for tag, a in html.elements if a.get("role") == "region"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions), "scrolled by keyboard"
    drawings = [a for tag, a in html.elements if tag == "svg"]
    assert len(drawings) == 6 and all(a["role"] == "img" and "aria-labelledby" in a for a in drawings)


def test_html_says_what_the_markdown_says_and_sorts_it(html, written) -> None:
    text = " ".join(html.texts)
    markdown = re.sub(r"\]\([^)]*\)", "]", (written / "report.md").read_text())  # links lead to files
    numbers = re.findall(r"\d[\d,.]*", markdown)
    assert len(numbers) > 100
    assert not [number for number in numbers if number not in text]
    script = re.findall(r"<script>(.*?)</script>", (written / "report.html").read_text(), re.DOTALL)
    assert len(script) == 1 and "aria-sort" in script[0] and 'createElement("button")' in script[0]
    orders = [float(a["data-order"]) for tag, a in html.elements if tag == "td" and "data-order" in a]
    assert 61.4 in orders, "a time is sorted by its seconds"
    assert "Two runs & more" in text


def test_published_numbers_are_consistent_and_belong_to_the_recipes() -> None:
    llama2 = published_for("meta-llama/Llama-2-7b-hf")
    assert {(entry.method, entry.r) for entry in llama2} == {
        (m, r) for m in ("LoRA", "DoRA", "PoLAR") for r in (4, 8, 16, 32)
    }
    for name in ("commonsense_llama2_7b", "math10k_llama_7b", "commonsense170k_llama3_8b"):
        base = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model_name_or_path"]
        entries = published_for(base)
        assert entries, base
        for entry in entries:
            digits = 0.051 if entry.sources[0] == "lora_ar" else 0.0051
            assert abs(np.mean(list(entry.scores.values())) - entry.average) < digits, entry
    assert published_for("demo/base") == []
