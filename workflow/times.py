"""What each notebook takes: `python -m workflow.times build/notebooks-quick` writes figures/times.md.

Minutes of the quick run are those that papermill noted in the executed notebooks of the folder. Those of the
full run are the sum of what its attacks and their evaluations took, as their records say.
"""

import argparse
import json
from pathlib import Path

from coup_lib.evaluation.protocol import Evaluation, Experiment
from coup_lib.evaluation.records import is_complete, read
from coup_lib.files import write_atomically
from coup_lib.paths import FIGURES
from coup_lib.studies.grids import NOTEBOOKS, of_run

MISSING = "–"


def times(executed: Path) -> str:
    """Markdown: notebook → command → minutes of the quick and of the full run on digits."""
    lines = ["| notebook | command | minutes, quick | minutes, full |", "|---|---|---|---|"]
    for path in sorted(executed.glob("*.ipynb")):
        document = json.loads(path.read_text())
        ran, title = document["metadata"]["papermill"], document["cells"][0]["source"][0].strip("# \n")
        name, l2 = Path(ran["input_path"]), ran["parameters"].get("norm") == "l2"
        command = f"papermill notebooks/{name.name} out.ipynb{' -p norm l2' * l2}"
        full = full_minutes(name.stem + "@l2" * l2)
        lines.append(f"| {title} | `{command}` | {ran['duration'] / 60:.1f} | {full} |")
    return "\n".join(lines)


def full_minutes(run: str) -> str:
    """Of a notebook that attacks, named as in `grids.of_run`; a dash for others and where records miss."""
    if run.partition("@")[0] not in NOTEBOOKS:
        return MISSING
    records: set[Path] = set()
    for one in of_run(run, {"budget": "full"}):
        if isinstance(one, Experiment):
            records |= set(Evaluation(one.config, one.classifier).costs(one.attacks))
    if not all(map(is_complete, records)):
        return MISSING
    return f"{sum(read(path)['provenance']['seconds'] for path in records) / 60:,.0f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("executed", type=Path, help="folder of executed notebooks")
    text = times(parser.parse_args().executed) + "\n"
    write_atomically(FIGURES / "times.md", lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
