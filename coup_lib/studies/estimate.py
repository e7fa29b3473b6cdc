"""What a notebook will cost on this machine: its network calls counted, at the speed of one of them here.

python -m coup_lib.studies.estimate --profile cifar10 --budget full
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from coup_lib.attacks import NORMS
from coup_lib.checks import choice
from coup_lib.data import SHAPES, is_here, load_split
from coup_lib.defences import PAPER, PURIFIERS, SWITCH, is_guided, purifications
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.profiles import BUDGETS, PROFILES
from coup_lib.evaluation.run import Evaluation, Job, Source, planning
from coup_lib.gradients import ACTIVATION_BUDGET, activation_bytes
from coup_lib.likelihood import N_STEPS
from coup_lib.networks import published
from coup_lib.networks.checkpoints import CheckpointError
from coup_lib.networks.precision import PRECISIONS, products
from coup_lib.networks.zoo import is_ours, load_classifier, load_score, missing, needed
from coup_lib.reporting.tables import markdown
from coup_lib.sde import VPSDE
from coup_lib.solver import time_grid
from coup_lib.studies import ablation as clean
from coup_lib.studies import adversarial_training as cross
from coup_lib.studies import beyond, bpda, case_study, fidelity, likelihood_study, mechanism, sweeps
from coup_lib.studies import stronger_attacks as stronger

SHORT = 120  # seconds: of less work than that nothing is said
TIMED_FLOP = {"cpu": 5e8, "cuda": 5e12}  # in one timed call, a tenth of a second or so
USABLE = 0.8  # of the free memory
SMOOTHED = 4  # calls of the classifier that a smoothed one takes
TABLE_HEAD = ("images", "purifications", "gradients", "network calls", "PFLOP", "GiB", "GiB on disk", "hours")


@dataclass(frozen=True)
class Notebook:
    """settings: of each of its configurations. run: what it attacks, given these and its own parameters."""

    settings: tuple[dict[str, Any], ...]
    run: Callable[..., Any]


def _case_study(config: Config, eps_factors: Sequence[float] = case_study.EPS_FACTORS) -> None:
    for one in case_study.radii(config, eps_factors):
        Evaluation(one).run({"reverse": [Source("apgd-ce", "reverse", config.gradient)]})


def _ablation(config: Config, many: Config, classifiers: Sequence[str] | None = None) -> None:
    for classifier in classifiers or config.sizes.classifiers:
        Evaluation(config, classifier).columns(("diffpure", "reverse", "coup"))
        clean.measure(many, classifier)


def _sweeps(
    config: Config,
    confirm: Config,
    t_stars: Sequence[float] = sweeps.T_STARS,
    guidance_weights: Sequence[float] = sweeps.WEIGHTS,
) -> None:
    times = sweeps.values_to_sweep(config, "t_star", t_stars)
    weights = sweeps.values_to_sweep(config, "guidance_weight", guidance_weights)
    sweeps.sweep(config, "t_star", times)
    sweeps.sweep(replace(config, guidance_weight=0), "t_star", times)
    sweeps.sweep(config, "guidance_weight", weights)
    sweeps.measure(confirm)  # and what stands best on validation, which only the sweeps can tell


def _autoattack(config: Config, compare: Config) -> None:
    Evaluation(config).columns(PAPER, autoattack=True)
    fidelity.gradient_cosines(config)
    likelihood_study.measure(compare)


def _bpda(config: Config, eot_counts: Sequence[int] | None = None, purifications: int | None = None) -> None:
    counts = bpda.checked_counts(eot_counts, config)
    counted = replace(config, n_draws=purifications or bpda.PURIFICATIONS[config.budget])
    Evaluation(counted).scores({name: bpda.sources(name, counts, config.eot) for name in PAPER})


def _stronger(config: Config) -> None:
    stronger.columns(Evaluation(config))
    stronger.eps_series(config)
    stronger.clean_landscapes(config)
    mechanism.sign_control(config)
    mechanism.smooth_control(config)
    mechanism.reached(config)
    mechanism.gradient_statistics(config)
    mechanism.all_slopes(config)
    mechanism.landscapes(config)


def _beyond(search: Config, confirm: Config, weights: Sequence[float] | None = None) -> None:
    found = beyond.scores(search, beyond.settings(weights or beyond.WEIGHTS[search.budget]))
    chosen = beyond.to_confirm(beyond.best_guided(found), confirm.guidance_weight)
    beyond.scores(confirm, chosen, both_ways=True)


VALIDATION = {"split": "validation"}
NOTEBOOKS = {
    "01_case_study": Notebook(({"purpose": "compare"},), _case_study),
    "02_ablation": Notebook(({}, {"purpose": "clean"}), _ablation),
    "03_sweeps": Notebook(({"purpose": "sweep"} | VALIDATION, {"purpose": "sweep"}), _sweeps),
    "04_autoattack": Notebook(({}, {"purpose": "compare"}), _autoattack),
    "05_bpda": Notebook(({"purpose": "sweep"},), _bpda),
    "06_adversarial_training": Notebook(
        tuple({"purpose": "sweep", "norm": norm} for norm in NORMS),
        lambda *configs: cross.measure(dict(zip(NORMS, configs, strict=True))),
    ),
    "07_stronger_attacks": Notebook(({"purpose": "probe"},), _stronger),
    "08_beyond": Notebook(({"purpose": "search"} | VALIDATION, {"purpose": "compare"}), _beyond),
}


def jobs(name: str, *configs: Config, **own: Any) -> list[Job]:
    """What the notebook would attack and score with these configurations, each once; nothing is computed.

    own: parameters of this notebook alone, such as t_stars; its defaults where left out. ValueError for an
    unknown notebook.
    """
    choice("notebook", name, NOTEBOOKS)
    with planning() as found, redirect_stdout(StringIO()):
        NOTEBOOKS[name].run(*configs, **own)
    planned: list[Job] = []
    known: set[Any] = set()  # records and scores that are made by then
    for job in found:
        scores = {target: (job.record, str(job.config), target) for target in job.targets}
        left = tuple(target for target, score in scores.items() if score not in known)
        if left or job.record not in known:
            planned.append(replace(job, targets=left, shared=job.record in known))
        known |= {job.record, *scores.values()}
    return planned


def show(name: str, *configs: Config, **own: Any) -> None:
    """Print the notebook's row, and a batch size that fits, before long work starts; own as in `jobs`.

    Data and networks are looked for first, see `obtain`.
    """
    obtain(jobs(name, *configs, **own))
    planned = jobs(name, *configs, **own)  # again, for records have names now
    if all(job.done for job in planned):
        print(f"{name}: the record of every attack is here, none is to be computed")
        return
    row = estimate(planned)
    if row["hours"] * 3600 > SHORT:
        print(*_lines(name, row), f"\n{suggestion(configs[0], row['GiB'])}", sep="\n")


def obtain(planned: Iterable[Job]) -> None:
    """See that the images and networks that these jobs take are here, or fetch them.

    Raises what `data.load_split` and `published.obtain` raise where they cannot be had: of networks, all that
    are missing are named at once.
    """
    planned = list(planned)
    for which in {(job.config.sizes.dataset, job.config.split, job.config.subset) for job in planned}:
        load_split(*which)
    published.obtain(_networks(planned, needed))


def _networks(planned: Iterable[Job], which: Callable[..., list[str]]) -> list[str]:
    """Of the networks that the jobs take those that are `zoo.needed` or `zoo.missing`."""
    taken: dict[tuple[str, str], dict[str, None]] = {}
    for job in planned:
        sizes = job.config.sizes
        taken.setdefault((sizes.dataset, sizes.score), {}).update(dict.fromkeys(job.classifiers))
    return [name for (dataset, score), names in taken.items() for name in which(dataset, names, score)]


# What is computed


def work(job: Job, *, replayed: bool) -> tuple[np.ndarray, np.ndarray]:
    """`network_calls` of one image's attack, and of scoring what it found."""
    (gradients, forwards), source = job.calls, job.source
    attack = forwards * network_calls(job, source.defence)
    if gradients:
        attack = attack + gradients * network_calls(job, source.defence, source.gradient, replayed=replayed)
    scored = [network_calls(job, target) for target in job.targets if target != "none"]
    return attack, 2 * job.config.n_draws * sum(scored, np.zeros(2))


