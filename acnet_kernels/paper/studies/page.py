"""All studies on one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .study import Measured, Study, Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.8rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
p { max-width: 48rem; } img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #999; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
code { background: #f3f3f3; padding: 0.1rem 0.3rem; } .finding { font-weight: 600; }
.note { color: #555; font-size: 14px; } nav a { margin-right: 1rem; }
"""


class Part(NamedTuple):
    """What a study shows of results that belong together; figures are PNG files."""

    setting: str
    finding: str
    table: Table
    figures: list[Path]
    results: Sequence[Measured]


def write_page(sections: Sequence[tuple[Study, Sequence[Part]]], path: Path) -> None:
    """Writes the page, figures embedded."""
    links = "".join(f'<a href="#{study.name}">{escape(study.title)}</a>' for study, _ in sections)
    body = "\n".join(_section(study, parts) for study, parts in sections)
    text = (
        "<p>The experiments of “ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric "
        'Convolution Blocks” (<a href="https://arxiv.org/abs/1908.03930">arXiv 1908.03930</a>), repeated with '
        f"<code>acnet_kernels</code>.</p>\n<nav>{links}</nav>\n{body}"
    )
    path.write_text(document("ACNet studies", text), encoding="utf-8")


def document(title: str, body: str) -> str:
    """A page with this title and body."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(study: Study, parts: Sequence[Part]) -> str:
    runs: list[dict[str, Any]] = []
    for result in (result for part in parts for result in part.results):
        if result.run is not None and result.run not in runs:
            runs.append(result.run)
    return "\n".join(
        (
            f'<h2 id="{study.name}">{escape(study.title)}</h2>',
            f"<p><b>In the paper.</b> {escape(study.paper)}</p>",
            *map(_part, parts),
            f"<p><b>What this shows and does not.</b> {escape(study.limits)}</p>",
            *map(_run, runs),
        )
    )


def _part(part: Part) -> str:
    figures = "\n".join(image(figure) for figure in part.figures)
    return (
        f"<p><b>Here.</b> {escape(part.setting)}.</p>\n"
        f'<p class="finding">{escape(part.finding)}</p>\n{table(part.table)}\n{figures}'
    )


def _run(run: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    return f'<p class="note">Made by <code>{escape(run["command"])}</code> on {escape(machine)}.</p>'


def image(path: Path) -> str:
    """The PNG file, of 150 dots an inch, embedded."""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # of the PNG header; a page has 96 dots an inch
    data = base64.b64encode(content).decode()
    return (
        f'<img alt="{escape(path.stem)}" style="width: {width * 96 // 150}px" src="data:image/png;base64,{data}">'
    )


def table(content: Table) -> str:
    """The table, its first column left and the others right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in content.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in content.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
