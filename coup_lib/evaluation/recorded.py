"""The worst case on record: over every attack in the store, whichever notebook made it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coup_lib import paths
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.identity import of_split
from coup_lib.evaluation.outcomes import Predictions
from coup_lib.evaluation.records import read
from coup_lib.evaluation.store import published


def recorded_predictions(
    config: Config, classifier: str, target: str, settings: dict[str, Any], images: str
) -> list[Predictions]:
    """All scores in the store of one defence on the images of `config`, under its threat or none.

    A record of more images serves if the first of them are these.

    Args:
        classifier: whose name the attacks' records carry.
        target: the defence's name.
        settings: what its behaviour depends on, `Bench.settings`.
        images: what identifies those in hand.
    """
    folder, start = paths.RESULTS / config.profile, f"score-{target}-on-{classifier}"
    names = {path.stem for path in folder.glob(f"{start}-*.json")}
    names |= {*published(folder), *published(paths.PUBLISHED / config.profile)}
    starts = tuple(f"{start}-{kind}-" for kind in ("clean", config.norm))
    found = []
    for name in sorted(name for name in names if name.startswith(starts)):
        made, result = _read(folder / f"{name}.json")
        if made["target"] == settings and _is_of(made["attack"], config, images):
            shown = {name: values[: config.n_images] for name, values in result.items()}
            found.append(Predictions(**shown))
    return found


def _is_of(attack: dict[str, Any], config: Config, images: str) -> bool:
    """Whether an attack's images are those of the configuration, within its ball."""
    n, dataset = attack["n_images"], config.setup.dataset
    threat = {"split": config.split, "norm": config.norm, "eps": config.eps, "dataset": dataset}
    if n < config.n_images or any(attack.get(name, value) != value for name, value in threat.items()):
        return False
    named = dataset, config.split, config.subset
    larger = images == of_split(*named, config.n_images)  # else nobody knows what more images there are
    return attack["images"] == (of_split(*named, n) if larger else images)


@cache  # a finished record does not change
def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    document = read(path)
    names = ("labels", "report", "average", "selection")
    return document["settings"], {name: np.array(document["result"][name]) for name in names}
