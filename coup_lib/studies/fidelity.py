"""How far a gradient that is not exact points away from the exact one, on trained networks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.data import Images
from coup_lib.defences import LABELS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.progress import Plan
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import ChunkedRecord, Worker, is_complete

CHUNK = 4  # images at once
STEP_COUNTS = (10, 20, 50, 100)
N_IMAGES = 16
COMPARED = {"reverse": ("adjoint", "bpda"), "coup": ("adjoint", "first_order", "bpda")}


def gradient_cosines(
    config: Config, step_counts: tuple[int, ...] | None = None, n_images: int = N_IMAGES
) -> dict[str, Any]:
    """The record of cosines to `exact`, "result": defence → gradient → one list of n_images per step count.

    The gradient is that of the cross-entropy in the image, in float64, on the same Brownian path, at the
    images that APGD-ce made against the reverse SDE: where an attack walks, not at clean images, where the
    classifier is sure of itself and there is next to no guidance to differentiate.
    """
    step_counts = step_counts or ((2, 4) if config.budget == "smoke" else STEP_COUNTS)
    n_images = min(n_images, config.n_images)
    source, attacked = against("apgd-ce", "reverse"), Evaluation(config)

    def compute(start: int) -> dict[str, Any]:
        places = range(start, min(start + CHUNK, n_images))
        rows = slice(places.start, places.stop)
        images = Images(attacked.x_adv(source)[rows], attacked.images.y[rows])
        found: dict[str, Any] = {name: {other: [] for other in others} for name, others in COMPARED.items()}
        for n_steps in step_counts:
            evaluation = Evaluation(replace(config, n_steps=n_steps))
            for defence, gradients in COMPARED.items():
                exact = _gradient(evaluation.bench.defence(defence, "exact"), images, places)
                for gradient in gradients:
                    other = _gradient(evaluation.bench.defence(defence, gradient), images, places)
                    found[defence][gradient].append(_cosine(exact, other).tolist())
        return found

    def combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
        def joined(defence: str, gradient: str, place: int) -> list[float]:
            return [value for part in parts for value in part[defence][gradient][place]]

        return {"step_counts": list(step_counts)} | {
            defence: {name: [joined(defence, name, i) for i in range(len(step_counts))] for name in gradients}
            for defence, gradients in COMPARED.items()
        }

    attack_name, attack = attacked.attack_settings(source)
    settings = {
        "step_counts": list(step_counts),
        "n_images": n_images,
        "attack": attack,
        "target": attacked.bench.settings("coup"),
    }
    name, starts = f"gradient-cosines-{attack_name}", range(0, n_images, CHUNK)
    worker = Worker(config.shard, config.num_shards)
    record = ChunkedRecord(config.profile, name, settings, starts, compute, combine, worker)
    plan = Plan([0.0 if is_complete(record.path) else 1.0], verbose=True)
    plan.start("cosines to the exact gradient")
    return record.finish(plan.advance)


def _gradient(model: nn.Module, images: Images, seeds: Sequence[int]) -> Tensor:
    """Row by row, (n, C·H·W); of each image on the Brownian path of its seed."""
    x = images.x.double().requires_grad_()
    loss = F.cross_entropy(model.double()(x, seeds=torch.tensor(seeds)), images.y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1)


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
