"""How the networks of the digits profile are trained, on more digits than there are."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from coup_lib.attacks import Attack
from coup_lib.data import Images
from coup_lib.networks.small import T_MAX, NoiseNet
from training.denoising import denoising_loss, noise_error
from training.fit import Recipe, fit

STOP_TIMES = (0.05, 0.1, 0.2)
USUAL = Recipe(steps=900, batch=100, lr=3e-3, decay=0.99, weight_decay=0.05)
ROBUST = replace(USUAL, steps=2000, pgd_steps=10)
RECIPES = {
    "cnn-small": USUAL,
    "cnn-large": USUAL,
    "cnn-small-linf": ROBUST,
    "cnn-small-l2": ROBUST,
    "score": Recipe(steps=9000, batch=256, lr=2e-3, decay=0.998, weight_decay=0.05),
}


def train_classifier(
    network: nn.Module, data: Images, recipe: Recipe, attack: Attack | None = None
) -> nn.Module:
    """Cross-entropy on deformed, slightly noised images; returns the moving average of the weights.

    With an attack, on the images that it makes of the deformed ones against the network as it stands:
    adversarial training (Madry et al. 2018), from another random start in every step.
    """
    network.eval()  # no layer of its own knows the difference; attacks refuse train mode

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        x = deformed(data.x[rows], generator, shift=0.2, angle=0.2, scale=0.12, shear=0.15)
        if attack:
            x = attack.reseeded(generator)(network, x, data.y[rows]).x_adv
        else:
            x = x + 0.05 * torch.randn(x.shape, generator=generator)
        return F.cross_entropy(network(x), data.y[rows], label_smoothing=0.05)

    return fit(network, loss, recipe)


def train_noise_net(network: NoiseNet, data: Images, validation: Images, recipe: Recipe) -> nn.Module:
    """Squared error of the predicted noise; returns the moving average where validation was best.

    One image in ten is a training image, the others are redrawn from them.
    """
    network.fit_skip(data.x)
    source = redrawable(data.x)

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        x = redrawn(source[rows], generator, shift=0.09, angle=0.12, scale=0.08, shear=0.08)
        real = torch.rand(recipe.batch, 1, 1, 1, generator=generator) < 0.1
        x = torch.where(real, data.x[rows], x)
        t = (
            T_MAX * torch.rand(recipe.batch, generator=generator) ** 1.5 + 1e-4
        )  # denser where images are sharp
        return noise_error(network, x, t, torch.randn(x.shape, generator=generator))

    def score(network: nn.Module) -> float:
        return sum(denoising_loss(network, validation, t, repeats=4) for t in STOP_TIMES)

    return fit(network, loss, recipe, score)


def deformed(
    x: Tensor,
    generator: Generator,
    *,
    shift: float,
    angle: float,
    scale: float,
    shear: float,
    finer: int = 1,
    mode: str = "bilinear",
) -> Tensor:
    """Each image of x (n, C, H, W) under its own affine map, sampled finer-fold: (n, C, finer·H, finer·W).

    The maps are uniform within the bounds, in half images, radians and fractions.
    """

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(len(x), generator=generator) - 1)

    a, s, k = uniform(angle), 1 + uniform(scale), uniform(shear)
    rows = [a.cos() * s, k - a.sin(), uniform(shift), a.sin() * s, a.cos() * s, uniform(shift)]
    size = [len(x), x.shape[1], finer * x.shape[2], finer * x.shape[3]]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), size, align_corners=False)
    return F.grid_sample(x, grid, mode=mode, align_corners=False)


def redrawn(x: Tensor, generator: Generator, **bounds: float) -> Tensor:
    """Deformed digits with the grey levels of real ones: k/16, half of the pixels empty.

    load_digits counts the ink of a 32×32 bitmap in blocks of 4×4, so we deform, threshold and count there.
    Interpolated grey levels instead *raise* the validation loss of a denoiser.
    """
    bitmap = deformed(x, generator, finer=4, mode="bicubic", **bounds) > 0.5
    return F.avg_pool2d(bitmap.float(), 4)


def redrawable(x: Tensor, rounds: int = 4) -> Tensor:
    """Grey levels, not confined to [0, 1], that redrawn() without deformation turns into x again, nearly."""
    still, source = {"shift": 0.0, "angle": 0.0, "scale": 0.0, "shear": 0.0}, x
    for _ in range(rounds):
        source = source + 0.6 * (x - redrawn(source, Generator(), **still))
    return source
