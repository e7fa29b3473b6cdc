"""The site: `make docs` builds it from the executed notebooks and the pages here, and runs nothing again.

The source is the whole repository, so a link on a page leads to the same file on GitHub and on the site.
"""

import json
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TABLES = ("figures/", "benchmarks/")

project = "COUP, executable"
author = copyright = "the coup-lib authors"
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "figures/**/*.md",
    "workflow/cost.md",
    "benchmarks/results/planted.md",
    "coup_lib/weights/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["build", ".*", "**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_enable_extensions = ["deflist", "dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_ipywidgets_js = {}  # those are on other servers; the figures that the widgets drew are shown
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # build/docs/index.html
html_copy_source = False
html_math_renderer = "mathml"


FIELD, COLUMNS = re.compile(r"[\w, ]{1,30}: \S"), re.compile(r"\w+ {2,}\S")
KEPT = re.compile(r"(`+[^`]*`+|(?<!\w)\*\w[^*]*\*(?!\w))")  # code and emphasis
INTERVAL = re.compile(r"\[([-+.\d]+), ([-+.\d]+)\]")
SECTION = re.compile(r"(Args|Raises|Returns|Yields):$")


def docstring(app, what, name, obj, options, lines):
    """Docstrings here are plain text: `name: what it is` is an item of a list, and * and | are themselves."""
    found = []
    for line in lines:
        if line.startswith(" ") and found and found[-1].startswith(("- ", "| ")):
            found[-1] += f" {line.strip()}"
            continue
        begins = not found or not found[-1] or found[-1].startswith("- ")
        if begins and FIELD.match(line) and not SECTION.match(line):
            line = f"- {line}"
        elif COLUMNS.match(line):
            line = f"| {line}"
        listed = line.startswith(("- ", "| "))
        changes = bool(found) and bool(found[-1]) and listed != found[-1].startswith(("- ", "| "))
        if changes and line and not line.startswith(" "):
            found.append("")
        found.append(line)
    lines[:] = [
        "".join(
            part if place % 2 else re.sub(r"(?<!^)([*|])", r"\\\1", part)
            for place, part in enumerate(KEPT.split(line))
        )
        for line in found
    ]


def setup(app):
    """Mathematics as MathML, which browsers draw themselves: no script, and nothing fetched."""

    def inline(writer, node):
        writer.body.append(convert(node.astext()))
        raise nodes.SkipNode

    def display(writer, node):
        writer.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
        raise nodes.SkipNode

    def described(app, docname, source):
        """An image's text for readers who cannot see it, where myst-nb looks for it: at the cell."""
        if not docname.startswith("notebooks/"):
            return
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                    cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        source[0] = json.dumps(notebook)

    def titled(app, docname, source):
        """Every committed table is a page that others link to; its title is the name of its file."""
        if docname.startswith(TABLES) and not source[0].startswith("# "):
            source[0] = f"# {docname}.md\n\n{source[0]}"
        if docname.startswith((*TABLES, "coup_lib/")):
            source[0] = f"---\norphan: true\n---\n\n{source[0]}"

    app.add_html_math_renderer("mathml", (inline, None), (display, None))

    def included(app, path, docname, content):
        """The README's links, as seen from the pages that include it."""
        if path.name == "README.md":
            content[0] = re.sub(r"\]\((?!https?:|#)", "](../", content[0])

    def checked(app, doctree):
        """A warning, which is an error here, for an image without a text for readers who cannot see it."""
        for image in doctree.findall(nodes.image):
            if not image.get("alt", "").strip():
                logging.getLogger(__name__).warning("no alternative text: %s", image["uri"], location=image)

    def unbroken(app, doctree):
        """An interval in a table stays on one line."""
        for cell in doctree.findall(nodes.entry):
            for text in list(cell.findall(nodes.Text)):
                kept = INTERVAL.sub("[\\1,\N{NO-BREAK SPACE}\\2]", text.astext())
                text.parent.replace(text, nodes.Text(kept))

    app.connect("source-read", described)
    app.connect("source-read", titled)
    app.connect("include-read", included)
    app.connect("doctree-read", checked)
    app.connect("doctree-read", unbroken)
    app.connect("autodoc-process-docstring", docstring, priority=100)  # before napoleon
