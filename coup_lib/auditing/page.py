"""An audit as a page: the same parts in Markdown and as one HTML file that needs no other."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from coup_lib.reporting.tables import markdown


@dataclass(frozen=True)
class Figure:
    """The place of a figure: its file beside the page, and what it shows in words."""

    file: str
    alternative: str


Part = str | pd.DataFrame | Figure  # a paragraph, "# heading" or "- item" of Markdown; a table; a figure

HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }}
</style>
{body}
</html>
"""


def markdown_page(parts: Sequence[Part]) -> str:
    """The parts as Markdown; the figure stands beside it."""

    def shown(part: Part) -> str:
        if isinstance(part, Figure):
            return f"![{part.alternative}]({part.file})"
        return markdown(part) if isinstance(part, pd.DataFrame) else part

    return "\n\n".join(map(shown, parts)) + "\n"


def html_page(parts: Sequence[Part], png: bytes) -> str:
    """The parts as HTML; png: the figure's content."""

    def shown(part: Part) -> str:
        if isinstance(part, Figure):
            source = base64.b64encode(png).decode()
            return f'<img alt="{escape(part.alternative)}" src="data:image/png;base64,{source}">'
        if isinstance(part, pd.DataFrame):
            return f"<div>{part.to_html(border=0)}</div>"
        mark, _, text = part.partition(" ")
        tag = {"#": "h1", "##": "h2", "-": "li"}.get(mark, "p")
        bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(part if tag == "p" else text))
        return f"<{tag}>{bold}</{tag}>"

    return HTML.format(body="\n".join(map(shown, parts)))
