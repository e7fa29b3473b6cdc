"""How far a gradient that is not exact points away from the exact one, on trained networks."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from coup_lib.defences import LABELS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.studies.mechanism import chunked, draw_gradients

CHUNK = 4  # images at once
STEP_COUNTS = (10, 20, 50, 100)
N_IMAGES = 16
COMPARED = {"reverse": ("adjoint", "bpda"), "coup": ("adjoint", "first_order", "bpda")}


def gradient_cosines(config: Config, step_counts: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The record of cosines to `exact`, "result": defence → gradient → one list of n_images per step count.

    The gradient is that of the cross-entropy in the image, in float64, on the same Brownian path, at the
    images that APGD-ce made against the reverse SDE: where an attack walks, not at clean images, where the
    classifier is sure of itself and there is next to no guidance to differentiate.
    """
    step_counts = step_counts or ((2, 4) if config.budget == "smoke" else STEP_COUNTS)
    n_images = min(N_IMAGES, config.n_images)
    source, attacked = against("apgd-ce", "reverse"), Evaluation(config)

    def compute(places: range) -> dict[str, Any]:
        x, y = attacked.x_adv(source)[places].double(), attacked.images.y[places]
        found: dict[str, Any] = {name: {other: [] for other in others} for name, others in COMPARED.items()}
        for n_steps, (defence, others) in product(step_counts, COMPARED.items()):
            bench = Evaluation(replace(config, n_steps=n_steps)).bench
            exact, *compared = (
                draw_gradients(bench.defence(defence, name).double(), x, y, torch.tensor(places)[:, None])
                for name in ("exact", *others)
            )
            for name, gradient in zip(others, compared, strict=True):
                found[defence][name].append(_cosine(exact.flatten(1), gradient.flatten(1)).tolist())
        return found

    def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {"step_counts": list(step_counts)}
        for defence, others in COMPARED.items():
            cosines = {name: [part[defence][name] for part in parts] for name in others}
            found[defence] = {name: np.concatenate(rows, axis=1).tolist() for name, rows in cosines.items()}
        return found

    attack_name, attack = attacked.attack_settings(source)
    settings = {
        "step_counts": list(step_counts),
        "n_images": n_images,
        "attack": attack,
        "target": attacked.bench.settings("coup"),
    }
    return chunked(
        config,
        "cosines to the exact gradient",
        name=f"gradient-cosines-{attack_name}",
        settings=settings,
        chunks=[range(start, min(start + CHUNK, n_images)) for start in range(0, n_images, CHUNK)],
        compute=compute,
        combine=combine,
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per row, (n,); no epsilon, which would hide tiny gradients."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def median_table(cosines: Mapping[str, Any]) -> pd.DataFrame:
    """The median cosine to the exact gradient, a column per number of steps.

    Args:
        cosines: the "result" of `gradient_cosines`.
    """
    lines = {
        f"{LABELS[defence]}, {gradient.replace('_', '-')}": [f"{np.median(values):.3f}" for values in rows]
        for defence in COMPARED
        for gradient, rows in cosines[defence].items()
    }
    counts = [f"N = {count}" for count in cosines["step_counts"]]
    frame = pd.DataFrame.from_dict(lines, orient="index", columns=counts)
    return frame.rename_axis("Median cosine to exact")
