"""Puts committed tables and measured times into README.md: `python -m coup_lib.readme` (`make readme`)."""

import json
import re

from coup_lib.paths import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

RUNS = (
    # what, notebook, parameters of a plain papermill run
    ("Fig. 1a, Fig. 3a, Fig. 3b, Prop. 1 and 2", "00_toy_analysis", ""),
    ("Fig. 2b", "02_ablation", ""),
    ("Table 1", "04_autoattack", ""),
    ("Table 2", "04_autoattack", " -p norm l2"),
)


def filled(text: str) -> str:
    """README text with every `<!-- name -->` block replaced: "times", or a file figures/<name>.md."""
    return BLOCK.sub(lambda match: f"{match[1]}{_content(match['name'])}\n{match[3]}", text)


def _content(name: str) -> str:
    return _times() if name == "times" else (ROOT / "figures" / f"{name}.md").read_text().strip()


def _times() -> str:
    """Figure → notebook → command → minutes, the minutes as papermill noted them in the executed notebook."""
    lines = [
        "| figure or table | notebook | command | minutes |",
        "|---|---|---|---|",
    ]
    for what, notebook, parameters in RUNS:
        metadata = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["metadata"]
        minutes = metadata["papermill"]["duration"] / 60
        command = f"papermill notebooks/{notebook}.ipynb out.ipynb{parameters}"
        lines.append(f"| {what} | `{notebook}` | `{command}` | {minutes:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
