"""DDPM++, the paper's noise predictor for CIFAR-10.

The network of "Score-Based Generative Modeling through Stochastic Differential Equations" (Song et al. 2021),
configurations vp/cifar10_ddpmpp_continuous and vp/cifar10_ddpmpp_deep_continuous of score_sde_pytorch (Yang
Song). DiffPure and COUP use the deep one. Parameters are named as upstream, so that its checkpoints fit.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DDPMpp(nn.Module):
    """Predicts the noise in a VP state: x (B, C, H, W), scaled from [-1, 1], and labels (B,) to noise like x.

    Labels are 999·t: `NoiseScore(network, time_scale=DISCRETE_LEVELS)` is the score. A U-Net: every level on
    the way down leaves skips, and the way up takes them in reverse. It can be differentiated twice in x.
    Fresh weights are PyTorch's own start, not upstream's.

    Args:
        width: channels of the first level, a multiple of 4.
        multipliers: channels of each level, in widths; from level to level the image is halved.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention_at: image sizes at which pixels attend to each other.
        image_size, channels: of x.
        dropout: active in training mode only.

    Raises:
        ValueError: for a width or an image size that cannot be split; in `forward`, for wrong shapes.
    """

    sigmas: Tensor

    def __init__(
        self,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 8,
        attention_at: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        smallest = 2 ** (len(multipliers) - 1)
        if width % 4 or image_size % smallest:
            raise ValueError(
                f"expected width a multiple of 4 and image_size a multiple of {smallest}; "
                f"got {width} and {image_size}"
            )
        self.width, self.image = width, (channels, image_size, image_size)
        self.levels, self.blocks = len(multipliers), blocks
        # Only because checkpoints have it: the noise levels of upstream's other SDE, unused under the VP-SDE.
        levels = torch.linspace(math.log(50), math.log(0.01), 1000, dtype=torch.float64)
        self.register_buffer("sigmas", levels.exp())

        block = partial(ResidualBlock, embedding=4 * width, dropout=dropout)
        plan = [(width * m, image_size >> level in attention_at) for level, m in enumerate(multipliers)]
        modules: list[nn.Module] = []
        skips, at = [width], width
        for level, (outputs, attends) in enumerate(plan):
            if level:
                modules.append(block(at, at, resample=nn.AvgPool2d(2)))
                skips.append(at)
            for _ in range(blocks):
                modules.append(block(at, outputs))
                if attends:
                    modules.append(Attention(outputs))
                at = outputs
                skips.append(at)
        self.n_down = len(modules)
        modules += [block(at, at), Attention(at), block(at, at)]
        for level, (outputs, attends) in reversed(list(enumerate(plan))):
            for _ in range(blocks + 1):
                modules.append(block(at + skips.pop(), outputs, takes_skip=True))
                at = outputs
            if attends:
                modules.append(Attention(at))
            if level:
                modules.append(block(at, at, resample=nn.Upsample(scale_factor=2)))
        time = [nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)]
        stem, head = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(at, channels, 3, padding=1)
        self.all_modules = nn.ModuleList([*time, stem, *modules, group_norm(at), head])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if x.shape[1:] != self.image or labels.shape != x.shape[:1]:
            raise ValueError(
                f"expected x (B, {', '.join(map(str, self.image))}) and labels (B,); "
                f"got {tuple(x.shape)} and {tuple(labels.shape)}"
            )
        first, second, stem, *blocks, norm, head = self.all_modules
        embedding = time_embedding(labels, self.width).to(x.dtype)
        embedding = F.silu(second(F.silu(first(embedding))))
        h = stem(x)
        skips = [h]
        for block in blocks[: self.n_down]:
            h = block(h, embedding)
            if isinstance(block, Attention):
                skips.pop()  # it refines what the block before it left
            skips.append(h)
        for block in blocks[self.n_down :]:
            if isinstance(block, ResidualBlock) and block.takes_skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, embedding)
        return head(F.silu(norm(h)))


class ResidualBlock(nn.Module):
    """BigGAN's residual block: x (B, inputs, H, W) and an embedding (B, embedding) to (B, outputs, H', W').

    `resample` halves or doubles the image inside it; takes_skip says that half of its input is a skip.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding: int,
        dropout: float,
        resample: nn.Module | None = None,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.takes_skip = takes_skip
        self.resample = resample or nn.Identity()
        self.GroupNorm_0 = group_norm(inputs)
        self.Conv_0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Dense_0 = nn.Linear(embedding, outputs)
        self.GroupNorm_1 = group_norm(outputs)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same = inputs == outputs and resample is None
        self.Conv_2 = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
        h = h + self.Dense_0(embedding)[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(F.silu(self.GroupNorm_1(h))))
        return (self.Conv_2(self.resample(x)) + h) / math.sqrt(2)


class Attention(nn.Module):
    """Self-attention with one head over the pixels of x (B, channels, H, W); the embedding is not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = group_norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (PixelLinear(channels) for _ in range(4))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        pixels = self.GroupNorm_0(x).flatten(2)
        query, key, value = self.NIN_0(pixels), self.NIN_1(pixels), self.NIN_2(pixels)
        # Written out: the fused kernels of scaled_dot_product_attention have no second derivative.
        weights = torch.softmax(query.mT @ key / math.sqrt(x.shape[1]), dim=-1)
        return (x + self.NIN_3(value @ weights.mT).view_as(x)) / math.sqrt(2)


class PixelLinear(nn.Module):
    """A linear map of the channels of every pixel, (B, channels, pixels) to the same; W is (in, out)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(channels, channels)))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.W.mT @ pixels + self.b[:, None]


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def time_embedding(labels: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of labels (B,) at width / 2 frequencies from 1 down to 1e-4: (B, width).

    In float32 whatever the network's precision, as upstream has it: half precision would lose the label.
    """
    exponents = torch.arange(width // 2, dtype=torch.float32, device=labels.device)
    phase = labels.float()[:, None] * torch.exp(exponents * (-math.log(10_000) / (width // 2 - 1)))
    return torch.cat([phase.sin(), phase.cos()], dim=1)


DEEP = partial(DDPMpp, blocks=8)  # 106,632,579 parameters: the paper's
