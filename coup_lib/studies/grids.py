"""Every experiment of the notebooks as data: which defences face which attacks, under which settings.

Notebooks ask `prepare` before long work; workflow/ counts and shares the same grids.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coup_lib.attacks import NORMS
from coup_lib.checks import choice, in_one_line
from coup_lib.data import SHAPES, load_split
from coup_lib.defences import PAPER
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.progress import foretell, say
from coup_lib.evaluation.protocol import Evaluation, Experiment, Grid, Measurement, paper_attacks
from coup_lib.networks import published, zoo
from coup_lib.networks.precision import products
from coup_lib.studies import (
    ablation,
    adversarial_training,
    beyond,
    bpda,
    case_study,
    likelihood_study,
    mechanism,
    rivals,
    stronger_attacks,
    sweeps,
)

VALIDATION = {"split": "validation"}


def _case_study(config: Config, eps_factors: Sequence[float] = case_study.EPS_FACTORS) -> Grid:
    return [case_study.experiment(one) for one in case_study.radii(config, eps_factors)]


def _ablation(config: Config, many: Config, classifiers: Sequence[str] | None = None) -> Grid:
    faced = paper_attacks(ablation.PURIFIERS, config)
    return [
        Experiment(each, attacks, name)
        for name in classifiers or config.setup.classifiers
        for each, attacks in ((config, faced), (many, ablation.CLEAN_IMAGES))
    ]


def _sweeps(
    config: Config,
    confirm: Config,
    t_stars: Sequence[float] = sweeps.T_STARS,
    guidance_weights: Sequence[float] = sweeps.WEIGHTS,
) -> Grid:
    times = sweeps.values_to_sweep(config, "t_star", t_stars)
    weights = sweeps.values_to_sweep(config, "guidance_weight", guidance_weights)
    plain = replace(config, guidance_weight=0)
    settings = [sweeps.at(each, "t_star", t) for each in (config, plain) for t in times]
    settings += [sweeps.at(config, "guidance_weight", weight) for weight in weights]
    # And what stands best on validation, which only the sweeps can tell.
    return [Experiment(each, sweeps.attacks(each)) for each in (*settings, confirm)]


def _autoattack(config: Config, compare: Config) -> Grid:
    return [
        Experiment(config, paper_attacks(PAPER, config, autoattack=True)),
        Experiment(compare, likelihood_study.attacks()),
    ]


def _bpda(config: Config, eot_counts: Sequence[int] | None = None, purifications: int | None = None) -> Grid:
    return [bpda.experiment(config, eot_counts, purifications)]


def _adversarial_training(*configs: Config) -> Grid:
    return [
        Experiment(config, paper_attacks(adversarial_training.DEFENCES, config), name)
        for config in configs
        for name in adversarial_training.classifiers(config).values()
    ]


def _stronger_attacks(config: Config) -> Grid:
    draws, steps = mechanism.LANDSCAPE_DRAWS, len(mechanism.LANDSCAPE)
    decisions = 2 * stronger_attacks.MANY + stronger_attacks.draws_looked_at(config)
    return [
        stronger_attacks.experiment(config),
        *stronger_attacks.outside_experiments(config),
        *(Measurement(config, name, (0, decisions), config.n_images) for name in PAPER),
        *stronger_attacks.eps_experiments(config),
        *(Measurement(config, name, (draws, steps * draws), config.n_images) for name in PAPER),
        *mechanism.experiments(config),
        *mechanism.measurements(config),
    ]


def _beyond(
    search: Config, confirm: Config, compared: Config, weights: Sequence[float] | None = None
) -> Grid:
    # Which setting wins is known after the search only; the paper's own stands for it.
    chosen = beyond.to_confirm(beyond.Setting("coup", confirm.guidance_weight), confirm.guidance_weight)
    found = [
        *beyond.experiments(search, beyond.settings(weights or beyond.WEIGHTS[search.budget])),
        *beyond.experiments(search, rivals.settings(search.budget), lent=()),
        *beyond.experiments(confirm, chosen, both_ways=True),
    ]
    return [*(experiment for _, experiment in found), *rivals.planned(compared)]


# --- what notebooks compute beside their grids, or know only when these are there ---


def _confirmed(config: Config, confirm: Config) -> None:
    times = sweeps.sweep(config, "t_star", sweeps.values_to_sweep(config, "t_star", sweeps.T_STARS))
    tried = sweeps.values_to_sweep(config, "guidance_weight", sweeps.WEIGHTS)
    sweeps.confirm(times, sweeps.sweep(config, "guidance_weight", tried), confirm)


def _counts(config: Config) -> None:
    evaluation = Evaluation(config)
    columns = stronger_attacks.columns(evaluation)
    stronger_attacks.counts(evaluation, columns, evaluation.recorded(columns))
    stronger_attacks.clean_landscapes(config)
    mechanism.measure(config)


def _winners(search: Config, confirm: Config, compared: Config) -> None:
    tried = beyond.measure(search, beyond.settings(beyond.WEIGHTS[search.budget]))
    chosen = beyond.to_confirm(beyond.best_guided(tried), confirm.guidance_weight)
    beyond.measure(confirm, chosen, both_ways=True)
    tried |= beyond.measure(search, rivals.settings(search.budget), lent=())
    others = beyond.measure(compared, rivals.chosen(tried, compared.guidance_weight), lent=())
    rivals.rows(others, rivals.guides_alone(compared), compared)


@dataclass(frozen=True)
class Notebook:
    """settings: of each of its configurations. grid: what it attacks, given these and its own parameters.

    rest: computes what else it takes, given its configurations.
    """

    settings: tuple[dict[str, Any], ...]
    grid: Callable[..., Grid]
    rest: Callable[..., None] | None = None


NOTEBOOKS = {
    "01_case_study": Notebook(({"purpose": "compare"},), _case_study),
    "02_ablation": Notebook(({}, {"purpose": "clean"}), _ablation),
    "03_sweeps": Notebook(({"purpose": "sweep"} | VALIDATION, {"purpose": "sweep"}), _sweeps, _confirmed),
    "04_autoattack": Notebook(({}, {"purpose": "compare"}), _autoattack),
    "05_bpda": Notebook(({"purpose": "sweep"},), _bpda),
    "06_adversarial_training": Notebook(
        tuple({"purpose": "sweep", "norm": norm} for norm in NORMS), _adversarial_training
    ),
    "07_stronger_attacks": Notebook(({"purpose": "probe"},), _stronger_attacks, _counts),
    "08_beyond": Notebook(
        ({"purpose": "search"} | VALIDATION, {"purpose": "compare"}, {"purpose": "rivals"}), _beyond, _winners
    ),
}


@in_one_line()
def grid(name: str, *configs: Config, **own: Any) -> Grid:
    """What a notebook attacks with these configurations; own: parameters of this notebook alone.

    ValueError for an unknown notebook.
    """
    return NOTEBOOKS[choice("notebook", name, NOTEBOOKS)].grid(*configs, **own)


def obtain(experiments: Grid) -> None:
    """Before long work: see that a grid's images and networks are here, or fetch them.

    Raises what `data.load_split` and `published.obtain` raise where they cannot be had: of networks, all that
    are missing are named at once.
    """
    for which in {(one.config.setup.dataset, one.config.split, one.config.subset) for one in experiments}:
        load_split(*which)
    published.obtain(networks(experiments, zoo.needed))


def prepare(experiments: Grid) -> None:
    """Before long work: `obtain`, then print in one line what is to be done, and for how long.

    The time is that of a call of the score network here; what is measured beside the attacks is not counted.
    """
    obtain(experiments)
    left: dict[Path, float] = {}
    for one in experiments:
        if isinstance(one, Experiment):
            left |= Evaluation(one.config, one.classifier).left(one.attacks)
    if left:
        config = experiments[0].config
        foretell(left, seconds_of_a_call(config), config.torch_device)
    else:
        say("Every attack is on record, so none is run.")


def seconds_of_a_call(config: Config, precision: str = "float32") -> float:
    """Of the score network in this precision, per image."""
    setup, device = config.setup, config.torch_device
    score = zoo.load_score(setup.dataset, setup.score, trained=False, precision=precision).to(device)
    fast = device.type != "cpu" or zoo.is_ours(setup.dataset, setup.score)
    n = min(256, config.max_batch) if fast else 1
    x, t = torch.rand(n, *SHAPES[setup.dataset], device=device), torch.tensor(0.1, device=device)
    took = []
    with torch.no_grad(), products(precision):
        for _ in range(3 if fast else 1):  # the first call of a shape is slower
            began = time.perf_counter()
            score(x, t).cpu()
            took.append(time.perf_counter() - began)
    return min(took) / n


def networks(experiments: Grid, which: Callable[..., list[str]]) -> list[str]:
    """Of the networks that a grid takes those that are `zoo.needed` or `zoo.missing`."""
    taken: dict[tuple[str, str], dict[str, None]] = {}
    for one in experiments:
        setup = one.config.setup
        names = one.classifiers if isinstance(one, Experiment) else [one.config.classifier]
        taken.setdefault((setup.dataset, setup.score), {}).update(dict.fromkeys(names))
    return [name for (dataset, score), names in taken.items() for name in which(dataset, [*names], score)]


def of_run(run: str, given: dict[str, Any]) -> Grid:
    """The grid of a notebook, or with @l2 behind its name of the notebook in that norm.

    given: parameters of `Config`.
    """
    name = run.partition("@")[0]
    # 02_ablation takes every classifier of the profile, unless one is named.
    own = {"classifiers": [given["classifier"]]} if name == "02_ablation" and given.get("classifier") else {}
    return grid(name, *configurations(run, given), **own)


def configurations(run: str, given: dict[str, Any]) -> list[Config]:
    """Those of a notebook's grid, `of_run`."""
    name, _, norm = run.partition("@")
    given = given | ({"norm": norm} if norm else {})
    settings = NOTEBOOKS[choice("notebook", name, NOTEBOOKS)].settings
    return [Config(**given | fixed) for fixed in settings]


def compute(run: str, given: dict[str, Any]) -> None:
    """Make all records that a notebook takes, without the notebook; run and given are those of `of_run`."""
    for one in of_run(run, given):
        if isinstance(one, Experiment):
            one.predictions()
    if rest := NOTEBOOKS[run.partition("@")[0]].rest:
        rest(*configurations(run, given))
