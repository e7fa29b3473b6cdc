"""Puts committed tables, numbers and times into README.md, docs/ and the notebooks' text: `make readme`."""

import argparse
import os
import re
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import nbformat

from coup_lib.paths import ROOT

BLOCK = re.compile(r"(<!-- (?!end )(?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Sentences with cells of the tables in figures/: {table; part of a row; part of a heading}, or what of a file
# is found by {table; regular expression}. The template stays in the page, where it is not shown.
SENTENCES = re.compile(r"(<!-- filled\n(?P<template>.*?)\n-->\n).*?(<!-- end -->)", re.DOTALL)
CELL = re.compile(r"\{([\w/-]+); ([^{};]+)(?:; ([^{};]+))?\}")
# Where the README's claims are judged: norm → profile → a table in figures/, with that of counts beside it.
JUDGED = {
    "L∞": {"digits": "digits/table1", "cifar10-small": "cifar10-small/fig2b_linf_resnet20"},
    "L2": {"digits": "digits/table2", "cifar10-small": "cifar10-small/fig2b_l2_resnet20"},
}
COUNTS = {
    "worst case: one draw": "Worst case: one draw",
    "all of 10 draws": "Worst case: all of 10",
    "majority of 10": "Worst case: majority of 10",
}


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with `SENTENCES` filled, and `<!-- name -->` blocks replaced by figures/<name>.md or a table.

    ValueError for a place that a sentence names and that is not there, or not the only one.
    """
    text = SENTENCES.sub(lambda match: f"{match[1]}{CELL.sub(_cell, match['template'])}\n{match[3]}", text)
    return BLOCK.sub(lambda match: f"{match[1]}{_content(match['name'])}\n{match[3]}", text)


def _cell(wanted: re.Match[str]) -> str:
    """What stands in the place that a `CELL` names."""
    table, row, column = wanted.groups()
    found = re.findall(row, _figure(table)) if column is None else _places(table, row, column)
    if len(found) != 1:
        raise ValueError(f"{wanted[0]}: expected one such place; found {len(found)}")
    return found[0]


def _places(table: str, row: str, column: str) -> list[str]:
    """The cells of a table in figures/ in lines and under headings that contain these texts."""
    heads: list[str] = []
    found: list[str] = []
    for before, line in pairwise(["", *_figure(table).splitlines()]):
        heads = before.split(" | ") if re.match(r"\| ?---", line) else heads
        if line.startswith("| ") and row in line:
            cells = zip(heads, line.split(" | "), strict=True)
            found += [cell.strip("| ") for head, cell in cells if column in head]
    return found


def _content(name: str) -> str:
    made = {"claims": claims, "literature": literature, "cost": cost, "audit_help": audit_help}
    return made[name]() if name in made else _figure(name)


def _figure(name: str) -> str:
    return (ROOT / "figures" / f"{name}.md").read_text().strip()


def claims() -> str:
    """COUP against DiffPure and the reverse SDE: both norms, both profiles, every way to count."""
    head = ["COUP is more robust than", "on", "paper's protocol", *COUNTS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for norm, tables in JUDGED.items():
        for rival, (profile, table) in product(("DiffPure", "Reverse SDE"), tables.items()):
            row = f"COUP is more robust than {rival}"
            cells = _places(f"{table}_claims", row, "protocol")
            cells += [_places(f"{table}_counts_claims", row, column)[0] for column in COUNTS.values()]
            said = [re.sub(r" points|[()]", "", cell) for cell in cells]
            lines.append(f"| {' | '.join([f'{rival}, {norm}', profile, *said])} |")
    return "\n".join(lines)


def literature() -> str:
    """The table of docs/literature.csv."""
    import pandas as pd

    from coup_lib.reporting import tables

    frame = pd.read_csv(ROOT / "docs" / "literature.csv", dtype=str, keep_default_na=False)
    return tables.markdown(frame.set_index("data"))


def cost() -> str:
    """What the paper's number of images takes, of workflow/cost.md."""
    return (ROOT / "workflow" / "cost.md").read_text().split("## 512 images\n")[1].split("\n## ")[0].strip()


def audit_help() -> str:
    """What `coup audit --help` prints."""
    command = [sys.executable, "-m", "coup_lib.cli", "audit", "--help"]
    wide = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    printed = subprocess.run(command, env=wide, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"```text\n{printed.strip()}\n```"


def main() -> None:
    """Fill the pages, and the first cell of each notebook."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for page in pages():
        page.write_text(filled(page.read_text()))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].source = filled(notebook.cells[0].source)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
