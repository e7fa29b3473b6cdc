"""Progress of long work, one line now and then, with an estimate of the time left."""

import sys
import time
from collections.abc import Sequence


class Plan:
    """Progress over a list of jobs of foreseen cost, with an estimate of the time left.

    Jobs that are done already are passed over in silence. In a notebook a line takes the place of the one
    before, so that its output ends with the last.

    Args:
        costs: of each job, in any unit; 0 for one that is done already.
        every: seconds between two lines; the first estimate comes after as many.
    """

    def __init__(self, costs: Sequence[float], *, verbose: bool, every: float = 10.0) -> None:
        self.costs, self.verbose, self.every = list(costs), verbose, every
        self.index, self.here = -1, 0.0
        self.began = time.monotonic()
        self.last = self.began - every

    def start(self, label: str) -> None:
        """Begin the next job."""
        self.index, self.label, self.here = self.index + 1, label, 0.0
        self._say("started")

    def advance(self, done: int, total: int) -> None:
        """`done` of the current job's `total` parts are finished."""
        self.here = self.costs[self.index] * done / total
        if done < total:
            self._say(f"{done} of {total} done")

    def end(self) -> None:
        """Say how long it took, unless all was done already."""
        if any(self.costs):
            self._print(f"all {len(self.costs)} done in {clock(time.monotonic() - self.began)}")

    def _say(self, what: str) -> None:
        if not self.costs[self.index] or time.monotonic() - self.last < self.every:
            return
        worked = sum(self.costs[: self.index]) + self.here
        left, elapsed = sum(self.costs) - worked, time.monotonic() - self.began
        known = worked > 0 and elapsed > self.every
        estimate = f", about {clock(elapsed / worked * left)} left" if known else ""
        job = f"[{self.index + 1}/{len(self.costs)}] {self.label}: {what}"
        self._print(f"{job}; {clock(elapsed)} gone{estimate}")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        if self.verbose:
            if in_notebook():
                from IPython.display import clear_output

                clear_output(wait=True)
            print(text, flush=True)


def in_notebook() -> bool:
    """Whether IPython runs this; where it does not, it need not be installed."""
    ipython = sys.modules.get("IPython")
    return bool(ipython and ipython.get_ipython())


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
