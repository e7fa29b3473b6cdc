"""EDM's unconditional DDPM++, a denoiser for CIFAR images, and how its published weights are read.

The network and the preconditionings of "Elucidating the Design Space of Diffusion-Based Generative Models"
(Karras et al. 2022, NVlabs/edm, --arch=ddpmpp). Likelihood maximisation uses it (Chen et al. 2024). What it
computes is `ddpmpp.DDPMpp`, from parameters that are named and packed in another way: ours are named as
upstream, so that its checkpoints fit.

A file called "…uncond_vp" has this architecture *and the EDM preconditioning*: its "vp" tells it from NCSN++.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.checks import check_like
from coup_lib.networks.checkpoints import load_state
from coup_lib.networks.ddpmpp import check_inputs, check_sizes, group_norm, time_embedding
from coup_lib.score import DISCRETE_LEVELS
from coup_lib.sde import VPSDE, per_image

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise of Karras et al., Eq. 7
Preconditioning = Callable[[Tensor], Coefficients]
Level = tuple[str, int, bool]  # what it is called, channels, whether pixels attend to each other

SIGMA_DATA = 0.5  # standard deviation of the training images, in units of [-1, 1]


def edm_preconditioning(sigma: Tensor) -> Coefficients:
    """The coefficients at sigma (B,), each (B,), that Karras et al. propose (their Table 1, "Ours")."""
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / total**2, sigma * SIGMA_DATA / total, 1 / total, sigma.log() / 4


def vp_preconditioning(sigma: Tensor) -> Coefficients:
    """The coefficients at sigma (B,), each (B,), that make the network a predictor of the VP-SDE's noise.

    Table 1, "VP", with its M = 1000, and beta_d = 19.9 and beta_min = 0.1, which are `VPSDE`'s. Trained from
    t = 1e-5 up. Near there upstream's t(sigma) loses digits in float32 (5e-4 at t = 1e-3), ours does not.
    """
    labels = DISCRETE_LEVELS * VPSDE().time_at(sigma)
    return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), labels


class Denoiser(nn.Module):
    """D(x; σ) = c_skip x + c_out F(c_in x, c_noise), an estimate of the clean image (Karras et al., Eq. 7).

    Args:
        network: F, (x (B, C, H, W), labels (B,)) → like x.
        preconditioning: the one that the network was trained with.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning = edm_preconditioning) -> None:
        super().__init__()
        self.model = network
        self.preconditioning = preconditioning

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised x, like x.

        Args:
            x: (B, C, H, W), an image in [-1, 1] plus sigma times standard normal noise.
            sigma: () or (B,), above 0, on the device of x.

        Raises:
            ValueError: for a sigma of another shape.
        """
        if sigma.shape not in ((), x.shape[:1]):
            raise ValueError(f"expected sigma () or ({len(x)},), one per image; got {tuple(sigma.shape)}")
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma.to(x.dtype).expand(len(x)))
        c_skip, c_out, c_in = (per_image(c, x) for c in (c_skip, c_out, c_in))
        return c_skip * x + c_out * check_like("network", self.model(c_in * x, c_noise), x)


class EDMNetwork(nn.Module):
    """The network inside a `Denoiser`: x (B, C, H, W) and labels (B,) to an array like x.

    A U-Net: everything on the way down leaves a skip, and the way up takes them in reverse. It can be
    differentiated twice in x. Fresh weights are PyTorch's own start, not upstream's.

    Args:
        width: channels of the first convolution, a multiple of 4.
        multipliers: channels of each level, in widths; from level to level the image is halved.
        blocks: residual blocks per level on the way down; one more on the way up.
        attention_at: image sizes at which pixels attend to each other.
        image_size, channels: of x.
        augmentations: numbers that described a training image's augmentation, 9 in the published networks.
            For an image as it is they are all zero, so their weights are kept for the checkpoint's sake only.
        dropout: active in training mode only.

    Raises:
        ValueError: for a width or an image size that cannot be split; in `forward`, for wrong shapes.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention_at: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        augmentations: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(width, image_size, len(multipliers))
        self.width, self.image = width, (channels, image_size, image_size)
        if augmentations:
            self.map_augment = nn.Linear(augmentations, width, bias=False)
        self.map_layer0 = nn.Linear(width, 4 * width)
        self.map_layer1 = nn.Linear(4 * width, 4 * width)

        block = partial(Block, embedding=4 * width, dropout=dropout)
        sizes = [image_size >> level for level in range(len(multipliers))]
        levels = [(f"{n}x{n}", width * m, n in attention_at) for n, m in zip(sizes, multipliers, strict=True)]
        top, outputs, _ = levels[0]
        down, skips = _way_down(block, levels, blocks, width)
        self.enc = nn.ModuleDict({f"{top}_conv": nn.Conv2d(channels, width, 3, padding=1), **down})
        self.dec = nn.ModuleDict(_way_up(block, levels, blocks, skips))
        self.dec[f"{top}_aux_norm"] = group_norm(outputs)
        self.dec[f"{top}_aux_conv"] = nn.Conv2d(outputs, channels, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        check_inputs(x, labels, self.image)
        stem, *down = self.enc.values()
        *up, norm, head = self.dec.values()
        embedding = time_embedding(labels, self.width).to(x.dtype)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        h = stem(x)
        skips = [h]
        for block in down:
            h = block(h, embedding)
            skips.append(h)
        for block in up:
            if block.takes_skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, embedding)
        return head(F.silu(norm(h)))


