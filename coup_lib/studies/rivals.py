"""The rivals of notebook 08: what others guide by, and what a robust guide is worth, attacked alike."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coup_lib.defences import PURIFIERS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import NORM_NAMES, Config
from coup_lib.evaluation.noise import REPORT, image_seeds
from coup_lib.evaluation.protocol import Evaluation, Experiment, Grid, Measurement
from coup_lib.evaluation.specs import CLEAN
from coup_lib.evaluation.stats import student
from coup_lib.reporting import tables
from coup_lib.studies import beyond
from coup_lib.studies.beyond import Found, Setting

# λ of each, out of which the best on validation images is taken; GDMP's begins where it is felt.
WEIGHTS = {
    "gdmp": {"smoke": (30.0,), "quick": (30.0,), "full": (10.0, 30.0, 100.0)},
    "prediction": {"smoke": (1.0,), "quick": (1.0,), "full": (1.0, 3.0)},
}
UNGUIDED = ("reverse", "diffpure", "flow")
ALONE = {"clean": CLEAN, "exact": against("apgd-ce", "none"), "margin": against("apgd-margin", "none")}
COLUMNS = {name: heading for name, heading in beyond.COLUMNS.items() if name != "transferred"}
RATE = "Compression rate"
NOTE = (
    "GDMP and guidance to the prediction face warm start and worst draw by their exact gradient. "
    "Compression rate: the mean over images, with Student's 95 % interval."
)


def settings(budget: str) -> list[Setting]:
    """What is tried on validation images."""
    return [Setting(name, weight) for name, weights in WEIGHTS.items() for weight in weights[budget]]


def chosen(tried: Mapping[Setting, Found], weight: float) -> list[Setting]:
    """What is measured on test images: each rival at its best λ of those tried, and its control.

    weight: COUP's. The guide of the other norm has the λ of the robust guide.
    """
    guided = [beyond.best(tried, (name,)) for name in (*WEIGHTS, "robust-guide")]
    other = replace(guided[-1], defence="other-norm-guide")
    return [*map(Setting, UNGUIDED), Setting("coup", weight), *guided, other]


def planned(config: Config) -> Grid:
    """What `beyond.measure`, `guides_alone` and `compression` take, if of each λ the first tried is the best.

    Which one is, only the search can tell; of the robust guides the last one stands for it.
    """
    tried = {one.defence: one.weight for one in reversed(settings(config.budget))}
    tried |= dict.fromkeys(("robust-guide", "other-norm-guide"), beyond.WEIGHTS[config.budget][-1])
    guided = {"coup": config.guidance_weight} | tried
    which = [*map(Setting, UNGUIDED), *(Setting(name, weight) for name, weight in guided.items())]
    rates = [Measurement(config, one.defence, (0, 2 * config.n_draws), config.n_images) for one in which]
    attacks = [experiment for _, experiment in beyond.experiments(config, which, lent=())]
    return [*attacks, *_alone(config).values(), *rates]


def guides_alone(config: Config) -> dict[str, Found]:
    """The norm that a robust guide was trained for → what it keeps as a classifier of its own."""
    found = {}
    for norm, experiment in _alone(config).items():
        scores = experiment.predictions()
        recorded = Evaluation(config, experiment.classifier).recorded(scores)
        found[norm] = Found(scores["none"], recorded["none"])
    return found


def _alone(config: Config) -> dict[str, Experiment]:
    classifiers = config.setup.robust_classifiers
    return {norm: Experiment(config, {"none": ALONE}, name) for norm, name in classifiers.items()}


def compression(config: Config, setting: Setting) -> np.ndarray:
    """‖P(x') − P(x)‖ / ‖x' − x‖ of each image, L2, (n,): the mean over noise draws, equal for x' and x.

    Yuezhang and Wei's sign of robustness without a gradient (arXiv 2505.22839): below 1 a purifier moves
    images together. x' is what APGD made of x against the undefended classifier.
    """
    evaluation, spec = Evaluation(beyond.at(config, setting)), against("apgd-ce", "none")

    def compute(place: int) -> dict[str, list[float]]:
        both = evaluation.images.x, evaluation.x_adv(spec)
        x, attacked = (images[place : place + config.chunk_size] for images in both)
        purifier: Any = evaluation.bench.defence(setting.defence).purifier
        seeds = image_seeds(config.seed, REPORT, range(place, place + len(x)), config.n_draws)
        with torch.no_grad():
            apart = [_distance(purifier(attacked, draw), purifier(x, draw)) for draw in seeds.unbind(1)]
        return {"rates": (torch.stack(apart).mean(0) / _distance(attacked, x).clamp_min(1e-30)).tolist()}

    name, attack = evaluation.attack_settings(spec)
    told = {"target": evaluation.bench.settings(setting.defence), "attack": attack, "seed": config.seed}
    told["n_draws"] = config.n_draws
    record = evaluation.record(f"compression-{setting.defence}-on-{name}", told, compute)
    return np.array(record.finish()["result"]["rates"])


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).norm(dim=1)


# --- what is shown ---


def rows(found: Mapping[Setting, Found], alone: Mapping[str, Found], config: Config) -> list[tables.Row]:
    """A row per setting, the best worst case first, with its compression rate; then the guides alone."""
    rated = []
    for row in beyond.rows(found, config):
        rates = compression(config, Setting(row.keys["defence"], row.keys["guidance_weight"]))
        low, high = student(rates)
        said = f"{rates.mean():.3f} [{low:.3f}, {high:.3f}]"
        rated.append(replace(row, keys={**row.keys, "compression": float(rates.mean())}, shown={RATE: said}))
    keys = {"defence": "none", "guidance_weight": None, "compression": None}
    return rated + [
        tables.Row(_named(norm), each.right, config, keys | {"trained": norm}, {RATE: tables.MISSING})
        for norm, each in alone.items()
    ]


def _named(norm: str) -> str:
    return f"the guide alone, trained for {NORM_NAMES[norm]}"


def verdict(
    found: Mapping[Setting, Found],
    alone: Mapping[str, Found],
    tried: Mapping[Setting, Found],
    config: Config,
) -> str:
    """Markdown: each guidance against its own purifier without it, and a robust guide against itself alone.

    Then whether the first-order gradient is the stronger attack, also at the weights tried on validation.
    """
    pairs = {}
    for setting, each in found.items():
        if (control := beyond.twin(setting)) != setting:
            pairs[f"{setting} is more robust than {control}"] = each.right, found[control].right
        if (recipe := PURIFIERS[setting.defence]).robust_guide:
            norm = recipe.guide_norm(config.norm)
            pairs[f"{setting} is more robust than {_named(norm)}"] = each.right, alone[norm].right
    return "\n\n".join([tables.claims(pairs, beyond.JUDGED), _gradients(found), _gradients(tried)])


def _gradients(found: Mapping[Setting, Found]) -> str:
    """Claims, of COUP and of what reads the image: how exact and first-order attacks differ."""
    heading = "Accuracy under the exact attack − under the first-order one"
    claim = "the first-order gradient is the stronger attack"
    rows = {str(one): each.right for one, each in found.items() if one.defence in ("coup", *WEIGHTS)}
    return tables.attack_claims(rows, claim, "exact", "first_order", heading)
