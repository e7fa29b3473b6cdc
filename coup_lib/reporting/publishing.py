"""Publishing what a run made: its figures and tables into figures/, its records into results/.

python -m coup_lib.reporting.publishing     all that lies in COUP_FIGURES and COUP_RESULTS (build/)
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import filelock

from coup_lib import paths
from coup_lib.checks import in_one_line, yes_or_no
from coup_lib.evaluation import records, store
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.profiles import BUDGETS
from coup_lib.files import write_atomically

MEASURED = "measured.json"  # beside the figures of a profile: under which settings each table was measured
# What a table may be replaced by: no less effort, under the settings that it has.
EFFORT = ("n_images", "n_iter", "eot", "n_draws", "n_targets", "square_queries", "n_steps")
SAME = ("norm", "eps", "t_star", "guidance_weight", "split", "subset", "seed")

written: list[Path] = []  # by this process, below `paths.FIGURES`
missing: list[str] = []  # what a page that was written lacks


def note(path: Path, config: Any = None) -> Path:
    """Remember a figure or table that was written, and the settings of a table; returns its path."""
    written.append(path)
    if isinstance(config, Config):  # the toy study has settings of its own
        with filelock.FileLock(path.parent / f".{MEASURED}.lock"):
            _remember(path.parent, {path.name: _settings(config)})
    return path


def incomplete(what: str) -> None:
    """Say that something is missing from a page: then the run publishes nothing."""
    missing.append(what)


@in_one_line()
def finish(publish: Any) -> None:
    """At a notebook's end: publish what it drew and the records that it took, if asked to.

    Raises:
        ValueError: for a smoke run, a page with something missing, or a table of fewer images, a smaller
            budget or other settings than the published one; then nothing is published.
    """
    if yes_or_no("publish", publish):
        _publish(written, [path for path in records.asked_for if path.exists()])


def _publish(written: Iterable[Path], made: Iterable[Path]) -> None:
    written = list(dict.fromkeys(written))
    if paths.is_smoke() or missing:
        why = "this is a smoke run" if paths.is_smoke() else f"not on record: {', '.join(missing)}"
        raise ValueError(f"publish: expected whole results; {why}")
    for path in written:
        _check(path)
    attacked_again = (path for path in made if path.parent.name != records.APART)
    store.move(attacked_again, paths.ROOT / "results")
    for path in written:
        there = _published(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(there, partial(shutil.copy, path))
        if settings := _measured(path.parent).get(path.name):
            _remember(there.parent, {path.name: settings})
    print(f"published: {len(written)} figures and tables in figures/, and their records in results/")


def _published(path: Path) -> Path:
    return paths.ROOT / "figures" / path.relative_to(paths.FIGURES)


def _settings(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("budget", *EFFORT, *SAME)}


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Table → the settings that it was measured under, of a profile's folder of figures."""
    path = folder / MEASURED
    return json.loads(path.read_text()) if path.exists() else {}


def _remember(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(_measured(folder) | settings, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / MEASURED, lambda temporary: temporary.write_text(text))


def _check(path: Path) -> None:
    """ValueError for a table that may not replace the published one."""
    there = _published(path)
    new, old = (_measured(each.parent).get(path.name) for each in (path, there))
    if not (new and old and there.exists()):
        return
    less = [name for name in EFFORT if new[name] < old[name]]
    less += ["budget"] if BUDGETS.index(new["budget"]) < BUDGETS.index(old["budget"]) else []
    if wrong := less + [name for name in SAME if new[name] != old[name]]:
        described = [", ".join(f"{name} = {each[name]}" for name in wrong) for each in (old, new)]
        raise ValueError(f"publish: {there} has {described[0]}; it is not replaced by one of {described[1]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    files = sorted(path for path in paths.FIGURES.rglob("*") if path.suffix in (".csv", ".md", ".png"))
    _publish(files, paths.RESULTS.glob("*/*.json"))


if __name__ == "__main__":
    main()
