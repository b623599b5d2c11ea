# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Reports: the same blocks as Markdown and as one HTML page, and the curves in them."""

from __future__ import annotations

import base64
import html
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .outputs import atomic_file
from .programs import printable

REPORT_FILES = ("report.md", "report.html")
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #888}"
    "figure{margin:1.5rem 0}img{max-width:100%}figcaption{color:#555}"
    "pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}.scroll{overflow-x:auto}"
)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Command:
    """A command line."""

    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture in the folder of the report. One that is not there is left out."""

    file: str
    caption: str


Block = Heading | Text | Command | Table | Picture


def number(value: Any, digits: int = 2) -> str:
    """A number of a table: a dash for none, "inf" for infinite, thousands apart for integers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}"


def as_markdown(blocks: Sequence[Block], folder: Path | None = None) -> str:
    """The blocks as Markdown. Pictures are checked where `folder` is given."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Command):
            parts.append(f"```bash\n{block.text}\n```")
        elif isinstance(block, Table):
            rows = [[_cell(cell) for cell in row] for row in (block.header, *block.rows)]
            lines = [f"| {' | '.join(row)} |" for row in rows]
            parts.append("\n".join([lines[0], "|---" * len(block.header) + "|", *lines[1:]]))
        elif folder is None or (folder / block.file).is_file():
            parts.append(f"![{_cell(block.caption)}]({block.file})\n\n*{block.caption}*")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", r"\|")


def as_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as one HTML page that holds its pictures."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{html.escape(block.text)}</h2>")
        elif isinstance(block, Text):
            parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in block.text.split("\n\n")]
        elif isinstance(block, Command):
            parts.append(f"<pre><code>{html.escape(block.text)}</code></pre>")
        elif isinstance(block, Table):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows
            )
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        elif (folder / block.file).is_file():
            data = base64.b64encode((folder / block.file).read_bytes()).decode("ascii")
            caption = html.escape(block.caption)
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write `REPORT_FILES` into a folder that holds the pictures already."""
    texts = (f"# {printable(title)}\n\n{as_markdown(blocks, folder)}", as_html(printable(title), blocks, folder))
    for name, text in zip(REPORT_FILES, texts):
        with atomic_file(folder / name) as staging:
            staging.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Points of a plot, joined by a line. Points that are not finite are left out."""

    label: str
    points: Sequence[tuple[float, float | None]]
    style: str = "o-"


def draw_curves(
    path: Path,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    title: str,
    is_log: bool = False,
    names: Sequence[str] = (),
) -> None:
    """Draw curves into a PNG file. Without matplotlib, print one line that names it.

    With `names` the places 0, 1, ... along x stand for things with these names.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install gpstoken-hf[eval])", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ticks: set[float] = set()
    for curve in curves:
        points = sorted((x, y) for x, y in curve.points if y is not None and math.isfinite(y))
        if not points:
            continue
        axes.plot([x for x, _ in points], [y for _, y in points], curve.style, label=printable(curve.label))
        ticks.update(x for x, _ in points)
    if is_log and ticks:
        axes.set_xscale("log")
        chosen = _spread(sorted(ticks))
        axes.set_xticks(chosen, [f"{tick:g}" for tick in chosen])
        axes.minorticks_off()
    if names:
        axes.set_xticks(range(len(names)), [printable(name) for name in names])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(printable(title))
    axes.grid(alpha=0.3)
    if ticks:
        many = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(curves) > 6 else {}
        axes.legend(fontsize="small", **many)
    with atomic_file(path) as staging:
        figure.savefig(staging, dpi=150)


def _spread(ticks: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis that stand at least a factor of 1.25 apart."""
    chosen = [ticks[0]]
    for tick in ticks[1:]:
        if tick >= 1.25 * max(chosen[-1], 1e-12):
            chosen.append(tick)
    return chosen