def network_calls(
    job: Job, defence: str, gradient: str | None = None, *, replayed: bool = False
) -> np.ndarray:
    """Calls of the score network and of the classifier, (2,), in one image's purifications and decision.

    A derivative counts as a call: that of a convolution takes as many operations as the convolution.

    gradient: of a loss of the decision; None: no gradient. replayed: each step is taken once more for it.
    """
    decision = np.array([0, 1 if gradient is None else 2])
    if defence == "none":
        return decision
    own, guidance = calls_of_a_step(defence)
    step, steps = own + _guided_share(defence, job.config.t_star) * guidance, _steps(job, defence)
    if gradient == "adjoint":  # the path, torchsde's own path, and back with the drift and its derivative
        step = 4 * step
    elif gradient is not None:
        again = replayed or PURIFIERS[defence].maximised
        step = (1 + again) * step + (own if gradient == "first_order" else step)
    return purifications(defence) * (steps * step + decision)


def calls_of_a_step(defence: str) -> tuple[np.ndarray, np.ndarray]:
    """Calls of the score network and of the classifier, (2,), in a purifier's step, and in its guidance."""
    recipe = PURIFIERS[defence]
    if recipe.maximised:  # by the gradient of a denoiser's error
        return np.array([2, 0]), np.array([0, 2 * is_guided(defence)])
    draws = SMOOTHED if defence == "smoothed" else 1
    return np.array([1, 0]), np.array([2 * recipe.through_score, 2 * draws * is_guided(defence)])


