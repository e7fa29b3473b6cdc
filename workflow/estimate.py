"""What notebooks cost on this machine: their network calls counted, at the speed of one of them here."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from coup_lib.attacks import NORMS
from coup_lib.data import SHAPES, is_here
from coup_lib.defences import PURIFIERS, SMOOTHING_DRAWS, is_guided, purifications
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.profiles import BUDGETS, PROFILES
from coup_lib.evaluation.protocol import Evaluation, Experiment, Grid, Measurement
from coup_lib.evaluation.records import config_hash, is_complete, record_path
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.files import CheckpointError
from coup_lib.gradients import activation_bytes, free_for_activations
from coup_lib.likelihood import N_STEPS
from coup_lib.networks import zoo
from coup_lib.networks.precision import PRECISIONS, products
from coup_lib.sde import VPSDE
from coup_lib.solver import time_grid
from coup_lib.studies.grids import NOTEBOOKS, networks, obtain, of_run, seconds_of_a_call

USABLE = 0.8  # of the free memory


@dataclass(frozen=True)
class Job:
    """One attack of a grid, or a measurement, and the targets whose predictions on its images are wanted."""

    config: Config
    classifier: str
    spec: AttackSpec
    targets: tuple[str, ...]
    calls: tuple[int, int]
    n_images: int
    done: bool
    makes_images: bool = True


def jobs(grid: Grid) -> list[Job]:
    """What is to be done, each attack and each prediction once."""
    found: list[Job] = []
    known: set[Any] = set()  # attacks and predictions that are made by then
    for part in (part for part in grid if isinstance(part, Experiment)):
        named = Evaluation(part.config, part.classifier, by_name=True)
        specs = dict.fromkeys(spec for row in part.attacks.values() for spec in row.values())
        for spec in specs:
            name, settings = named.attack_settings(spec)
            key = name, config_hash(settings)
            scored = {target: (key, target, repr(part.config)) for target, row in part.attacks.items()}
            scored = {target: scored[target] for target, row in part.attacks.items() if spec in row.values()}
            left = tuple(target for target, score in scored.items() if score not in known)
            if left or key not in known:
                found.append(_job(part, named.bench.classifier_name, spec, left, made=key in known))
            known |= {key, *scored.values()}
    done = all(job.done for job in found)
    return found + [_measured(part, done) for part in grid if isinstance(part, Measurement)]


def _measured(part: Measurement, done: bool) -> Job:
    config, spec = part.config, AttackSpec("apgd-ce", part.defence)
    return Job(config, config.classifier, spec, (), part.calls, part.n_images, done, makes_images=False)


def _job(part: Experiment, classifier: str, spec: AttackSpec, targets: tuple[str, ...], *, made: bool) -> Job:
    config = part.config
    calls = (0, 0) if made else spec.calls(config)
    job = Job(config, classifier, spec, targets, calls, config.n_images, done=False, makes_images=not made)
    if not _at_hand(part):  # then no record can be named, and to look ahead nothing is fetched
        return job
    settings = Evaluation(config, classifier).attack_settings(spec)
    return replace(job, done=is_complete(record_path(config.profile, *settings)))


def _at_hand(part: Experiment) -> bool:
    setup = part.config.setup
    return is_here(setup.dataset) and not zoo.missing(setup.dataset, part.classifiers, setup.score)


# --- counting ---


def work(job: Job, *, replayed: float) -> tuple[np.ndarray, np.ndarray]:
    """`network_calls` of one image's attack, and of the predictions on what it found."""
    (gradients, forwards), spec = job.calls, job.spec
    attack = forwards * network_calls(job, spec.surrogate)
    if gradients:
        attack = attack + gradients * network_calls(job, spec.surrogate, spec.gradient, replayed=replayed)
    scored = [network_calls(job, target) for target in job.targets if target != "none"]
    return attack, 2 * job.config.n_draws * sum(scored, np.zeros(2))


def network_calls(job: Job, defence: str, gradient: str | None = None, *, replayed: float = 0) -> np.ndarray:
    """Calls of the score network and of the classifier, (2,), in one image's purifications and decision.

    A derivative counts as a call: that of a convolution takes as many operations as the convolution.

    gradient: of a loss of the decision; None: no gradient. replayed: the share of steps that are taken once
    more for it.
    """
    decision = np.array([0, 1 if gradient is None else 2])
    if defence == "none":
        return decision
    own, guidance = calls_of_a_step(defence)
    step, steps = own + _guided_share(defence, job.config.t_star) * guidance, _steps(job, defence)
    if gradient == "adjoint":  # the path, torchsde's own path, and back with the drift and its derivative
        step = 4 * step
    elif gradient is not None:
        again = 1 if PURIFIERS[defence].maximised else replayed
        step = (1 + again) * step + (own if gradient == "first_order" else step)
    return purifications(defence) * (steps * step + decision)


