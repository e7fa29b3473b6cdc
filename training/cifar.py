"""How the small networks of CIFAR-10 are trained: `coup train --dataset cifar10`."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from coup_lib.attacks import Attack
from coup_lib.data import Images
from coup_lib.networks.small import T_MAX
from training.denoising import denoising_loss, noise_error
from training.fit import Recipe, Watch, fit

STOP_TIMES, STOP_IMAGES = (0.02, 0.05, 0.1), 256
# Attacks in L∞ leave so little of the published network that training on them from there ended in a constant.
RECIPES = {
    "resnet20-l2": Recipe(
        steps=1_500, batch=64, lr=3e-4, decay=0.99, weight_decay=0.01, begins_with="resnet20", pgd_steps=3
    ),
    "resnet20-linf": Recipe(
        steps=2_000, batch=64, lr=1e-3, decay=0.99, weight_decay=0.01, begins_with="resnet20-l2", pgd_steps=5
    ),
    "score-small": Recipe(
        steps=8_000, batch=64, lr=2e-3, decay=0.999, weight_decay=0.01, muon_lr=0.02, every=500
    ),
}


def train_score(
    network: nn.Module,
    data: Images,
    validation: Images,
    recipe: Recipe,
    state: Path | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Squared error of the predicted noise on images and their mirror images, `fit` by validation.

    A time is the smallest of three that are uniform up to T_MAX: seven in eight are below half of it. Next to
    zero, where noise cannot be told from the image, a time would teach little.
    """
    held_out = validation.first(min(STOP_IMAGES, len(validation)))

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(data), (recipe.batch,), generator=generator, device=generator.device)
        x = mirrored(data.x[chosen], generator)
        t = T_MAX * torch.rand(3, recipe.batch, generator=generator, device=x.device).amin(0) + 1e-4
        return noise_error(network, x, t, torch.randn(x.shape, generator=generator, device=x.device))

    def score(network: nn.Module) -> float:
        return sum(denoising_loss(network, held_out, t, repeats=1) for t in STOP_TIMES)

    return fit(network, loss, recipe, score, state, watch)


def train_robust(
    network: nn.Module,
    data: Images,
    attack: Attack,
    recipe: Recipe,
    state: Path | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Adversarial training (Madry et al. 2018) from the weights that the network has.

    Cross-entropy on what the attack, from another random start in every step, makes of mirrored and shifted
    images. BatchNorm stays as it was: the moving average of the weights would not have the statistics of any
    of them.
    """
    network.eval()

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        chosen = torch.randint(len(data), (recipe.batch,), generator=generator, device=generator.device)
        x, y = shifted(mirrored(data.x[chosen], generator), generator), data.y[chosen]
        return F.cross_entropy(network(attack.reseeded(generator)(network, x, y).x_adv), y)

    return fit(network, loss, recipe, state=state, watch=watch)


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
