"""Progress of long work, one line now and then, with an estimate of the time left."""

import time
from collections.abc import Sequence


class Plan:
    """Progress over a list of jobs of foreseen cost, with an estimate of the time left.

    Jobs that are done already are passed over in silence.

    Args:
        costs: of each job, in any unit; 0 for one that is done already.
        every: seconds between two lines within a job; the first estimate comes after as many.
    """

    def __init__(self, costs: Sequence[float], *, verbose: bool, every: float = 10.0) -> None:
        self.costs, self.verbose, self.every = list(costs), verbose, every
        self.index, self.here = -1, 0.0
        self.began = self.last = time.monotonic()

    def start(self, label: str) -> None:
        """Begin the next job."""
        self.index, self.label, self.here = self.index + 1, label, 0.0
        if self.costs[self.index]:
            self._say("started")

    def advance(self, done: int, total: int) -> None:
        """`done` of the current job's `total` parts are finished."""
        self.here = self.costs[self.index] * done / total
        if done < total and time.monotonic() - self.last > self.every:
            self._say(f"{done} of {total} done")

    def end(self) -> None:
        """Say how long it took."""
        self._print(f"all {len(self.costs)} done in {_clock(time.monotonic() - self.began)}")

    def _say(self, what: str) -> None:
        worked = sum(self.costs[: self.index]) + self.here
        left, elapsed = sum(self.costs) - worked, time.monotonic() - self.began
        known = worked > 0 and elapsed > self.every
        estimate = f", about {_clock(elapsed / worked * left)} left" if known else ""
        job = f"[{self.index + 1}/{len(self.costs)}] {self.label}: {what}"
        self._print(f"{job}; {_clock(elapsed)} gone{estimate}")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        if self.verbose:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
