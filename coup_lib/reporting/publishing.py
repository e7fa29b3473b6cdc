"""Publishing what a run made: its figures and tables into figures/, its records into results/.

python -m coup_lib.reporting.publishing     all that lies in COUP_FIGURES and COUP_RESULTS (build/)
"""

import argparse
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from coup_lib import paths
from coup_lib.evaluation import records, store
from coup_lib.evaluation.profiles import BUDGETS
from coup_lib.files import write_atomically

_written: list[Path] = []  # by this process, below `paths.FIGURES`


def note(path: Path) -> Path:
    """Remember a figure or table that was written; returns its path."""
    _written.append(path)
    return path


def finish(publish: bool) -> None:
    """At a notebook's end: publish the figures, tables and records that it wrote or read, if asked to.

    Raises:
        ValueError: for a table of fewer images or a smaller budget than the published one; then nothing is
            published.
    """
    if publish:
        _publish(_written, [path for path in records.read_here if path.exists()])


def _publish(written: Iterable[Path], made: Iterable[Path]) -> None:
    written = list(dict.fromkeys(written))
    for path in written:
        if path.suffix == ".csv" and (there := _published(path)).exists():
            _check(pd.read_csv(path), pd.read_csv(there), there)
    for path in written:
        there = _published(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(there, partial(shutil.copy, path))
    store.move(made, paths.ROOT / "results")
    print(f"published: {len(written)} figures and tables in {paths.ROOT / 'figures'}, and their records")


def _published(path: Path) -> Path:
    return paths.ROOT / "figures" / path.relative_to(paths.FIGURES)


def _check(new: pd.DataFrame, old: pd.DataFrame, path: Path) -> None:
    sizes = [
        (int(frame["n"].max()), max(map(BUDGETS.index, frame["budget"])))
        for frame in (new, old)
        if {"n", "budget"} <= set(frame)
    ]
    if len(sizes) == 2 and (sizes[0][0] < sizes[1][0] or sizes[0][1] < sizes[1][1]):
        (n, budget), (least, lowest) = sizes
        raise ValueError(
            f"publish: {path} has n = {least}, budget {BUDGETS[lowest]}, and is not replaced by a table of "
            f"n = {n}, budget {BUDGETS[budget]}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    files = sorted(path for path in paths.FIGURES.rglob("*") if path.suffix in (".csv", ".md", ".png"))
    _publish(files, paths.RESULTS.glob("*/*.json"))


if __name__ == "__main__":
    main()
