"""What a notebook will cost on this machine, measured before it starts.

python -m coup_lib.estimate --profile cifar10 --budget full
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from math import prod
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from coup_lib import (
    artefacts,
    beyond,
    bpda,
    case_study,
    clean,
    cross,
    fidelity,
    likelihood_study,
    mechanism,
    stronger,
    sweeps,
    zoo,
)
from coup_lib.config import NORMS, Config
from coup_lib.data import SHAPES
from coup_lib.defences import MAXIMISERS, PAPER, purifications
from coup_lib.evaluate import Evaluation, Job, Source, planning
from coup_lib.gradients import ACTIVATION_BUDGET, THROUGH_STEPS, activation_bytes
from coup_lib.profiles import BUDGETS, PROFILES
from coup_lib.purify import Purified, Purifier
from coup_lib.tables import markdown

STEPS = 1  # of the paths that are timed; whole ones are as many times longer
TIMED_FLOP = {"cpu": 2e11, "cuda": 5e13}  # in one timed call, a second's worth or so
USABLE = 0.8  # of the free memory
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


@dataclass(frozen=True)
class Cost:
    """Of one image: seconds in a batch, and floating-point operations (multiply and add are two)."""

    seconds: float
    flop: float

    def times(self, factor: float) -> "Cost":
        """As often."""
        return Cost(factor * self.seconds, factor * self.flop)

    def plus(self, other: "Cost") -> "Cost":
        """One after the other."""
        return Cost(self.seconds + other.seconds, self.flop + other.flop)


def jobs(name: str, *configs: Config, **own: Any) -> list[Job]:
    """What the notebook would attack and score with these configurations, each once; nothing is computed.

    own: parameters of this notebook alone, such as t_stars; its defaults where left out. ValueError for an
    unknown notebook.
    """
    if name not in NOTEBOOKS:
        raise ValueError(f"expected a notebook out of {', '.join(NOTEBOOKS)}; got {name!r}")
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


def estimate(name: str, *configs: Config, **own: Any) -> dict[str, float]:
    """The row of a notebook, by `TABLE_HEAD`: of all that it computes, but hours only of what is left.

    own: as in `jobs`.

    network calls: of the score network, a derivative counting as one. GiB: of activations and states at the
    batch of the profile, for the path that takes most. GiB on disk: of the attacked images, float32; they do
    not compress.
    """
    row, memory = dict.fromkeys(TABLE_HEAD, 0.0), [0.0]
    for job in jobs(name, *configs, **own):
        config, source = job.config, job.source
        gradients, forwards = job.calls
        scored = {target: 2 * config.n_draws for target in job.targets if target != "none"}
        cost = Cost(0, 0)
        if forwards:
            cost = unit(job, source.defence, None).times(forwards)
        if gradients:
            cost = cost.plus(unit(job, source.defence, source.gradient).times(gradients))
        for target, draws in scored.items():
            cost = cost.plus(unit(job, target, None).times(draws))
        steps = 0 if source.defence == "none" else source.n_steps or config.n_steps
        paths = purifications(source.defence), sum(n * purifications(at) for at, n in scored.items())
        row["images"] = max(row["images"], config.n_images)
        row["purifications"] += config.n_images * ((steps > 0) * forwards * paths[0] + paths[1])
        row["gradients"] += config.n_images * gradients
        row["network calls"] += config.n_images * (
            steps * (forwards + 3 * gradients) * paths[0] + config.n_steps * paths[1]
        )
        row["PFLOP"] += config.n_images * cost.flop / 1e15
        pixels = prod(SHAPES[config.sizes.dataset])
        row["GiB on disk"] += config.n_images * pixels * 4 / 2**30 if job.makes_images else 0
        row["hours"] += 0 if job.done else config.n_images * cost.seconds / 3600
        if steps:
            memory.append(bytes_per_image(job) * config.sizes.max_batch)
    return row | {"GiB": max(memory) / 2**30}


def show(name: str, *configs: Config, **own: Any) -> None:
    """Print the notebook's row, and a batch size that fits, before it starts; own as in `jobs`.

    Raises what `artefacts.obtain` raises where published networks are missing: all of them are named at once.
    """
    for config in configs:
        artefacts.obtain(zoo.needed(*_networks(config)))
    if all(job.done for job in jobs(name, *configs, **own)):
        print(f"{name}: the record of every attack is here, none is to be computed")
        return
    row = estimate(name, *configs, **own)
    print(markdown(_frame({name: row})))
    print(f"\n{suggestion(configs[0], row['GiB'])}")


def suggestion(config: Config, gib: float) -> str:
    """What batch fits into this device's memory, when the profile's takes so many GiB."""
    free, batch = _free_memory(config.torch_device), config.sizes.max_batch
    per_image = gib / batch * 2**30
    fitting = 2 ** max(0, int(USABLE * free / max(per_image, 1)).bit_length() - 1)
    return (
        f"On {config.torch_device}, {free / 2**30:.0f} GiB free, up to {fitting:,} images fit into one call "
        f"of the score network; the profile takes {batch:,} (max_batch in coup_lib/profiles.py). "
        "Should memory run out all the same, the batch is halved."
    )


def unit(job: Job, defence: str, gradient: str | None) -> Cost:
    """The cost of one image's purification and decision, or with a gradient of that too."""
    config = job.config
    without = _measured(config, job.classifier, "none", None if gradient is None else "exact")
    if defence == "none":
        return without
    if defence in MAXIMISERS:
        return _measured(config, job.classifier, defence, gradient)
    steps = (job.source.n_steps if defence == job.source.defence else None) or config.n_steps
    step = _measured(config, job.classifier, defence, gradient).plus(without.times(-1))
    if gradient in THROUGH_STEPS and _replays(job, defence, steps):
        step = step.plus(_measured(config, job.classifier, defence, None))
        step = step.plus(_measured(config, job.classifier, "none", None).times(-1))
    step = step.times(1 / STEPS)
    return without.plus(Cost(max(step.seconds, 0), max(step.flop, 0)).times(steps))


