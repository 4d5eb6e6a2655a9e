"""Reports of the tunnel: sections of text, tables, figures and claims, as Markdown and as HTML.

A claim carries its numbers and its verdict, shown or not: a report lists all of them, also those
that did not appear. The HTML file holds its pictures; the Markdown file lies beside them.
"""

import base64
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from minicpm_jax.core import files


@dataclasses.dataclass(frozen=True)
class Claim:
  """An effect that was looked for, what was measured, and the control that must not show it."""

  text: str
  is_shown: bool
  numbers: str
  control: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]

  def __post_init__(self):
    wrong = [row for row in self.rows if len(row) != len(self.header)]
    if wrong:
      raise ValueError(f"table: found a row of {len(wrong[0])} cells, expected {len(self.header)}")


@dataclasses.dataclass(frozen=True)
class Picture:
  """A rendered figure under a file name without suffix."""

  name: str
  png: bytes
  caption: str


@dataclasses.dataclass
class Section:
  """One suite: prose, tables and pictures in order, its claims, and data for the JSON file."""

  title: str
  blocks: list[str | Table | Picture] = dataclasses.field(default_factory=list)
  claims: list[Claim] = dataclasses.field(default_factory=list)
  data: dict[str, Any] = dataclasses.field(default_factory=dict)

  def text(self, *sentences: str) -> None:
    self.blocks.append(" ".join(sentences))

  def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = tuple(tuple(_cell(x) for x in row) for row in rows)
    self.blocks.append(Table(tuple(header), cells))

  def claim(self, text: str, is_shown: bool, numbers: str, control: str = "") -> None:
    self.claims.append(Claim(text, bool(is_shown), numbers, control))

  def picture(self, name: str, figure: Any, caption: str) -> None:
    """Renders a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    self.blocks.append(Picture(name, buffer.getvalue(), caption))


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
  return str(value)


# --- Files ---------------------------------------------------------------------------------------


def write(
  folder: str | os.PathLike[str], title: str, intro: str, sections: Sequence[Section]
) -> pathlib.Path:
  """report.md, report.html, report.json and one PNG a picture; returns the Markdown file."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for section in sections:
    for block in section.blocks:
      if isinstance(block, Picture):
        files.write(folder / f"{block.name}.png", block.png)
  data = {
    "title": title,
    "sections": [
      {"title": s.title, "claims": [dataclasses.asdict(c) for c in s.claims], "data": s.data}
      for s in sections
    ],
  }
  files.write_json(folder / "report.json", data)
  files.write(folder / "report.html", as_html(title, intro, sections))
  files.write(folder / "report.md", as_markdown(title, intro, sections))
  return folder / "report.md"


def summary(sections: Sequence[Section]) -> Table:
  """All claims with their verdicts."""
  rows = [
    (s.title, c.text, "shown" if c.is_shown else "NOT SHOWN", c.numbers, c.control or "-")
    for s in sections
    for c in s.claims
  ]
  return Table(("suite", "effect", "verdict", "measured", "control"), tuple(rows))


def as_markdown(title: str, intro: str, sections: Sequence[Section]) -> str:
  lines = [f"# {title}", "", intro, "", "## What was looked for", ""]
  lines += [*_markdown_table(summary(sections)), ""]
  for section in sections:
    lines += [f"## {section.title}", ""]
    for block in section.blocks:
      if isinstance(block, Table):
        lines += _markdown_table(block)
      elif isinstance(block, Picture):
        lines.append(f"![{block.caption}]({block.name}.png)")
      else:
        lines.append(block)
      lines.append("")
  return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
  rows = [table.header, ("---",) * len(table.header), *table.rows]
  return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def as_html(title: str, intro: str, sections: Sequence[Section]) -> str:
  parts = [
    "<!doctype html><meta charset='utf-8'>",
    f"<title>{html.escape(title)}</title>",
    "<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #bbb;padding:.2em .6em}"
    "th{background:#eee}img{max-width:100%}</style>",
    f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>",
    "<h2>What was looked for</h2>",
    _html_table(summary(sections)),
  ]
  for section in sections:
    parts.append(f"<h2>{html.escape(section.title)}</h2>")
    for block in section.blocks:
      if isinstance(block, Table):
        parts.append(_html_table(block))
      elif isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        caption = html.escape(block.caption)
        parts.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'>")
        parts.append(f"<figcaption>{caption}</figcaption></figure>")
      else:
        parts.append(f"<p>{html.escape(block)}</p>")
  return "\n".join(parts) + "\n"


def _html_table(table: Table) -> str:
  def row(cells: Sequence[str], tag: str) -> str:
    return (
      "<tr>"
      + "".join(f"<{tag}>{html.escape(cell).replace('**', '')}</{tag}>" for cell in cells)
      + "</tr>"
    )

  return (
    "<table>"
    + row(table.header, "th")
    + "".join(row(cells, "td") for cells in table.rows)
    + "</table>"
  )
