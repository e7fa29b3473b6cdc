"""All of the profile cifar10-small, in parts: its networks, trained on all of CIFAR-10, then every record.

The steps stand in the order of what they are worth. A part ends after --minutes, and one that is killed loses
a chunk of images at most: the same command goes on, on another machine if the folder comes along. Into FOLDER
go training/ (states), weights/ (with a model card), results/ (records) and session.json; nothing is written
elsewhere. What is on record is drawn by

    COUP_WEIGHTS=FOLDER/weights COUP_RESULTS=FOLDER/results papermill ...    (printed when a step begins)
"""

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from coup_lib.data import load_split
from coup_lib.evaluation import records
from coup_lib.evaluation.progress import clock
from coup_lib.evaluation.protocol import Evaluation, Experiment
from coup_lib.files import write_atomically
from coup_lib.gradients import BUDGET_VARIABLE
from coup_lib.paths import SMOKE_VARIABLE, WEIGHTS_VARIABLE, is_smoke
from coup_lib.studies import grids
from training import train
from training.fit import Stopped

TRIAL, SKIPPED = 30, 10  # steps that are timed before a training, but for the first ones
RESERVE = 20  # seconds at the end of a part, to count what is left
SPAWN = get_context("spawn")  # a process reads the paths of records and weights when it starts


@dataclass(frozen=True)
class Training:
    """Trained for so many minutes; the number of steps follows from what one takes here."""

    minutes: float
    batch: int
    precision: str = "float32"


@dataclass(frozen=True)
class Records:
    """Those of a notebook, named as in `grids.of_run`, with these parameters of `Config`."""

    run: str
    given: dict[str, Any]
    adjoint: bool = False

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not here."""
        needed = [("autoattack", "pyautoattack"), *[("torchsde",)] * self.adjoint]
        return [" or ".join(names) for names in needed if not any(map(find_spec, names))]

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters as they are here; a smoke run has sizes of its own."""
        if is_smoke():
            return {key: self.given[key] for key in ("profile", "classifier")}
        return self.given | ({"precision": "tf32"} if torch.cuda.is_available() else {})

    @property
    def papermill(self) -> str:
        """The command that draws figures and tables."""
        notebook, _, norm = self.run.partition("@")
        given = self.settings | ({"norm": norm} if norm else {})
        return f"papermill notebooks/{notebook}.ipynb out.ipynb " + " ".join(
            f"-p {key} {value}" for key, value in given.items()
        )


PAPER = {"profile": "cifar10-small", "classifier": "resnet20", "subset": "paper"}
LARGE = PAPER | {"n_images": 511, "n_iter": 40, "eot": 8}
TABLE = LARGE | {"n_targets": 1, "square_queries": 500}
MIDDLE = PAPER | {"n_images": 128, "n_iter": 20, "eot": 4}
SCORE, CARD = "score-small", "card"
NETWORKS: dict[str, Training | None] = {
    SCORE: Training(13, 1024, "bfloat16"),
    "resnet20-l2": Training(1.5, 256),
    "resnet20-linf": Training(1.5, 256),
    CARD: None,
}
# Counts by ten draws and by their majority come from the records of every table.
TABLES = {
    "fig2b": Records("02_ablation", LARGE),
    "table1": Records("04_autoattack", TABLE),
    "fig2b-l2": Records("02_ablation@l2", LARGE),
    "table2": Records("04_autoattack@l2", TABLE),
    "stronger": Records("07_stronger_attacks", MIDDLE, adjoint=True),
    "sweeps": Records("03_sweeps", MIDDLE | {"n_draws": 10}),
    "bpda": Records("05_bpda", PAPER | {"n_images": 511, "eot": 8}),
    "trained": Records("06_adversarial_training", MIDDLE | {"n_images": 256, "n_draws": 10}),
    "beyond": Records("08_beyond", MIDDLE),
    "case-study": Records("01_case_study", MIDDLE),
    "fig2b-resnet18": Records("02_ablation", LARGE | {"classifier": "resnet18"}),
}
STEPS = (*NETWORKS, *TABLES)


