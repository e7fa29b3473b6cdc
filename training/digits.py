"""How the networks of the digits profile are trained, on more digits than there are."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from coup_lib.attacks import Attack
from coup_lib.data import Images
from coup_lib.networks.small import T_MAX, NoiseNet
from training.denoising import denoising_loss, noise_error
from training.fit import fit

STOP_TIMES = (0.05, 0.1, 0.2)
STEPS, ROBUST_STEPS = 900, 2000  # of a classifier's training, and of adversarial training
PGD_STEPS = 10  # of the attack in it


def train_classifier(
    network: nn.Module,
    data: Images,
    *,
    seed: int,
    steps: int | None = None,
    batch: int = 100,
    lr: float = 3e-3,
    attack: Attack | None = None,
) -> nn.Module:
    """Cross-entropy on deformed, slightly noised images; returns the moving average of the weights.

    With an attack, on the images that it makes of the deformed ones against the network as it stands:
    adversarial training (Madry et al. 2018), from another random start in every step.
    """
    steps = steps or (ROBUST_STEPS if attack else STEPS)
    network.eval()  # no layer of its own knows the difference; attacks refuse train mode

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator)
        x = deformed(data.x[rows], generator, shift=0.2, angle=0.2, scale=0.12, shear=0.15)
        if attack:
            x = attack.reseeded(generator)(network, x, data.y[rows]).x_adv
        else:
            x = x + 0.05 * torch.randn(x.shape, generator=generator)
        return F.cross_entropy(network(x), data.y[rows], label_smoothing=0.05)

    return fit(network, loss, seed=seed, steps=steps, lr=lr, decay=0.99, weight_decay=0.05)


def train_noise_net(
    network: NoiseNet,
    data: Images,
    validation: Images,
    *,
    seed: int,
    steps: int = 9000,
    batch: int = 256,
    lr: float = 2e-3,
    real_share: float = 0.1,
) -> nn.Module:
    """Squared error of the predicted noise; returns the moving average where validation was best.

    real_share of the images are training images, the others redrawn from them.
    """
    network.fit_skip(data.x)
    source = redrawable(data.x)

    def loss(network: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator)
        x = redrawn(source[rows], generator, shift=0.09, angle=0.12, scale=0.08, shear=0.08)
        real = torch.rand(batch, 1, 1, 1, generator=generator) < real_share
        x = torch.where(real, data.x[rows], x)
        t = T_MAX * torch.rand(batch, generator=generator) ** 1.5 + 1e-4  # denser where images are sharp
        return noise_error(network, x, t, torch.randn(x.shape, generator=generator))

    def score(network: nn.Module) -> float:
        return sum(denoising_loss(network, validation, t, repeats=4) for t in STOP_TIMES)

    return fit(network, loss, score, seed=seed, steps=steps, lr=lr, decay=0.998, weight_decay=0.05)


# --- more data than there is ---


def deformed(
    x: Tensor,
    generator: torch.Generator,
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


def redrawn(x: Tensor, generator: torch.Generator, **bounds: float) -> Tensor:
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
        source = source + 0.6 * (x - redrawn(source, torch.Generator(), **still))
    return source


# --- what is said of it ---

CARD_SPLITS, CARD_IMAGES = ("validation",), 285  # of each split, at most, for the denoising losses
CARD_FACTS = {"pgd_steps": PGD_STEPS}
CARD = """# Networks of the digits profile

Trained by

{commands}

which wrote this card, too. The same command on the same processor and PyTorch gives the same files; another
thread count or processor rounds differently.

Data: `sklearn.datasets.load_digits`, 1797 images of 8×8 pixels in [0, 1], split (stratified,
seed {split_seed}) into {train} for training, {validation} for validation and {test} for the test. Sizes,
augmentation and stopping were chosen on validation; the test split served for nothing but its column below.
Accuracies with their 95 % interval. The classifiers named after a norm are adversarially trained on
PGD-{pgd_steps} images (step {pgd_step:.3f} eps) at the profile's eps; their robustness is in notebook 06.

| classifier | parameters | MFLOP per image | accuracy, validation (n = {validation}) | test (n = {test}) |
|---|---|---|---|---|
{classifiers}

Noise predictor, for t in (0, {t_max}]: mean squared error of the predicted noise per pixel on validation
({loss_images} images, 8 noises each; 1 is what predicting zero would cost).

| network | parameters | MFLOP per image | {times} |
|---|---|---|{rules}
{scores}
"""
