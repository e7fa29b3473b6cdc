"""A cheaper score network under attack: what it saves, and whether it changes a decision."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import DEVICE, cosines, take_turns
from torch import Tensor

from coup_lib import paths
from coup_lib.data import is_here
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.networks.precision import products
from coup_lib.paths import is_smoke

CHEAPER = ["bfloat16"] + ["tf32"] * (DEVICE.type == "cuda")
ATTACK = {"n_images": 4, "n_iter": 2} if is_smoke() else {"n_images": 128, "n_iter": 20}
PROFILE = {"digits": {"eot": 5} | ATTACK, "cifar10-small": {"eot": 1} | ATTACK}
if DEVICE.type == "cpu" and not is_smoke():
    PROFILE["cifar10-small"] |= {"n_images": 16, "n_iter": 10}


def slope(evaluation: Evaluation, defence: str) -> Tensor:
    """The exact gradient of the defence's cross-entropy, under attack, at its images."""
    model, images = evaluation.bench.attacked(against("apgd-ce", defence)), evaluation.images
    x = images.x.clone().requires_grad_()
    with products(evaluation.config.precision):
        logits = model(x, seeds=torch.arange(len(x)))
        return torch.autograd.grad(F.cross_entropy(logits, images.y, reduction="sum"), x)[0]


@pytest.mark.benchmark(group="cheaper")
@pytest.mark.parametrize("defence", ["reverse", "coup"])
@pytest.mark.parametrize("profile", PROFILE)
def test_cheaper(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, defence: str
) -> None:
    """On validation images: seconds and cosines of exact gradients, and what an attack by them leaves."""
    if not is_here(PROFILES[profile].dataset):
        pytest.skip(f"no {PROFILES[profile].dataset} here; set {paths.DATA_VARIABLE}")
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    full = Config(profile=profile, split="validation", **PROFILE[profile])
    names = ("float32", *CHEAPER)
    runs = {name: Evaluation(replace(full, precision=name), verbose=False) for name in names}
    source = against("apgd-ce", defence)
    scores = {name: run.predictions({defence: {"own": source}})[defence]["own"] for name, run in runs.items()}
    exact = slope(runs["float32"], defence).double().flatten(1)
    take_turns(
        benchmark,
        {name: lambda run=run: slope(run, defence) for name, run in runs.items()},
        5,
        problem=profile,
        defence=defence,
        reference="float32",
        cosines={name: cosines(slope(runs[name], defence), exact) for name in CHEAPER},
        n_images=full.n_images,
        robust={name: 100 * float(score.right.mean()) for name, score in scores.items()},
        # Of ten draws of each image, the float32 defence's majority under either attack.
        changed={
            name: int(((score.right > 0.5) != (scores["float32"].right > 0.5)).sum())
            for name, score in scores.items()
        },
    )
