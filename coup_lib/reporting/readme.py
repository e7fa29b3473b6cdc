"""Puts committed tables and measured times into README.md and the pages of docs/: `make readme`."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from coup_lib.files import write_atomically
from coup_lib.paths import FIGURES, ROOT

BLOCK = re.compile(r"(<!-- (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Where the four claims of the README's table are judged: profile → norm → table in figures/.
CLAIMS = {
    "digits": {"L∞": "digits/table1_claims", "L2": "digits/table2_claims"},
    "cifar10-small": {
        "L∞": "cifar10-small/fig2b_linf_resnet20_claims",
        "L2": "cifar10-small/fig2b_l2_resnet20_claims",
    },
}
CLAIM = re.compile(r"\|[^|]*more robust than ([\w ]+?)(?: \(the paper reports (.*?)\))? \| (.*?) \| (.*?) \|")


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text with every `<!-- name -->` block replaced by figures/<name>.md or by a table made here."""
    return BLOCK.sub(lambda match: f"{match[1]}{_content(match['name'])}\n{match[3]}", text)


def _content(name: str) -> str:
    made = {"claims": claims, "literature": literature, "cost": cost, "audit_help": audit_help}
    return made[name]() if name in made else _figure(name)


def _figure(name: str) -> str:
    return (ROOT / "figures" / f"{name}.md").read_text().strip()


def claims() -> str:
    """COUP against DiffPure and the reverse SDE: both norms, both profiles, both ways to attack."""
    found = {
        (profile, norm, rival): (reported, protocol, worst)
        for profile, tables in CLAIMS.items()
        for norm, name in tables.items()
        for rival, reported, protocol, worst in CLAIM.findall(_figure(name))
    }
    columns = [f"{profile}: {what}" for profile in CLAIMS for what in ("paper's protocol", "worst case")]
    lines = [
        f"| COUP is more robust than | paper | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for norm in ("L∞", "L2"):
        for rival in ("DiffPure", "Reverse SDE"):
            rows = [found[profile, norm, rival] for profile in CLAIMS]
            reported = next((row[0] for row in rows if row[0]), "larger")
            cells = [
                cell.replace(" points", "").replace("(", "").replace(")", "")
                for row in rows
                for cell in row[1:]
            ]
            lines.append(f"| {rival}, {norm} | {reported} | {' | '.join(cells)} |")
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


def times(executed: Path) -> str:
    """Notebook → command → minutes, as papermill noted them in the executed notebooks of a folder."""
    lines = ["| notebook | command | minutes |", "|---|---|---|"]
    for path in sorted(executed.glob("*.ipynb")):
        document = json.loads(path.read_text())
        ran, title = document["metadata"]["papermill"], document["cells"][0]["source"][0].strip("# \n")
        norm = " -p norm l2" if ran["parameters"].get("norm") == "l2" else ""
        command = f"papermill notebooks/{Path(ran['input_path']).name} out.ipynb{norm}"
        lines.append(f"| {title} | `{command}` | {ran['duration'] / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Fill the pages, or, given a folder of executed notebooks, write their times to figures/times.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=Path, help="folder of executed notebooks")
    executed = parser.parse_args().times
    if executed:
        text = times(executed) + "\n"
        write_atomically(FIGURES / "times.md", lambda temporary: temporary.write_text(text))
    else:
        for page in pages():
            page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
