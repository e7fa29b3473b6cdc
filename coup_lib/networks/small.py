"""The networks of the small profiles: classifiers and a noise predictor, cheap to differentiate twice.

SiLU everywhere, as attacks on guidance need second derivatives. 8×8 images are seen as 4×4 patches of 2×2
pixels: there convolutions run near the CPU's peak, at full resolution they wait for memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.checks import choice
from coup_lib.networks.ddpmpp import DDPMpp
from coup_lib.networks.resnet import cifar_resnet
from coup_lib.score import DISCRETE_LEVELS
from coup_lib.sde import VPSDE, per_image

T_MAX = 0.3  # the noise predictors are trained on t ∈ (0, T_MAX]


class PatchCNN(nn.Module):
    """A classifier: images (B, 1, 8, 8) in [0, 1] to logits (B, classes), normalisation inside.

    Two convolutions, then a residual dense layer over all that is left, 2×2 positions of hidden channels.
    """

    def __init__(self, width: int, hidden: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, hidden, 2, stride=2)
        self.dense = nn.Linear(4 * hidden, 4 * hidden)
        self.head = nn.Linear(4 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.stem(F.pixel_unshuffle(2 * x - 1, 2)))
        h = h + F.silu(self.middle(h))
        h = F.silu(self.down(h)).flatten(1)
        return self.head(h + F.silu(self.dense(h)))


class NoiseNet(nn.Module):
    """Predicts the noise in a VP state: x (B, 1, 8, 8), scaled from [-1, 1], and t (B,) to noise like x.

    The score of Eq. 6 is -noise/std(t). Meant for t ∈ (0, T_MAX]; beyond, it extrapolates.
    Built in is the affine map of x that is optimal for Gaussian pixels; a network whose last layer starts
    at zero adds the rest. It has a local path, convolutions over width channels, and a global one, a residual
    perceptron of hidden units: the images are small enough for one dense layer to see all of them.
    """

    mean: Tensor
    variance: Tensor
    frequencies: Tensor

    def __init__(self, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.sde = VPSDE()
        self.register_buffer("mean", torch.zeros(1, 1, 8, 8))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("frequencies", torch.linspace(0.25, 1.5, 8))
        self.widths = [width] * 2 + [hidden] * 2 * blocks
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, sum(self.widths)))
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.local = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.gather = nn.Linear(16 * width, hidden)
        self.blocks = nn.ModuleList(GlobalBlock(hidden) for _ in range(blocks))
        self.spread = nn.Linear(hidden, 16 * width)
        self.head = nn.Conv2d(width, 4, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def fit_skip(self, images: Tensor) -> None:
        """Set the built-in Gaussian to the mean and overall variance of images (n, 1, 8, 8) in [0, 1]."""
        scaled = 2 * images - 1
        self.mean.copy_(scaled.mean(0, keepdim=True))
        self.variance.copy_((scaled - self.mean).square().mean())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m, std = self.sde.mean_coeff(t)[:, None, None, None], self.sde.std(t)[:, None, None, None]
        variance = m.square() * self.variance + std.square()
        centred = x - m * self.mean
        return std / variance * centred + self._rest(centred / variance.sqrt(), self._modulation(m, std))

    def _modulation(self, m: Tensor, std: Tensor) -> tuple[Tensor, ...]:
        # Below std/m = 0.01 nothing is left to tell noise from grey levels: one embedding for all those t.
        phase = torch.log(std / m).clamp_min(-4.6).flatten(1) * self.frequencies
        return self.embed(torch.cat([phase.sin(), phase.cos()], dim=1)).split(self.widths, dim=1)

    def _rest(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        scale, shift = (value[:, :, None, None] for value in modulation[:2])
        near = self.stem(F.pixel_unshuffle(x, 2))
        near = near + self.local[0](F.silu(near * (1 + scale) + shift))
        far = self.gather(F.silu(near).flatten(1))
        for i, block in enumerate(self.blocks):
            far = block(far, *modulation[2 * i + 2 : 2 * i + 4])
        near = near + self.spread(far).view_as(near)
        for convolution in self.local[1:]:
            near = near + convolution(F.silu(near))
        return F.pixel_shuffle(self.head(F.silu(near)), 2)


class GlobalBlock(nn.Module):
    """A residual perceptron on h (B, hidden), modulated by scale and shift (B, hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.first = nn.Linear(hidden, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(self.norm(h)) * (1 + scale) + shift))


class PatchedDDPMpp(nn.Module):
    """Predicts the noise in a VP state: x (B, C, H, W), scaled from [-1, 1], and t (B,) to noise like x.

    A small DDPM++ over patches of 2×2 pixels: a quarter of the places, four times the channels. Built in is
    what is optimal for independent Gaussian pixels of variance 1/4; the U-Net predicts the rest, which has
    unit variance at every t (the preconditioning of Karras et al. 2022). Meant for t ∈ (0, T_MAX].
    """

    VARIANCE = 0.25

    def __init__(self, *, image_size: int = 32, channels: int = 3, **sizes: Any) -> None:
        super().__init__()
        self.sde = VPSDE()
        self.network = DDPMpp(image_size=image_size // 2, channels=4 * channels, dropout=0.0, **sizes)
        for parameter in self.network.all_modules[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m, std = per_image(self.sde.mean_coeff(t), x), per_image(self.sde.std(t), x)
        variance = m.square() * self.VARIANCE + std.square()
        rest = self.network(F.pixel_unshuffle(x / variance.sqrt(), 2), DISCRETE_LEVELS * t)
        return std / variance * x + m * (self.VARIANCE / variance).sqrt() * F.pixel_shuffle(rest, 2)


SMALL = partial(PatchCNN, width=16, hidden=32)
NETWORKS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "digits": {
        "cnn-small": SMALL,
        "cnn-large": partial(PatchCNN, width=40, hidden=64),
        # Adversarially trained, each for one norm (notebook 06).
        "cnn-small-linf": SMALL,
        "cnn-small-l2": SMALL,
        "score": partial(NoiseNet, width=24, hidden=192, blocks=2),
    },
    "cifar10": {
        # Adversarially trained (notebook 06).
        "resnet20-l2": partial(cifar_resnet, 20),
        "resnet20-linf": partial(cifar_resnet, 20),
        "score-small": partial(PatchedDDPMpp, width=64, multipliers=(1, 2), blocks=2, attention_at=(8,)),
    },
}


def build_network(dataset: str, name: str) -> nn.Module:
    """An untrained network of a profile; ValueError, with the known ones, for an unknown data set or name."""
    known = NETWORKS[choice("data set", dataset, NETWORKS)]
    return known[choice("network", name, known)]()
