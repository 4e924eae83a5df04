"""All studies on one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .study import Study, Table

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


class Section(NamedTuple):
    """One study's part of the page; figures are PNG files."""

    study: Study
    about: dict[str, Any]
    table: Table
    finding: str
    figures: list[Path]


def write_page(sections: Sequence[Section], path: Path) -> None:
    """Writes the page, figures embedded."""
    links = "".join(f'<a href="#{s.study.name}">{escape(s.study.title)}</a>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
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


def _section(section: Section) -> str:
    study, about = section.study, section.about
    figures = "\n".join(image(figure) for figure in section.figures)
    machine = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    return (
        f'<h2 id="{study.name}">{escape(study.title)}</h2>\n'
        f"<p><b>In the paper.</b> {escape(study.paper)}</p>\n"
        f"<p><b>Here.</b> {escape(about['setting'])}.</p>\n"
        f'<p class="finding">{escape(section.finding)}</p>\n'
        f"{table(section.table)}\n{figures}\n"
        f"<p><b>What this shows and does not.</b> {escape(study.limits)}</p>\n"
        f'<p class="note">Made by <code>{escape(about["command"])}</code> on {escape(machine)}.</p>'
    )


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