def noted(out: Path) -> dict[str, Any]:
    """What is written down of each step: "done", seconds "left", "steps" and "curve" of a training."""
    file = out / "session.json"
    return {name: {} for name in STEPS} | (json.loads(file.read_text()) if file.exists() else {})


def note(out: Path, name: str, **more: Any) -> None:
    """Write down more of a step."""
    text = json.dumps(noted(out) | {name: noted(out)[name] | more}, indent=1)
    write_atomically(out / "session.json", lambda temporary: temporary.write_text(text))


def left(names: Sequence[str], out: Path) -> list[str]:
    """Those that are not done."""
    known = noted(out)
    return [name for name in names if "done" not in known[name]]


def train_networks(names: Sequence[str], out: Path, minutes: float, end: float) -> None:
    """Train networks and write their model card, until that is done or time is over."""
    follow_parent()
    for name in names:
        step, arguments = NETWORKS[name], ["--dataset", "cifar10", "--folder", str(out / "weights")]
        if step:
            arguments += ["--only", name, "--batch", str(4 if is_smoke() else step.batch)]
            arguments += ["--precision", step.precision, *["--compiled"] * torch.cuda.is_available()]
            wanted = 0.02 if is_smoke() else minutes if name == SCORE else step.minutes
            train_one(name, arguments, out, wanted, end)
        else:
            train.main([*arguments, "--card-only", "--threads", str(os.cpu_count())])
        note(out, name, done=True)


def train_one(name: str, arguments: list[str], out: Path, minutes: float, end: float) -> None:
    """Train a network, whose number of steps is written down first; exits when time is over."""
    state = out / "training" / f"{name}.pt"
    if "steps" not in noted(out)[name]:
        seconds = step_seconds(name, train.parsed(arguments))
        note(out, name, steps=max(1, int(60 * minutes / seconds)), seconds=seconds)
    steps, seconds = (noted(out)[name][key] for key in ("steps", "seconds"))
    print(f"{name}: {steps} steps of {1000 * seconds:.0f} ms", flush=True)
    options = train.parsed([*arguments, "--steps", str(steps)])
    try:
        train.make(name, options, state, watch=lambda step: time.monotonic() > end)
    except Stopped as stopped:
        print(f"{name}: stopped {stopped}", flush=True)
        sys.exit()
    finally:
        if state.exists():
            run = torch.load(state, map_location="cpu", weights_only=True)
            note(out, name, curve=run["curve"], left=(steps - run["step"]) * seconds)


def step_seconds(name: str, options: argparse.Namespace) -> float:
    """What a step of a training takes here, by a trial that leaves nothing behind."""
    moments: list[float] = []

    def timed(step: int) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        moments.append(time.monotonic())
        return step == TRIAL

    with suppress(Stopped):
        train.train("cifar10", name, watch=timed, **train.settings(options))
    return (moments[-1] - moments[SKIPPED]) / (len(moments) - SKIPPED - 1)


def make_records(names: Sequence[str], out: Path, worker: int, count: int, end: float) -> None:
    """Make the records of steps as one of so many processes; the first one says and notes how far it is."""
    follow_parent()
    before, began = {} if worker else costs(names), time.monotonic()
    with silenced() if worker else nullcontext(), suppress(records.OutOfTime), records.until(end):
        for name in names:
            print(f"{name}: {TABLES[name].papermill}", flush=True)
            grids.compute(TABLES[name].run, TABLES[name].settings | {"shard": worker, "num_shards": count})
            if not worker:
                note(out, name, done=True)
    after = {} if worker else costs(names)
    if made := sum(before.values()) - sum(after.values()):
        seconds = (time.monotonic() - began) / made
        for name, cost in after.items():
            note(out, name, left=seconds * cost)