def _guided_share(defence: str, t_star: float) -> float:
    """The part of a path's steps that have guidance, if any has."""
    late = min(SWITCH / t_star, 1.0)
    return {"late": late, "late-denoised": late, "early": 1 - late}.get(defence, 1.0)


def _steps(job: Job, defence: str) -> int:
    if PURIFIERS[defence].maximised:
        return N_STEPS
    return (job.source.n_steps if defence == job.source.defence else None) or job.config.n_steps


# What that takes


def estimate(planned: Iterable[Job]) -> dict[str, float]:
    """A row by `TABLE_HEAD`: of all that the jobs compute, but hours only of what is left.

    network calls: of the score network, a derivative counting as one. GiB: of its activations and the states
    at the batch of the profile, for the path that takes most. GiB on disk: of the attacked images, float32;
    they do not compress. hours: at the speed of the score network and its derivative.
    """
    row = dict.fromkeys(TABLE_HEAD, 0.0)
    for job in planned:
        config, source, (gradients, forwards) = job.config, job.source, job.calls
        n, pixels = config.n_images, prod(SHAPES[config.sizes.dataset])
        attack, scores = work(job, replayed=_replays(job))
        flop = np.array([_score_network(config).flop, _classifier_flop(config.sizes.dataset, job.classifier)])
        decided = [(source.defence, forwards), *((target, 2 * config.n_draws) for target in job.targets)]
        row["images"] = max(row["images"], n)
        row["purifications"] += n * sum(k * purifications(name) for name, k in decided if name != "none")
        row["gradients"] += n * gradients
        row["network calls"] += n * float((attack + scores)[0])
        row["PFLOP"] += n * float((attack + scores) @ flop) / 1e15
        row["GiB on disk"] += n * pixels * 4 / 2**30 * job.makes_images
        row["GiB"] = max(row["GiB"], bytes_per_image(job) * config.sizes.max_batch / 2**30)
        if not job.done:
            speeds = {name: _score_network(config, name).speed for name in {"float32", config.precision}}
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
    operations per second, of calls with their derivatives.
    """

    flop: float
    kept: int
    speed: float


def _score_network(config: Config, precision: str = "float32") -> Measured:
    return _measured_once(config.profile, config.device, precision)


@cache
def _measured_once(profile: str, device: str, precision: str) -> Measured:
    config = Config(profile=profile, device=device, n_images=1)
    dataset, where = config.sizes.dataset, config.torch_device
    score = load_score(dataset, config.sizes.score, trained=False, precision=precision).to(where)
    x, times = torch.rand(1, *SHAPES[dataset], device=where), time_grid(0.1, 1)
    with FlopCounter() as counter, products(precision):
        kept = activation_bytes(score, VPSDE(), x, times)
    most = min(TIMED_FLOP.get(where.type, TIMED_FLOP["cpu"]) / counter.total, fitting(config, kept))
    x = x.repeat(int(min(max(most, 1), config.sizes.max_batch)), 1, 1, 1).requires_grad_()
    for _ in range(1 if len(x) == 1 else 2):  # the first call of a shape is slower
        began = time.perf_counter()
        with products(precision):
            torch.autograd.grad(score(x, times[0].to(x)).sum(), x)
        if x.is_cuda:
            torch.cuda.synchronize()
    took = time.perf_counter() - began
    return Measured(counter.total, kept, speed=2 * len(x) * counter.total / took)


@cache
def _classifier_flop(dataset: str, name: str) -> float:
    """Of one call on one image."""
    # Published networks are large; on the meta device they take neither memory nor time.
    with torch.device("cpu" if is_ours(dataset, name) else "meta"), torch.no_grad():
        classifier = load_classifier(dataset, name, trained=False)
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


# Memory


def bytes_per_image(job: Job) -> int:
    """What a gradient keeps at once: of one step, which is replayed, and all N + 1 states."""
    config, defence = job.config, job.source.defence
    if defence == "none":
        return 0
    return _step_bytes(job) + (_steps(job, defence) + 1) * prod(SHAPES[config.sizes.dataset]) * 4


def _step_bytes(job: Job) -> int:
    own, guidance = calls_of_a_step(job.source.defence)
    return (own + guidance)[0] * _score_network(job.config).kept


def _replays(job: Job) -> bool:
    """Whether the attacked path has too many activations to be kept, so that every step is gone once more."""
    config, source = job.config, job.source
    if source.defence == "none":
        return False
    together = min(config.n_images, config.sizes.chunk_size) * (source.eot or config.eot)
    # On a CPU an attack takes as few images at once as fit.
    batch = 1 if config.torch_device.type == "cpu" else min(together, config.sizes.max_batch)
    return _step_bytes(job) * _steps(job, source.defence) * batch > ACTIVATION_BUDGET


def suggestion(config: Config, gib: float) -> str:
    """What batch fits into this device's memory, when the profile's takes so many GiB."""
    batch = config.sizes.max_batch
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


# For people


def _lines(name: str, row: dict[str, float]) -> list[str]:
    """Heading, rule and row of a table; hours below a tenth as minutes."""
    cells = {head: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for head, value in row.items()}
    if row["hours"] < 0.1:
        cells["hours"] = f"{60 * row['hours']:.1f} min"
    return markdown(pd.DataFrame(cells, index=pd.Index([name], name="notebook"))).splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a row for each notebook as soon as it is known, and their sum."""
    parser = argparse.ArgumentParser(description="What every notebook will cost on this machine.")
    parser.add_argument("--profile", default="digits", choices=PROFILES)
    parser.add_argument("--budget", default="quick", choices=BUDGETS)
    parser.add_argument("--norm", default="linf", choices=NORMS)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--classifier")
    parser.add_argument("--subset")
    parser.add_argument("--n-images", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--obtain", action="store_true", help="only see that data and networks are here")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="04_autoattack, 04_autoattack@l2 …")
    given = vars(parser.parse_args(arguments))
    only_obtain, runs = given.pop("obtain"), given.pop("notebooks") or list(NOTEBOOKS)
    try:
        plans = {run: _planned(run, given) for run in runs}
        if only_obtain:
            obtain(chain(*plans.values()))
            return
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    print(_absent(list(chain(*plans.values()))), end="\n\n", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for run, planned in plans.items():
        rows[run] = estimate(planned)
        print(*_lines(run, rows[run])[2 if len(rows) > 1 else 0 :], sep="\n", flush=True)
    total = {head: sum(row[head] for row in rows.values()) for head in TABLE_HEAD}
    total |= {head: max(row[head] for row in rows.values()) for head in ("images", "GiB")}
    if len(rows) > 1:
        print(_lines("all of them", total)[-1])
    print(f"\n{suggestion(Config(**given), total['GiB'])}")


def _planned(run: str, given: dict[str, Any]) -> list[Job]:
    """The jobs of a notebook, or with @l2 behind its name of the notebook in that norm."""
    name, _, norm = run.partition("@")
    given = given | ({"norm": norm} if norm else {})
    return jobs(name, *_configs(name, given), **_own(name, given))


def _configs(name: str, given: dict[str, Any]) -> list[Config]:
    settings = NOTEBOOKS[choice("notebook", name, NOTEBOOKS)].settings
    return [Config(**given | fixed) for fixed in settings]


def _own(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """02_ablation takes every classifier of the profile, unless one is named."""
    one = given["classifier"] if name == "02_ablation" else None
    return {"classifiers": [one]} if one else {}


def _absent(planned: Sequence[Job]) -> str:
    """What of the jobs' images and networks is not here."""
    datasets = dict.fromkeys(job.config.sizes.dataset for job in planned)
    absent = [name for name in datasets if not is_here(name)] + _networks(planned, missing)
    return f"Still to be fetched: {', '.join(absent)}" if absent else "Data and networks are here."


if __name__ == "__main__":
    main()
