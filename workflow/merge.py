"""Whether the shards of a run make one whole: `python -m workflow.merge build/shards/*.ipynb`.

Shards write into one folder of results, and who finishes a record's last chunk combines them all (see
`records`). What is left to do at the end is to refuse a run that has gaps, or that mixes settings or code.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coup_lib import paths
from coup_lib.evaluation.records import entries


@dataclass(frozen=True)
class Shard:
    """An executed notebook: the one it was made from, what it was called with, whether it reached its end."""

    path: Path
    notebook: str
    parameters: dict[str, Any]
    whole: bool

    @property
    def index(self) -> int:
        """Which of `count` this is."""
        return int(self.parameters.get("shard", 0))

    @property
    def count(self) -> int:
        """How many shards the run was started with."""
        return int(self.parameters.get("num_shards", 1))

    @property
    def run(self) -> str:
        """What all shards of a run have in common: the notebook and its other parameters."""
        shared = {key: self.parameters[key] for key in sorted(self.parameters) if key not in SHARDING}
        return " ".join([self.notebook, *(f"{key}={value}" for key, value in shared.items())])


SHARDING = ("shard", "num_shards")


def read_shard(path: Path) -> Shard:
    """An executed notebook as papermill leaves it.

    ValueError for a file that is none.
    """
    try:
        written = json.loads(path.read_text())["metadata"]["papermill"]
        notebook = Path(written["input_path"]).stem
        whole = written["exception"] is None and written["end_time"] is not None
        return Shard(path, notebook, written["parameters"], whole)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a notebook that papermill has executed ({error!r})") from None


def gaps(shards: Iterable[Shard]) -> list[str]:
    """A line for every shard that is missing, broken off, or there with another number of shards."""
    runs: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        runs[shard.run].append(shard)
    lines = []
    for run, found in runs.items():
        counts = sorted({shard.count for shard in found})
        if len(counts) > 1:
            lines.append(f"{run}: mixes runs in {' and '.join(map(str, counts))} shards")
        missing = sorted(set(range(counts[-1])) - {shard.index for shard in found})
        if missing:
            what = f"shard {', '.join(map(str, missing))} of {counts[-1]}"
            lines.append(f"{run}: {what} is missing, or was run with other parameters")
        lines += [f"{run}: {shard.path} did not reach its end" for shard in found if not shard.whole]
    return lines


def unfinished(folder: Path) -> list[str]:
    """A line for every record in the folder of which only some chunks are there."""
    there: dict[str, set[int]] = defaultdict(set)
    missing: dict[str, set[int]] = {}
    for journal in sorted(folder.glob("*.journal")):
        name = journal.name.split(".")[0]
        missing.setdefault(name, set())
        for entry in entries(journal):
            there[name].add(entry["chunk"])
            missing[name] = set(range(entry["of"])) - there[name]
    return [
        f"{folder / name}: not finished; "
        + (f"chunks {_listed(left)} are missing" if left else "not combined")
        for name, left in missing.items()
    ]


def mixed(folder: Path) -> list[str]:
    """A line for every record in the folder whose chunks were made by more than one version of the code.

    Records that are as they were committed are no work of the run's.
    """
    lines = []
    for path in _uncommitted(folder):
        made = json.loads(path.read_text())["provenance"]
        if others := made.get("also"):
            commits = ", ".join(sorted({other["commit"][:12] for other in (made, *others)}))
            lines.append(f"{path}: made by several versions of the code or its packages (commits {commits})")
    return lines


def _uncommitted(folder: Path) -> list[Path]:
    """The folder's records that git does not have as they are; outside of git all of them."""
    command = ["git", "ls-files", "--modified", "--others", "--", "*.json"]
    try:
        names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return sorted(folder.glob("*.json"))
    return sorted(path for name in names.splitlines() if (path := folder / name).exists())


def check(notebooks: Sequence[Path], results: Path) -> list[str]:
    """Why these executed notebooks and the records they left are no whole: a line for each reason."""
    shards = [read_shard(path) for path in notebooks]
    profiles = sorted({str(shard.parameters.get("profile", "digits")) for shard in shards})
    folders = [results / profile for profile in profiles]
    return gaps(shards) + [line for folder in folders for line in unfinished(folder) + mixed(folder)]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def main() -> None:
    """Print what is wrong and exit with 1, or say that all is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="+", help="executed notebooks, one per shard")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of the records")
    options = parser.parse_args()
    try:
        reasons = check(options.notebooks, options.results)
    except ValueError as error:
        parser.error(str(error))
    if reasons:
        print("\n".join(reasons))
        sys.exit(
            "not merged: run the same shards again for a gap; delete a mixed record to have it made anew"
        )
    print(
        f"{len(options.notebooks)} shards: all there, each record whole and made by one version of the code"
    )


if __name__ == "__main__":
    main()
