"""Puts committed tables and measured times into README.md: `make readme`."""

import argparse
import json
import re
from pathlib import Path

from coup_lib.files import write_atomically
from coup_lib.paths import FIGURES, ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """README text with every `<!-- name -->` block replaced by the file figures/<name>.md."""
    return BLOCK.sub(lambda match: f"{match[1]}{_content(match['name'])}\n{match[3]}", text)


def _content(name: str) -> str:
    return (ROOT / "figures" / f"{name}.md").read_text().strip()


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
