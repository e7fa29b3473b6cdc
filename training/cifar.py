"""How the small networks of CIFAR-10 are trained: `python -m training.train --dataset cifar10`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from coup_lib.attacks import Attack
from coup_lib.data import Images
from coup_lib.networks.small import T_MAX
from training.denoising import denoising_loss, noise_error
from training.fit import fit

STEPS, BATCH, LR, MUON_LR = 8_000, 64, 2e-3, 0.02
STOP_TIMES, STOP_IMAGES = (0.02, 0.05, 0.1), 256


class Robust(NamedTuple):
    """Adversarial training: of which network, for how long, on how many steps of PGD."""

    begins_with: str
    steps: int
    lr: float
    pgd_steps: int


# Attacks in L∞ leave so little of the published network that training on them from there ended in a constant.
ROBUST = {
    "resnet20-l2": Robust("resnet20", steps=1_500, lr=3e-4, pgd_steps=3),
    "resnet20-linf": Robust("resnet20-l2", steps=2_000, lr=1e-3, pgd_steps=5),
}


def train_score(
    network: nn.Module,
    data: Images,
    validation: Images,
    *,
    seed: int,
    steps: int = STEPS,
    batch: int = BATCH,
    precision: str = "float32",
    compiled: bool = False,
    state: Path | None = None,
    begins_with: str = "",
) -> nn.Module:
    """Squared error of the predicted noise on images and their mirror images, `fit` by validation.

    A time is the smallest of three that are uniform up to T_MAX: seven in eight are below half of it. Next to
    zero, where noise cannot be told from the image, a time would teach little.
    `begins_with` names the weights that the network comes with, to tell the run from others.
    """
    held_out = validation.first(min(STOP_IMAGES, len(validation)))

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(data), (batch,), generator=generator, device=generator.device)
        x = mirrored(data.x[chosen], generator)
        t = T_MAX * torch.rand(3, batch, generator=generator, device=x.device).amin(0) + 1e-4
        return noise_error(network, x, t, torch.randn(x.shape, generator=generator, device=x.device))

    def score(network: nn.Module) -> float:
        return sum(denoising_loss(network, held_out, t, repeats=1) for t in STOP_TIMES)

    return fit(
        network,
        loss,
        score,
        seed=seed,
        steps=steps,
        lr=LR,
        muon_lr=MUON_LR,
        decay=0.999,
        weight_decay=0.01,
        every=500,
        precision=precision,
        compiled=compiled,
        state=state,
        also={"batch": batch, "images": len(data), "begins with": begins_with},
    )


def train_robust(
    network: nn.Module,
    data: Images,
    attack: Attack | None,
    *,
    seed: int,
    steps: int,
    lr: float,
    **settings: Any,
) -> nn.Module:
    """Adversarial training (Madry et al. 2018) from the weights that the network has.

    Cross-entropy on what the attack, from another random start in every step, makes of mirrored and shifted
    images. BatchNorm stays as it was: the moving average of the weights would not have the statistics of any
    of them.
    """
    network.eval()

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(data), (BATCH,), generator=generator, device=generator.device)
        x, y = shifted(mirrored(data.x[chosen], generator), generator), data.y[chosen]
        shown = attack.reseeded(generator)(network, x, y).x_adv if attack else x
        return F.cross_entropy(network(shown), y)

    return fit(network, loss, seed=seed, steps=steps, lr=lr, decay=0.99, weight_decay=0.01, **settings)


def mirrored(x: Tensor, generator: Generator) -> Tensor:
    """Each image of x (n, C, H, W) or, as likely, its mirror image."""
    heads = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(heads, x.flip(3), x)


def shifted(x: Tensor, generator: Generator, most: int = 4) -> Tensor:
    """Each image of x (n, C, H, W) moved by up to so many pixels each way, black behind it."""
    n, _, height, width = x.shape
    padded = F.pad(x, [most] * 4)
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator, device=x.device)
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


CARD_SPLITS, CARD_IMAGES = ("validation", "train"), 128
CARD_FACTS = {"l2": ROBUST["resnet20-l2"], "linf": ROBUST["resnet20-linf"]}
CARD = """# Networks of the profile cifar10-small

Trained by these commands, each with the recipe of its day:

{commands}

The latest of them wrote this card, too. Another processor, thread count or PyTorch rounds differently.

Data: CIFAR-10's training images at hand, every tenth held out for validation (seed {split_seed}): {train} for
training, {validation} for validation; {test} test images, which served for nothing but the column below.
The published ResNet-20 and ResNet-18 of the profile were trained on all of CIFAR-10's training images, these
validation images among them: what is chosen on those is chosen for a classifier that knows them.
Accuracies with their 95 % interval. resnet20-l2 is the published ResNet-20
(akamaster/pytorch_resnet_cifar10, BSD-2-Clause), adversarially trained further on PGD-{l2.pgd_steps} images
(step {pgd_step:.3f} eps) at the profile's eps; resnet20-linf is that, trained further for its own norm, on
PGD-{linf.pgd_steps} images. Their robustness is in notebook 06.

| classifier | parameters | MFLOP per image | accuracy, validation (n = {validation}) | test (n = {test}) |
|---|---|---|---|---|
{classifiers}

Noise predictor, for t in (0, {t_max}]: mean squared error of the predicted noise per pixel
({loss_images} images, 8 noises each; 1 is what predicting zero would cost). On images that it was trained on
the error is what a network of this size and training reaches where nothing is new to it.

| network | parameters | MFLOP per image | {times} |
|---|---|---|{rules}
{scores}
"""
