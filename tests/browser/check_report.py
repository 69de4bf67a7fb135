"""`make test-page`: the report's page in a real browser. Needs Debian's chromium, so it is no part of `make test`.

    apt-get install --no-install-recommends chromium

Checks that every column sorts as its values do, that the buttons take the keyboard's focus, that nothing is wider than
the screen of a desktop or a phone, and that the browser finds nothing to complain about. The pictures, light and dark,
are to be looked at.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from polar_eval.read_runs import read_results
from polar_eval.report import write_report
from tests.report_runs import write_score, write_sweep

WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHT = 3000
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Runs inside a copy of the page: sorts every column of every table and leaves what it saw in the document.
PROBE = """
<script>
const seen = {tables: [], overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth};
for (const table of document.querySelectorAll("table")) {
  const rows = () => [...table.tBodies[0].rows];
  const buttons = [...table.querySelectorAll("th button")], written = rows().map((row) => row.textContent);
  const columns = buttons.map((button, column) => {
    button.focus();
    const focused = document.activeElement === button;
    const cells = () => rows().map((row) => row.cells[column]);
    const values = () => cells().map((cell) => [cell.dataset.order ?? null, cell.textContent.trim()]);
    const states = ["ascending", "descending", null].map((state) => {
      button.click();
      return {values: values(), right: button.parentElement.getAttribute("aria-sort") === state};
    });
    const restored = JSON.stringify(rows().map((row) => row.textContent)) === JSON.stringify(written);
    return {focused, restored, states};
  });
  seen.tables.push({rows: written.length, columns});
}
const output = document.createElement("output");
output.id = "seen";
output.textContent = JSON.stringify(seen);
document.body.append(output);
</script>
"""


def chromium(*arguments: str) -> str:
    """Run the browser on a profile of its own; return what it prints."""
    with tempfile.TemporaryDirectory(prefix="polar-page-") as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert done.returncode == 0 and not complaints, done.stderr
    return done.stdout


def make_page(folder: Path) -> Path:
    """A report with several tables, published rows and every kind of plot but ranks."""
    values = {
        (method, task, seed): 0.5 + 0.03 * seed + 0.05 * number + (0.02 if method == "POLAR" else 0)
        for method in ("POLAR", "LORA")
        for number, task in enumerate(("boolq", "piqa", "arc_easy"))
        for seed in range(2)
    }
    write_sweep(folder / "runs", values)
    write_score(folder / "runs" / "base", "boolq", 0.7, None)
    found = read_results([folder / "runs"])
    return write_report(found.runs, folder / "out", "A sweep", problems=found.problems).with_suffix(".html")


def in_frame(page: Path, width: int) -> Path:
    """A page that shows another one at a width; chromium's own windows do not get as narrow as a phone."""
    frame = page.with_name(f"frame_{width}.html")
    style = f"width:{width}px;height:{HEIGHT}px;border:0;display:block"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe></body>')
    return frame


def check_sorting(page: Path) -> int:
    """Compare the order in the browser with Python's; return the number of columns."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = chromium("--window-size=1280,2000", "--virtual-time-budget=2000", "--dump-dom", f"file://{probed}")
    match = re.search(r'<output id="seen">(.*?)</output>', dom, re.DOTALL)
    assert match, "the page's scripts did not run"
    seen = json.loads(html.unescape(match[1]))
    assert seen["overflow"] <= 0, f"the page is {seen['overflow']} px wider than a desktop"
    columns = [column for table in seen["tables"] if table["rows"] > 1 for column in table["columns"]]
    for column in columns:
        assert column["focused"] and column["restored"] and all(state["right"] for state in column["states"])
        for state, sign in zip(column["states"], (1, -1), strict=False):
            texts = [text for _, text in state["values"]]
            numbers = [float(order) for order, _ in state["values"] if order is not None]
            assert numbers == sorted(numbers, reverse=sign < 0), state["values"]
            there = [text not in ("-", "") for text in texts]
            assert there == sorted(there, reverse=True), f"empty cells are not last: {texts}"
    return len(columns)


def check_width(page: Path, width: int) -> None:
    """Nothing but the tables' own scroll areas may be wider than the screen."""
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    frame = in_frame(copy, width)
    script = "<script>onload = () => { document.title = frames[0].document.title }</script>"
    frame.write_text(frame.read_text() + script)
    dom = chromium(
        "--window-size=1280,2000", "--virtual-time-budget=2000", "--allow-file-access-from-files", "--dump-dom",
        f"file://{frame}",
    )  # fmt: skip
    match = re.search(r"<title>(\d+) (\d+)</title>", dom)
    assert match and int(match[2]) == width, dom[:300]
    assert int(match[1]) <= width, f"the page is {match[1]} px wide on a screen of {width}"


def main() -> int:
    """Run the checks and leave the pictures."""
    if shutil.which("chromium") is None:
        print("check_report: needs chromium: apt-get install --no-install-recommends chromium", file=sys.stderr)
        return 2
    pictures = Path("build/page").resolve()
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="polar-page-") as scratch:
        page = make_page(Path(scratch))
        print(f"sorting: {check_sorting(page)} columns up, down and back, by mouse and focus")
        for name, width in WIDTHS.items():
            check_width(page, width)
            print(f"{name}: nothing is wider than {width} px")
            for scheme, number in (("light", 1), ("dark", 0)):
                file = pictures / f"{name}_{scheme}.png"
                size = f"--window-size={max(width, 500)},{HEIGHT}"
                scheme_flag = f"--blink-settings=preferredColorScheme={number}"
                chromium(size, scheme_flag, f"--screenshot={file}", f"file://{in_frame(page, width)}")
                print(f"  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
