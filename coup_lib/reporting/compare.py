"""Your reproduction beside the committed records: `python -m coup_lib.reporting.compare build/reproduced`."""

import argparse
from pathlib import Path

import numpy as np

from coup_lib.evaluation.outcomes import Accuracy, right_draws
from coup_lib.evaluation.records import is_complete, read
from coup_lib.paths import ROOT


def compare(reproduced: Path, committed: Path) -> list[tuple[str, str]]:
    """(record, verdict) for every record with an accuracy that both folders hold."""
    lines = []
    for path in sorted(reproduced.rglob("score-*.json")):
        other = committed / path.relative_to(reproduced)
        alone = "no committed record to compare with"
        verdict = _verdict(_right(path), _right(other)) if is_complete(other) else alone
        lines.append((path.stem, verdict))
    return lines


def _verdict(yours: np.ndarray, theirs: np.ndarray) -> str:
    """Both (n,), the share of right draws of each image."""
    here, there = Accuracy.of(yours), Accuracy.of(theirs)
    if np.array_equal(yours, theirs):
        return f"identical: {here.value:.2f} %"
    inside = there.low <= here.value <= there.high
    return f"{'agrees' if inside else 'DIFFERS'}: {here.value:.2f} against {there} %"


def _right(path: Path) -> np.ndarray:
    result = read(path)["result"]
    return right_draws(result["report"], result["labels"])


def main() -> None:
    """Print one line per record that is not identical, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reproduced", type=Path)
    parser.add_argument("--committed", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    lines = compare(options.reproduced.resolve(), options.committed.resolve())
    for name, verdict in lines:
        if not verdict.startswith("identical"):
            print(f"{name}: {verdict}")
    counts = {word: sum(verdict.startswith(word) for _, verdict in lines) for word in ("identical", "agrees")}
    print(
        f"{len(lines)} accuracies; {counts['identical']} identical to the committed ones, "
        f"{counts['agrees']} within their 95 % interval, {sum('DIFFERS' in v for _, v in lines)} outside"
    )


if __name__ == "__main__":
    main()