def calls_of_a_step(defence: str) -> tuple[np.ndarray, np.ndarray]:
    """Calls of the score network and of the classifier, (2,), in a purifier's step, and in its guidance."""
    recipe = PURIFIERS[defence]
    if recipe.maximised:  # by the gradient of a denoiser's error
        return np.array([2, 0]), np.array([0, 2 * is_guided(defence)])
    calls = recipe.guidance.calls if recipe.guidance else 0
    draws = SMOOTHING_DRAWS if recipe.smoothing else 1
    return np.array([1, 0]), np.array([2 * recipe.differentiates_score, calls * draws])


def _guided_share(defence: str, t_star: float) -> float:
    """The part of a path's steps that have guidance, if any has."""
    low, high = PURIFIERS[defence].times
    return max(min(high / t_star, 1.0) - low / t_star, 0.0)


def _steps(job: Job, defence: str) -> int:
    if PURIFIERS[defence].maximised:
        return N_STEPS
    return (job.spec.n_steps if defence == job.spec.surrogate else None) or job.config.n_steps


# --- time and memory ---


def estimate(planned: Iterable[Job]) -> dict[str, float]:
    """A row of all that the jobs compute, but hours only of what is left.

    network calls: of the score network, a derivative counting as one. GiB: of its activations and the states
    at the batch of the profile, for the path that takes most. GiB on disk: of the attacked images, float32.
    hours: at the speed of the score network.
    """
    row = dict.fromkeys(("images", "purifications", "gradients", "network calls", "PFLOP", "GiB"), 0.0)
    row |= {"GiB on disk": 0.0, "hours": 0.0}
    for job in planned:
        config, spec, (gradients, forwards) = job.config, job.spec, job.calls
        n, pixels = job.n_images, prod(SHAPES[config.setup.dataset])
        attack, scores = work(job, replayed=_replayed(job))
        flop = np.array([measured_score(config).flop, classifier_flop(config.setup.dataset, job.classifier)])
        decided = [(spec.surrogate, forwards), *((target, 2 * config.n_draws) for target in job.targets)]
        row["images"] = max(row["images"], n)
        row["purifications"] += n * sum(k * purifications(name) for name, k in decided if name != "none")
        row["gradients"] += n * gradients
        row["network calls"] += n * float((attack + scores)[0])
        row["PFLOP"] += n * float((attack + scores) @ flop) / 1e15
        row["GiB on disk"] += n * pixels * 4 / 2**30 * job.makes_images
        row["GiB"] = max(row["GiB"], bytes_per_image(job) * config.setup.max_batch / 2**30)
        if not job.done:
            speeds = {name: measured_score(config, name).speed for name in {"float32", config.precision}}
            row["hours"] += n * seconds(attack * flop, scores * flop, config.precision, speeds) / 3600
    return row


def seconds(attack: np.ndarray, scores: np.ndarray, precision: str, speeds: dict[str, float]) -> float:
    """How long it takes to attack in this precision and to score what was found, always in float32.

    attack, scores: operations in the score network and in the classifier, (2,). speeds: of each precision,
    operations per second. Only TF32 is the classifier's, too.
    """
    classifier = speeds[precision if precision == "tf32" else "float32"]
    attacking = attack[0] / speeds[precision] + attack[1] / classifier
    return float(attacking + scores.sum() / speeds["float32"])


@dataclass(frozen=True)
class Measured:
    """A network on this machine.

    flop: of one call on one image; multiply and add are two. kept: bytes, for its derivative. speed:
    operations per second, of calls; those of a derivative are as fast, on a CPU within a fifth.
    """

    flop: float
    kept: int
    speed: float


def measured_score(config: Config, precision: str = "float32") -> Measured:
    """The profile's score network, measured once in this process."""
    return _measured_once(config.profile, config.device, precision)


@cache
def _measured_once(profile: str, device: str, precision: str) -> Measured:
    config = Config(profile=profile, device=device, n_images=1)
    dataset, where = config.setup.dataset, config.torch_device
    score = zoo.load_score(dataset, config.setup.score, trained=False, precision=precision).to(where)
    x, times = torch.rand(1, *SHAPES[dataset], device=where), time_grid(0.1, 1)
    with FlopCounter() as counter, products(precision):
        kept = activation_bytes(score, VPSDE(), x, times)
    return Measured(counter.total, kept, speed=counter.total / seconds_of_a_call(config, precision))


@cache
def classifier_flop(dataset: str, name: str) -> float:
    """Of one call on one image."""
    # Published networks are large; on the meta device they take neither memory nor time.
    with torch.device("cpu" if zoo.is_ours(dataset, name) else "meta"), torch.no_grad():
        classifier = zoo.load_classifier(dataset, name, trained=False)
        with FlopCounter() as counter:
            classifier(torch.zeros(1, *SHAPES[dataset]))
    return float(counter.total)


class FlopCounter(TorchDispatchMode):
    """Counts in `total` what convolutions and matrix products take, derivatives of any order included.

    torch.utils' own counter follows modules too, and its hooks fail where a gradient is taken inside of one.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def bytes_per_image(job: Job) -> int:
    """What a gradient keeps at once: of one step, which is replayed, and all N + 1 states."""
    config, defence = job.config, job.spec.surrogate
    if defence == "none":
        return 0
    return bytes_of_a_step(job) + (_steps(job, defence) + 1) * prod(SHAPES[config.setup.dataset]) * 4


def bytes_of_a_step(job: Job) -> int:
    """Of the activations of a step of the surrogate's path, for one image."""
    own, guidance = calls_of_a_step(job.spec.surrogate)
    return (own + guidance)[0] * measured_score(job.config).kept


