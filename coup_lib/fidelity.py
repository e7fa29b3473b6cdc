"""How far a gradient that is not exact points away from the exact one, on trained networks."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.config import Config
from coup_lib.data import Images
from coup_lib.evaluate import Evaluation, Source
from coup_lib.records import record

STEP_COUNTS = (10, 20, 50, 100)
COMPARED = {"reverse": ("adjoint", "bpda"), "coup": ("adjoint", "first_order", "bpda")}


def gradient_cosines(
    config: Config, step_counts: tuple[int, ...] | None = None, n_images: int = 16
) -> dict[str, Any]:
    """The record of cosines to `exact`, "result": defence → gradient → one list of n_images per step count.

    The gradient is that of the cross-entropy in the image, in float64, on the same Brownian path, at the
    images that APGD-ce made against reverse-only: where an attack walks, not at clean images, where the
    classifier is sure of itself and there is next to no guidance to differentiate.
    """
    step_counts = step_counts or ((2, 4) if config.budget == "smoke" else STEP_COUNTS)
    n_images = min(n_images, config.n_images)
    source, attacked = Source("apgd-ce", "reverse"), Evaluation(config)

    def compute() -> dict[str, Any]:
        x_adv = attacked.x_adv(source)
        images = Images(x_adv, attacked.images.y).first(n_images)
        found: dict[str, Any] = {"step_counts": list(step_counts)}
        for defence, gradients in COMPARED.items():
            found[defence] = {gradient: [] for gradient in gradients}
            for n_steps in step_counts:
                evaluation = Evaluation(replace(config, n_steps=n_steps))
                exact = _gradient(evaluation.defence(defence, "exact"), images)
                for gradient in gradients:
                    other = _gradient(evaluation.defence(defence, gradient), images)
                    found[defence][gradient].append(_cosine(exact, other).tolist())
        return found

    name, attack = attacked.attack_settings(source)
    settings = {
        "step_counts": list(step_counts),
        "n_images": n_images,
        "attack": attack,
        "target": attacked.defence_settings("coup"),
    }
    return record(config.profile, f"gradient-cosines-{name}", settings, compute)


def _gradient(model: nn.Module, images: Images) -> Tensor:
    x = images.x.double().requires_grad_()
    loss = F.cross_entropy(model.double()(x, seeds=torch.arange(len(x))), images.y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per row, (n,); no epsilon, which would hide tiny gradients."""
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
