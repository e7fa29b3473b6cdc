"""Progress of long work, one line now and then, with an estimate of the time left."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FORETOLD: dict[Path, float] = {}  # record → cost of what this process was said to make, by `foretell`


def foretell(left: Mapping[Path, float], seconds: float, device: object) -> None:
    """Say in one line what is to be made and how long it takes; a `Plan` may then count what follows it.

    left: record → cost of what is not there yet. seconds: of a unit of cost.
    """
    FORETOLD.clear()  # what was foretold before and given up is no part of this
    FORETOLD.update(left)
    scored = sum(path.name.startswith("score-") for path in left)
    todo = f"{len(left) - scored} attacks and {scored} evaluations of what they found"
    say(f"To do: {todo}; about {clock(seconds * sum(left.values()))} min on {device}")


def say(text: str) -> None:
    """Print a line of progress: in a notebook below its cell, else on stderr, beside what a command finds."""
    print(text, file=sys.stdout if in_notebook() else sys.stderr, flush=True)


class Plan:
    """Progress over a list of jobs of foreseen cost, with an estimate of the time left.

    Jobs that are done already are passed over in silence. In a notebook a line takes the place of the one
    before, so that its output ends with the last.

    Args:
        costs: of each job, in any unit; 0 for one that is done already.
        after: the cost of what comes after these jobs, for an estimate of its own.
        every: seconds between two lines; the first estimate comes after as many.
    """

    def __init__(
        self, costs: Sequence[float], *, verbose: bool, after: float = 0.0, every: float = 10.0
    ) -> None:
        self.costs, self.verbose, self.after, self.every = list(costs), verbose, after, every
        self.index = -1
        self.began = time.monotonic()
        self.last = self.began - every

    def start(self, label: str) -> None:
        """Begin the next job."""
        self.index, self.label, self.share = self.index + 1, label, 0.0
        self._say("started")

    def advance(self, done: float, total: int) -> None:
        """`done` of the current job's `total` parts are finished, one of them perhaps in part."""
        self.share = done / total
        if done < total:
            self._say(f"{int(100 * self.share)}% done")

    def end(self) -> None:
        """Say how long it took, unless all was done already."""
        if any(self.costs):
            self._print(f"all {len(self.costs)} done in {clock(time.monotonic() - self.began)}")

    def _say(self, what: str) -> None:
        if not self.costs[self.index] or time.monotonic() - self.last < self.every:
            return
        worked = sum(self.costs[: self.index]) + self.share * self.costs[self.index]
        left, elapsed = sum(self.costs) - worked, time.monotonic() - self.began
        estimate = ""
        if worked > 0 and elapsed > self.every:
            speed = elapsed / worked
            estimate = f", about {clock(speed * left)} left"
            estimate += f", {clock(speed * (left + self.after))} with all that follows" if self.after else ""
        job = f"[{self.index + 1}/{len(self.costs)}] {self.label}: {what}"
        self._print(f"{job}; {clock(elapsed)} gone{estimate}")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        if self.verbose:
            if in_notebook():
                from IPython.display import clear_output

                clear_output(wait=True)
            say(text)


def in_notebook() -> bool:
    """Whether IPython runs this; where it does not, it need not be installed."""
    ipython = sys.modules.get("IPython")
    return bool(ipython and ipython.get_ipython())


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