def _replays(job: Job, defence: str, steps: int) -> bool:
    """Whether such a path has too many activations to be kept, so that every step is gone once more."""
    config = job.config
    together = min(config.n_images, config.sizes.chunk_size) * (job.source.eot or config.eot)
    # On a CPU an attack takes as few images at once as fit.
    batch = 1 if config.torch_device.type == "cpu" else min(together, config.sizes.max_batch)
    kept = _step_bytes(config.profile, config.device, job.classifier, defence) * steps * batch
    return kept > ACTIVATION_BUDGET


def _measured(config: Config, classifier: str, defence: str, gradient: str | None) -> Cost:
    """As `unit`, on a path of `STEPS` steps; measured once."""
    return _measured_once(config.profile, config.device, classifier, defence, gradient or "")


@cache
def _measured_once(profile: str, device: str, classifier: str, defence: str, gradient: str) -> Cost:
    config = Config(profile=profile, device=device, n_images=1)
    evaluation = Evaluation(config, classifier, trained=False)
    model = evaluation.defence(defence, gradient or "exact", None if defence in MAXIMISERS else STEPS)
    image = torch.rand(1, *SHAPES[config.sizes.dataset], device=config.torch_device)
    began = time.perf_counter()
    with FlopCounter() as counter:
        _call(model, image, gradient)
    flop = max(float(counter.total), 1.0)
    size = int(min(max(TIMED_FLOP[config.torch_device.type] / flop, 1), config.sizes.max_batch))
    if size > 1:  # else that call was long enough to be timed
        batch = image.repeat(size, 1, 1, 1)
        _call(model, batch, gradient)  # the first call of a shape is slower
        began = time.perf_counter()
        _call(model, batch, gradient)
    return Cost((time.perf_counter() - began) / size, flop)


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