def _way_down(
    block: Callable[..., nn.Module], levels: Sequence[Level], blocks: int, width: int
) -> tuple[dict[str, nn.Module], list[int]]:
    """The blocks down the levels by name, and the channels of the skips, the first convolution's included."""
    modules: dict[str, nn.Module] = {}
    skips = [width]
    for name, channels, attends in levels:
        if modules:
            modules[f"{name}_down"] = block(skips[-1], skips[-1], resample=nn.AvgPool2d(2))
            skips.append(skips[-1])
        for index in range(blocks):
            modules[f"{name}_block{index}"] = block(skips[-1], channels, attends=attends)
            skips.append(channels)
    return modules, skips


def _way_up(
    block: Callable[..., nn.Module], levels: Sequence[Level], blocks: int, skips: Sequence[int]
) -> dict[str, nn.Module]:
    """The blocks back from the last level by name, which take the skips in reverse."""
    modules: dict[str, nn.Module] = {}
    waiting, inputs = list(skips), skips[-1]
    for name, channels, attends in reversed(levels):
        if modules:
            modules[f"{name}_up"] = block(inputs, inputs, resample=nn.Upsample(scale_factor=2))
        else:
            modules[f"{name}_in0"] = block(inputs, inputs, attends=True)
            modules[f"{name}_in1"] = block(inputs, inputs)
        for index in range(blocks + 1):
            modules[f"{name}_block{index}"] = block(
                inputs + waiting.pop(), channels, attends=attends and index == blocks, takes_skip=True
            )
            inputs = channels
    return modules


class Block(nn.Module):
    """A residual block, with self-attention of one head behind it where `attends`.

    x (B, inputs, H, W) and an embedding (B, embedding) to (B, outputs, H', W'); `resample` halves or doubles
    the image inside it, and takes_skip says that part of its input is a skip.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding: int,
        dropout: float,
        resample: nn.Module | None = None,
        attends: bool = False,
        takes_skip: bool = False,
    ) -> None:
        super().__init__()
        self.attends, self.takes_skip = attends, takes_skip
        self.norm0 = group_norm(inputs)
        self.conv0 = _convolution(inputs, outputs, 3, resample)
        self.affine = nn.Linear(embedding, outputs)
        self.norm1 = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = _convolution(outputs, outputs, 3)
        same = inputs == outputs and resample is None
        self.skip = nn.Identity() if same else _convolution(inputs, outputs, 1, resample)
        if attends:
            self.norm2 = group_norm(outputs)
            self.qkv = _convolution(outputs, 3 * outputs, 1)
            self.proj = _convolution(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (self.skip(x) + h) / math.sqrt(2)
        return (x + self._attention(x)) / math.sqrt(2) if self.attends else x

    def _attention(self, x: Tensor) -> Tensor:
        # A channel's query, key and value are neighbours among the outputs of qkv.
        query, key, value = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).unbind(2)
        # Written out: the fused kernels of scaled_dot_product_attention have no second derivative.
        weights = torch.softmax(query.mT @ key / math.sqrt(x.shape[1]), dim=-1)
        return self.proj((value @ weights.mT).view_as(x))


class ResampledConv2d(nn.Conv2d):
    """A convolution of the image that `resample` halved or doubled."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, resample: nn.Module) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample = resample
        # Only because checkpoints have it: a 2×2 box is what average pooling and repetition do anyway.
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.resample(x))


def _convolution(inputs: int, outputs: int, kernel: int, resample: nn.Module | None = None) -> nn.Conv2d:
    if resample is None:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return ResampledConv2d(inputs, outputs, kernel, resample)


def edm_cifar() -> Denoiser:
    """The published denoiser of CIFAR-10 and CIFAR-100 with fresh weights: 55,733,891 parameters."""
    return Denoiser(EDMNetwork(augmentations=9))


def vp_cifar() -> Denoiser:
    """The same without augmentation, and with the VP preconditioning: 55,732,739 parameters."""
    return Denoiser(EDMNetwork(), vp_preconditioning)


def load_edm(state: Mapping[str, Any], denoiser: Denoiser, name: str = "checkpoint") -> Denoiser:
    """Put the weights of a checkpoint into the denoiser: in eval mode, frozen.

    Args:
        state: tensors by upstream's keys, with or without the "model." of the denoiser and the "module." of
            DataParallel: what torch.load(..., weights_only=True) gives for edm_cifar_uncond_vp.pt and
            edm_cifar100_uncond_vp.pt of Chen et al., which fit `edm_cifar`.
        denoiser: of the checkpoint's sizes, and with its preconditioning, which no key tells.
        name: what errors call the checkpoint, such as its path.

    Raises:
        CheckpointError: for a key that is missing or not expected, or another shape. The denoiser is then as
            it was.
    """
    load_state(denoiser.model, state, name)
    return denoiser.eval().requires_grad_(False)