@contextmanager
def silenced() -> Iterator[None]:
    """In here nothing is printed; an error that leaves it is."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def costs(names: Sequence[str]) -> dict[str, float]:
    """What is left of steps, in score evaluations; a record that several of them take counts once."""
    found, known = dict.fromkeys(names, 0.0), set()
    for name in names:
        for part in grids.of_run(TABLES[name].run, TABLES[name].settings):
            if isinstance(part, Experiment):
                missing = Evaluation(part.config, part.classifier).left(part.attacks)
                found[name] += sum(cost for path, cost in missing.items() if path not in known)
                known |= {*missing}
    return found


def follow_parent() -> None:
    """End this process when the one that started it does, however that ends."""

    def follow() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run(target: Callable[..., None], *given: tuple[Any, ...], end: float) -> bool:
    """A process for each of the given arguments, until all or time have ended; whether none failed."""
    started = [SPAWN.Process(target=target, args=arguments, daemon=True) for arguments in given]
    for process in started:
        process.start()
    for process in started:
        process.join(None if end == math.inf else max(0.0, end - time.monotonic()))
    failed = any(process.exitcode for process in started)
    for process in started:
        process.terminate()
    return not failed


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exit code 2 for an unknown step or where CIFAR-10 is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.cifar10_small",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, default = parser.add_argument, "(default: %(default)g)"
    several = max(1, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 1
    option("--out", type=Path, required=True, metavar="FOLDER", help="all that has to be kept between parts")
    option("--minutes", type=float, default=math.inf, help="of this part (default: until all is done)")
    option(
        "--only", nargs="+", metavar="STEP", choices=STEPS, help=f"out of {', '.join(STEPS)} (default: all)"
    )
    option("--train", type=float, default=13, metavar="MINUTES", help=f"of the score network {default}")
    option("--processes", type=int, default=several, help=f"that attack at a time {default}")
    option("--smoke", action="store_true", help="the smallest sizes, to see that all is in place")
    options = parser.parse_args(arguments)
    try:
        load_split("cifar10", "test")
    except FileNotFoundError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exit code 1 where a process failed."""
    began, options = time.monotonic(), parsed(arguments)
    out, end, count = options.out.absolute(), began + 60 * options.minutes, options.processes
    if options.smoke:
        out, os.environ[SMOKE_VARIABLE] = out / "smoke", "1"
    (out / "weights").mkdir(parents=True, exist_ok=True)
    os.environ |= {"COUP_RESULTS": str(out / "results"), WEIGHTS_VARIABLE: str(out / "weights")}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if torch.cuda.is_available():  # each process would take half of what it finds free
        memory = torch.cuda.get_device_properties(0).total_memory
        os.environ.setdefault(BUDGET_VARIABLE, f"{memory / 2**31 / count:.2f}")
    chosen = [name for name in STEPS if name in (options.only or STEPS)]
    networks = [name for name in left(chosen, out) if name in NETWORKS]
    tables = [name for name in left(chosen, out) if name in TABLES]
    for name in tables:
        if missing := TABLES[name].missing:
            print(f"{name} is left out, for want of {' and '.join(missing)}", flush=True)
    tables = [name for name in tables if not TABLES[name].missing]
    fine = not networks or run(train_networks, (networks, out, options.train, end - RESERVE), end=end)
    if tables and not left(networks, out):
        workers = [(tables, out, worker, count, end - RESERVE) for worker in range(count)]
        fine = run(make_records, *workers, end=end) and fine
    print(report(chosen, out), flush=True)
    sys.exit(not fine)


def report(names: Sequence[str], out: Path) -> str:
    """What is done, what is left, and how long that will take as far as it is known."""
    still, known = left(names, out), noted(out)
    done = ", ".join(name for name in names if name not in still) or "nothing"
    timed = [known[name]["left"] for name in still if "left" in known[name]]
    about = f"; about {clock(sum(timed))} min for {len(timed)} of them" if timed else ""
    return f"done: {done}; left: {', '.join(still) or 'nothing'}{about}"


if __name__ == "__main__":
    main()