def _replayed(job: Job) -> float:
    """The share of the attacked path's steps that have no room for their activations and are taken again."""
    config, spec = job.config, job.spec
    if spec.surrogate == "none":
        return 0
    together = min(job.n_images, config.setup.chunk_size) * (spec.eot or config.eot)
    # On a CPU an attack takes as few images at once as fit.
    batch = 1 if config.torch_device.type == "cpu" else min(together, config.setup.max_batch)
    fit = free_for_activations(config.torch_device) // (bytes_of_a_step(job) * batch)
    return max(0.0, 1 - fit / _steps(job, spec.surrogate))


def suggestion(config: Config, gib: float) -> str:
    """What batch fits into this device's memory, when the profile's takes so many GiB."""
    batch = config.setup.max_batch
    free, fits = _free_memory(config) / 2**30, fitting(config, gib / batch * 2**30)
    return (
        f"On {config.torch_device}, {free:.0f} GiB free, up to {fits:,} images fit into one call of the "
        f"score network; the profile takes {batch:,} (max_batch in coup_lib/evaluation/profiles.py). "
        "Should memory run out all the same, the batch is halved."
    )


def fitting(config: Config, per_image: float) -> int:
    """How many images of so many bytes fit into the device's free memory: a power of two."""
    return 2 ** max(0, int(USABLE * _free_memory(config) / max(per_image, 1)).bit_length() - 1)


def _free_memory(config: Config) -> int:
    """Bytes."""
    if config.torch_device.type == "cuda":
        return torch.cuda.mem_get_info(config.torch_device)[0]
    return psutil.virtual_memory().available


def table_lines(name: str, row: dict[str, float]) -> list[str]:
    """Heading, rule and row of a table; hours below a tenth as minutes."""
    cells = {head: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for head, value in row.items()}
    if row["hours"] < 0.1:
        cells["hours"] = f"{60 * row['hours']:.1f} min"
    lines = [["notebook", *cells], ["---"] * (len(cells) + 1), [name, *cells.values()]]
    return ["| " + " | ".join(line) + " |" for line in lines]


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `coup estimate`: a row for each notebook as soon as it is known, and their sum."""
    parser = argparse.ArgumentParser(
        prog="coup estimate",
        description="What notebooks will cost on this machine: hours, memory, PFLOP; nothing is attacked.",
        epilog="example: coup estimate --profile cifar10 --budget full 04_autoattack 04_autoattack@l2",
    )
    option = parser.add_argument
    default = "(default: %(default)s)"
    option("--profile", default="digits", choices=PROFILES, help=f"data and networks {default}")
    option("--budget", default="quick", choices=BUDGETS, help=f"how much work {default}")
    option("--norm", default="linf", choices=NORMS, help=f"of notebooks without @ {default}")
    option("--precision", default="float32", choices=PRECISIONS, help=f"under attack {default}")
    option("--classifier", metavar="NAME", help="(default: the profile's)")
    option("--subset", metavar="NAME", help="of the test images (default: the profile's)")
    option("--n-images", type=int, metavar="N", help="(default: the budget's)")
    option("--device", default="auto", help=f"cpu, cuda, ... {default}")
    option("--obtain", action="store_true", help="only see that data and networks are here, or fetch them")
    option(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="as 04_autoattack, or 04_autoattack@l2 for the other norm (default: all)",
    )
    given = vars(parser.parse_args(arguments))
    only_obtain, runs = given.pop("obtain"), given.pop("notebooks") or list(NOTEBOOKS)
    try:
        plans = {run: of_run(run, given) for run in runs}
        if only_obtain:
            obtain([*chain(*plans.values())])
            return
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    print(_absent([*chain(*plans.values())]), end="\n\n", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for run, plan in plans.items():
        rows[run] = estimate(jobs(plan))
        print(*table_lines(run, rows[run])[2 if len(rows) > 1 else 0 :], sep="\n", flush=True)
    total = {head: sum(row[head] for row in rows.values()) for head in next(iter(rows.values()))}
    total |= {head: max(row[head] for row in rows.values()) for head in ("images", "GiB")}
    if len(rows) > 1:
        print(table_lines("all of them", total)[-1])
    print("\nHours are of what is not on record; COUP_PUBLISHED=build/none counts all.")
    print(suggestion(Config(**given), total["GiB"]))


def _absent(grid: Grid) -> str:
    """What of a grid's images and networks is not here."""
    datasets = dict.fromkeys(one.config.setup.dataset for one in grid)
    absent = [name for name in datasets if not is_here(name)] + networks(grid, zoo.missing)
    return f"Still to be fetched: {', '.join(absent)}" if absent else "Data and networks are here."


if __name__ == "__main__":
    main()
