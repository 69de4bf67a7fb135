"""A report as blocks, and two ways to write them: Markdown beside its plots, or one HTML page that is all by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polar.files import write_text

ABSENT = "-"
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
# matplotlib writes colours into each element; those that belong to the page follow its colour scheme.
_THEMED = {"#000000": "currentColor", "#ffffff": "var(--page)", "#dddddd": "var(--line)"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what stands there.
        order: number by which a column is sorted; default: the number that the text begins with, if it does.
        link: address that the text leads to.
    """

    text: str
    order: float | None = None
    link: str | None = None

    @property
    def sort_key(self) -> float | None:
        """The number to sort by; None: sorted as text, or last where nothing is there."""
        match = _NUMBER.match(self.text)
        return self.order if self.order is not None else float(match[0].replace(",", "")) if match else None


@dataclass(frozen=True)
class Table:
    """A table that readers can sort.

    Attributes:
        header: names of the columns.
        rows: cells, or their texts.
        caption: one line.
        quiet: numbers of the rows that are others', set apart.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    quiet: frozenset[int] = frozenset()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, every text as a cell."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it holds only numbers, and dashes where there is none."""
        columns = list(zip(*self.cells, strict=True)) or [()] * len(self.header)
        return [
            any(cell.sort_key is not None for cell in column)
            and all(cell.sort_key is not None or cell.text == ABSENT for cell in column)
            for column in columns
        ]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines as they are, under a title."""

    title: str
    text: str


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib.

    Attributes:
        name: of its files, without ending.
        caption: what it shows, in a sentence.
        figure: what to save.
    """

    name: str
    caption: str
    figure: Any


Block = Table | Text | Items | Code | Plot


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Page:
    """A title and sections."""

    title: str
    sections: list[Section] = field(default_factory=list)


def write_page(page: Page, folder: Path, name: str = "report") -> tuple[Path, Path]:
    """Write NAME.md, NAME.html and the plots as PNG and SVG; other files in the folder stay.

    Returns:
        The paths of the Markdown and the HTML page.
    """
    from polar.plotting import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    drawings = {}
    for plot in (block for section in page.sections for block in section.blocks if isinstance(block, Plot)):
        save_figure(plot.figure, folder / f"{plot.name}.png")
        plot.figure.set_layout_engine("none")  # found by the first save; finding it again takes most of the time
        save_figure(plot.figure, folder / f"{plot.name}.svg")
        drawings[plot.name] = inline_svg((folder / f"{plot.name}.svg").read_text(encoding="utf-8"), plot)
    write_text(folder / f"{name}.md", to_markdown(page))
    write_text(folder / f"{name}.html", to_html(page, drawings))
    return folder / f"{name}.md", folder / f"{name}.html"


def to_markdown(page: Page) -> str:
    """Return the page as Markdown; plots are links to the files beside it."""
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts += [f"## {section.title}", *(_block_to_markdown(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block_to_markdown(block: Block) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Items):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Code):
        return f"{block.title}:\n\n```\n{block.text}\n```"
    if isinstance(block, Plot):
        return f"![{block.caption}]({block.name}.png)\n\n{block.caption} ([SVG]({block.name}.svg))"
    marks = ["--:" if numeric else ":--" for numeric in block.numeric]
    rows = [[_markdown_cell(cell) for cell in row] for row in block.cells]
    lines = "\n".join("| " + " | ".join(line) + " |" for line in [list(block.header), marks, *rows])
    return f"{block.caption}\n\n{lines}" if block.caption else lines


def _markdown_cell(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|").replace("\n", " ")
    return f"[{text}]({cell.link})" if cell.link else text


def to_html(page: Page, drawings: dict[str, str]) -> str:
    """Return the page as HTML in one piece: style, script and plots inside, nothing loaded from elsewhere.

    Args:
        page: what to write.
        drawings: name of each plot -> its SVG, see `inline_svg`.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections = [
        (section.title, [(type(block).__name__, block) for block in section.blocks]) for section in page.sections
    ]
    return environment.get_template("page.html.j2").render(title=page.title, sections=sections, drawings=drawings)


def inline_svg(svg: str, plot: Plot) -> str:
    """Return matplotlib's SVG as an element of a page: no namespaces, own ids, colours of the page's scheme."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{plot.name}-", svg)
    for colour, themed in _THEMED.items():
        svg = svg.replace(colour, themed)
    # The page decides the size and the typeface.
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-labelledby="{plot.name}-caption">',
        svg,
        count=1,
    )
    return re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--text)", svg)
