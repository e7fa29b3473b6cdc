"""Every experiment of the notebooks as data: which defences face which attacks, under which settings.

    python -m coup_lib.studies.grids --profile cifar10 --budget full     what each notebook costs here

Notebooks ask `show` before long work starts; workflow/ counts and shares the same grids.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from coup_lib.attacks import NORMS
from coup_lib.checks import choice
from coup_lib.data import is_here
from coup_lib.defences import PAPER
from coup_lib.evaluation import cost
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.cost import (
    Grid,
    Job,
    Measurement,
    estimate,
    jobs,
    networks,
    obtain,
    suggestion,
    table_lines,
)
from coup_lib.evaluation.profiles import BUDGETS, PROFILES
from coup_lib.evaluation.protocol import Experiment, paper_attacks
from coup_lib.files import CheckpointError
from coup_lib.networks import zoo
from coup_lib.networks.precision import PRECISIONS
from coup_lib.studies import (
    ablation,
    adversarial_training,
    beyond,
    bpda,
    case_study,
    fidelity,
    likelihood_study,
    mechanism,
    stronger_attacks,
    sweeps,
)

VALIDATION = {"split": "validation"}


def _case_study(config: Config, eps_factors: Sequence[float] = case_study.EPS_FACTORS) -> Grid:
    rows = {"reverse": {"adaptive": against("apgd-ce", "reverse", config.gradient)}}
    return [Experiment(one, rows) for one in case_study.radii(config, eps_factors)]


def _ablation(config: Config, many: Config, classifiers: Sequence[str] | None = None) -> Grid:
    faced = paper_attacks(ablation.PURIFIERS, config)
    return [
        Experiment(each, attacks, name)
        for name in classifiers or config.sizes.classifiers
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
    # In float64 all of the gradients take longer than is counted; of BPDA's each is a forward pass.
    paths = sum(fidelity.STEP_COUNTS) / config.n_steps
    others = fidelity.COMPARED.values()
    calls = round(paths * sum(map(len, others))), round(paths * len(others))
    return [
        Experiment(config, paper_attacks(PAPER, config, autoattack=True)),
        Measurement(config, "coup", calls, min(fidelity.N_IMAGES, config.n_images)),
        Experiment(compare, likelihood_study.attacks()),
    ]


def _bpda(config: Config, eot_counts: Sequence[int] | None = None, purifications: int | None = None) -> Grid:
    counts = bpda.checked_counts(eot_counts, config)
    counted = replace(config, n_draws=purifications or bpda.PURIFICATIONS[config.budget])
    return [Experiment(counted, bpda.attacks(counts, config.eot))]


def _adversarial_training(*configs: Config) -> Grid:
    return [
        Experiment(config, paper_attacks(adversarial_training.DEFENCES, config), name)
        for config in configs
        for name in adversarial_training.classifiers(config).values()
    ]


def _stronger_attacks(config: Config) -> Grid:
    draws, steps = mechanism.LANDSCAPE_DRAWS, len(mechanism.LANDSCAPE)
    return [
        stronger_attacks.experiment(config),
        *stronger_attacks.eps_experiments(config).values(),
        *(Measurement(config, name, (draws, steps * draws), config.n_images) for name in PAPER),
        *mechanism.experiments(config),
        *mechanism.measurements(config),
    ]


def _beyond(search: Config, confirm: Config, weights: Sequence[float] | None = None) -> Grid:
    tried = beyond.settings(weights or beyond.WEIGHTS[search.budget])
    # Which setting wins is known after the search only; the paper's own stands for it.
    chosen = beyond.to_confirm(beyond.Setting("coup", confirm.guidance_weight), confirm.guidance_weight)
    found = [*beyond.experiments(search, tried), *beyond.experiments(confirm, chosen, both_ways=True)]
    return [experiment for _, experiment in found]


@dataclass(frozen=True)
class Notebook:
    """settings: of each of its configurations. grid: what it attacks, given these and its own parameters."""

    settings: tuple[dict[str, Any], ...]
    grid: Callable[..., Grid]


NOTEBOOKS = {
    "01_case_study": Notebook(({"purpose": "compare"},), _case_study),
    "02_ablation": Notebook(({}, {"purpose": "clean"}), _ablation),
    "03_sweeps": Notebook(({"purpose": "sweep"} | VALIDATION, {"purpose": "sweep"}), _sweeps),
    "04_autoattack": Notebook(({}, {"purpose": "compare"}), _autoattack),
    "05_bpda": Notebook(({"purpose": "sweep"},), _bpda),
    "06_adversarial_training": Notebook(
        tuple({"purpose": "sweep", "norm": norm} for norm in NORMS), _adversarial_training
    ),
    "07_stronger_attacks": Notebook(({"purpose": "probe"},), _stronger_attacks),
    "08_beyond": Notebook(({"purpose": "search"} | VALIDATION, {"purpose": "compare"}), _beyond),
}


def grid(name: str, *configs: Config, **own: Any) -> Grid:
    """What a notebook attacks with these configurations; own: parameters of this notebook alone.

    ValueError for an unknown notebook.
    """
    return NOTEBOOKS[choice("notebook", name, NOTEBOOKS)].grid(*configs, **own)


def show(name: str, *configs: Config, **own: Any) -> None:
    """Print what a notebook has ahead, before long work starts, see `cost.show`; arguments as in `grid`."""
    cost.show(name, grid(name, *configs, **own))


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> None:
    """A row for each notebook as soon as it is known, and their sum."""
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
        plans = {run: planned(run, given) for run in runs}
        if only_obtain:
            obtain(chain(*plans.values()))
            return
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    print(_absent(list(chain(*plans.values()))), end="\n\n", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for run, plan in plans.items():
        rows[run] = estimate(plan)
        print(*table_lines(run, rows[run])[2 if len(rows) > 1 else 0 :], sep="\n", flush=True)
    total = {head: sum(row[head] for row in rows.values()) for head in next(iter(rows.values()))}
    total |= {head: max(row[head] for row in rows.values()) for head in ("images", "GiB")}
    if len(rows) > 1:
        print(table_lines("all of them", total)[-1])
    print(f"\n{suggestion(Config(**given), total['GiB'])}")


def planned(run: str, given: dict[str, Any]) -> list[Job]:
    """The jobs of a notebook, or with @l2 behind its name of the notebook in that norm."""
    name, _, norm = run.partition("@")
    given = given | ({"norm": norm} if norm else {})
    # 02_ablation takes every classifier of the profile, unless one is named.
    own = {"classifiers": [given["classifier"]]} if name == "02_ablation" and given.get("classifier") else {}
    settings = NOTEBOOKS[choice("notebook", name, NOTEBOOKS)].settings
    return jobs(grid(name, *(Config(**given | fixed) for fixed in settings), **own))


def _absent(plan: Sequence[Job]) -> str:
    """What of the jobs' images and networks is not here."""
    datasets = dict.fromkeys(job.config.sizes.dataset for job in plan)
    absent = [name for name in datasets if not is_here(name)] + networks(plan, zoo.missing)
    return f"Still to be fetched: {', '.join(absent)}" if absent else "Data and networks are here."


if __name__ == "__main__":
    main()
