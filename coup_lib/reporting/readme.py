"""Puts committed tables and measured times into README.md: `make readme`."""

import argparse
import json
import re
from pathlib import Path

from coup_lib.files import write_atomically
from coup_lib.paths import FIGURES, ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

RUNS = (
    # what, notebook, norm where it is not the default
    ("Fig. 1a, Fig. 3a, Fig. 3b, Prop. 1 and 2", "00_toy_analysis", ""),
    ("Fig. 1c, Fig. 2a", "01_case_study", ""),
    ("Fig. 2b", "02_ablation", ""),
    ("Fig. 4a, Fig. 4b", "03_sweeps", ""),
    ("Table 1", "04_autoattack", ""),
    ("Table 2", "04_autoattack", "l2"),
    ("Table 3", "05_bpda", ""),
    ("Fig. 2c", "06_adversarial_training", ""),
    ("does the claim survive?", "07_stronger_attacks", ""),
    ("a better guided purifier?", "08_beyond", ""),
    ("everything beside the paper", "09_report", ""),
)


def filled(text: str) -> str:
    """README text with every `<!-- name -->` block replaced by the file figures/<name>.md."""
    return BLOCK.sub(lambda match: f"{match[1]}{_content(match['name'])}\n{match[3]}", text)


def _content(name: str) -> str:
    return (ROOT / "figures" / f"{name}.md").read_text().strip()


def times(executed: Path) -> str:
    """Figure → notebook → command → minutes, minutes as papermill noted them in the executed notebooks."""
    lines = ["| figure or table | notebook | command | minutes |", "|---|---|---|---|"]
    for what, notebook, norm in RUNS:
        path = executed / f"{notebook}{'_' if norm else ''}{norm}.ipynb"
        seconds = json.loads(path.read_text())["metadata"]["papermill"]["duration"]
        command = f"papermill notebooks/{notebook}.ipynb out.ipynb{' -p norm ' if norm else ''}{norm}"
        lines.append(f"| {what} | `{notebook}` | `{command}` | {seconds / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Fill README.md, or, given a folder of executed notebooks, write their times to figures/times.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=Path, help="folder of executed notebooks")
    executed = parser.parse_args().times
    if executed:
        text = times(executed) + "\n"
        write_atomically(FIGURES / "times.md", lambda temporary: temporary.write_text(text))
    else:
        README.write_text(filled(README.read_text()))


if __name__ == "__main__":
    main()
