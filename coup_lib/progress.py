"""Progress of long work, one line now and then, with an estimate of the time left."""

import time
from collections.abc import Sequence


class Plan:
    """Progress over a list of jobs of foreseen cost, with an estimate of the time left."""

    def __init__(self, costs: Sequence[float], *, verbose: bool, every: float = 10.0) -> None:
        self.costs, self.verbose, self.every = list(costs), verbose, every
        self.index, self.spent, self.skipped = -1, 0.0, 0.0
        self.began = self.last = time.monotonic()

    def start(self, label: str, *, done: bool) -> None:
        """Begin the next job; one that is already on disk does not count for the estimate."""
        self.index, self.label, self.done = self.index + 1, label, done
        self.here = 0.0
        self._say("read back" if done else "started")

    def advance(self, chunks: int, total: int) -> None:
        """`chunks` of the current job's `total` are finished."""
        self.here = self.costs[self.index] * chunks / total
        if chunks == total:
            return
        if time.monotonic() - self.last > self.every:
            self._say(f"{chunks}/{total} chunks")

    def end(self) -> None:
        """Say how long it took."""
        self._print(f"{len(self.costs)} attacks in {_clock(time.monotonic() - self.began)}")

    def _say(self, what: str) -> None:
        before = sum(self.costs[: self.index])
        if self.done and not self.here:
            self.skipped += self.costs[self.index]
        worked = before + self.here - self.skipped
        left = sum(self.costs) - before - self.here
        elapsed = time.monotonic() - self.began
        estimate = f", about {_clock(elapsed / worked * left)} left" if worked > 0 and elapsed > 1 else ""
        self._print(
            f"[{self.index + 1}/{len(self.costs)}] {self.label}: {what}; {_clock(elapsed)} gone{estimate}"
        )

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
        if self.verbose:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