def _call(model: nn.Module, x: Tensor, gradient: str) -> None:
    """One decision on each image, with the gradient of its loss where one is named; waits for the device."""
    if not gradient:
        with torch.no_grad():
            model(x)
    else:
        x = x.detach().requires_grad_()
        logits = model(x)
        torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1), reduction="sum"), x)
    if x.is_cuda:
        torch.cuda.synchronize()


@cache
def _step_bytes(profile: str, device: str, classifier: str, defence: str) -> int:
    config = Config(profile=profile, device=device, n_images=1)
    model = cast(Purified, Evaluation(config, classifier, trained=False).defence(defence, n_steps=STEPS))
    if not isinstance(model.purifier, Purifier):
        return 0
    state = torch.zeros(1, *SHAPES[config.sizes.dataset], device=config.torch_device)
    return activation_bytes(model.purifier.score, model.purifier.sde, state, model.purifier.times) // STEPS


def bytes_per_image(job: Job) -> int:
    """What a gradient keeps at once: the activations of one step, which is replayed, and all N + 1 states."""
    config, source = job.config, job.source
    pixels = torch.Size(SHAPES[config.sizes.dataset]).numel()
    states = ((source.n_steps or config.n_steps) + 1) * pixels * 4
    return _step_bytes(config.profile, config.device, job.classifier, source.defence) + states


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _frame(rows: dict[str, dict[str, float]]) -> pd.DataFrame:
    """The rows for people; hours below a tenth as minutes."""
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(TABLE_HEAD)).rename_axis("notebook")
    for name in TABLE_HEAD:
        few_digits = name.startswith(("PFLOP", "GiB"))
        frame[name] = frame[name].map("{:,.3g}".format if few_digits else "{:,.0f}".format)
    hours = [row["hours"] for row in rows.values()]
    frame["hours"] = [f"{value:,.1f}" if value >= 0.1 else f"{60 * value:.1f} min" for value in hours]
    return frame


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a row for each notebook, and their sum."""
    parser = argparse.ArgumentParser(description="What every notebook will cost on this machine.")
    parser.add_argument("--profile", default="digits", choices=PROFILES)
    parser.add_argument("--budget", default="quick", choices=BUDGETS)
    parser.add_argument("--norm", default="linf", choices=NORMS)
    parser.add_argument("--classifier")
    parser.add_argument("--subset")
    parser.add_argument("--n-images", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 04_autoattack; all of them")
    given = vars(parser.parse_args(arguments))
    names = given.pop("notebooks") or list(NOTEBOOKS)
    rows = {name: estimate(name, *_configs(name, given), **_own(name, given)) for name in names}
    total = {head: sum(row[head] for row in rows.values()) for head in TABLE_HEAD}
    total |= {head: max(row[head] for row in rows.values()) for head in ("images", "GiB")}
    print(markdown(_frame(rows | ({"all of them": total} if len(rows) > 1 else {}))))
    print(f"\n{suggestion(Config(**given), total['GiB'])}")
    absent = zoo.missing(*_networks(Config(**given)))
    print(f"\nStill to be fetched: {', '.join(absent)}" if absent else "\nAll networks are here.")


def _configs(name: str, given: dict[str, Any]) -> list[Config]:
    if name not in NOTEBOOKS:
        raise ValueError(f"expected a notebook out of {', '.join(NOTEBOOKS)}; got {name!r}")
    return [Config(**given | settings) for settings in NOTEBOOKS[name].settings]


def _own(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """02_ablation takes every classifier of the profile, unless one is named."""
    one = given["classifier"] if name == "02_ablation" else None
    return {"classifiers": [one]} if one else {}


def _networks(config: Config) -> tuple[str, Iterable[str], str]:
    profile = config.sizes
    names = (config.classifier, *profile.classifiers, *profile.robust_classifiers.values())
    return profile.dataset, names, profile.score


if __name__ == "__main__":
    main()
