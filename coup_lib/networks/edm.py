"""EDM's denoiser for CIFAR images, and how its published weights are read.

From "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al. 2022, NVlabs/edm,
--arch=ddpmpp). Likelihood maximisation uses it (Chen et al. 2024). The network inside is `DDPMpp`, whose
parameters upstream names and packs in another way: they are renamed when they are loaded.

A file called "…uncond_vp" has this architecture *and the EDM preconditioning*: its "vp" tells it from NCSN++.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from coup_lib.checks import check_like
from coup_lib.networks.checkpoints import CheckpointError, bare_weights, load_state
from coup_lib.networks.ddpmpp import Attention, DDPMpp, ResidualBlock
from coup_lib.sde import per_image

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise of Karras et al., Eq. 7
SIGMA_DATA = 0.5  # standard deviation of the training images, in units of [-1, 1]

# Upstream's names of the layers in a residual block, and in the attention behind it, and those of `DDPMpp`.
BLOCK = {"norm0": "GroupNorm_0", "conv0": "Conv_0", "affine": "Dense_0"}
BLOCK |= {"norm1": "GroupNorm_1", "conv1": "Conv_1", "skip": "Conv_2"}
ATTENTION = {"norm2": "GroupNorm_0", "qkv": "qkv", "proj": "NIN_3"}


def preconditioning(sigma: Tensor) -> Coefficients:
    """The coefficients at sigma (B,), each (B,), that Karras et al. propose (their Table 1, "Ours")."""
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / total**2, sigma * SIGMA_DATA / total, 1 / total, sigma.log() / 4


class Denoiser(nn.Module):
    """D(x; σ) = c_skip x + c_out F(c_in x, c_noise), an estimate of the clean image (Karras et al., Eq. 7).

    Args:
        network: F, (x (B, C, H, W), labels (B,)) → like x.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

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
        c_skip, c_out, c_in, c_noise = preconditioning(sigma.to(x.dtype).expand(len(x)))
        c_skip, c_out, c_in = (per_image(c, x) for c in (c_skip, c_out, c_in))
        return c_skip * x + c_out * check_like("network", self.model(c_in * x, c_noise), x)


def edm_cifar() -> Denoiser:
    """The published denoiser of CIFAR-10 and CIFAR-100 with fresh weights: 55,732,739 parameters."""
    return Denoiser(DDPMpp(multipliers=(2, 2, 2), blocks=4))


def load_edm(denoiser: Denoiser, state: Mapping[str, Any], name: str = "checkpoint") -> Denoiser:
    """Put the weights of a checkpoint into the denoiser: in eval mode, frozen.

    Args:
        denoiser: of a `DDPMpp` of the checkpoint's sizes.
        state: tensors by upstream's keys, with or without the "model." of the denoiser and the "module." of
            DataParallel: what torch.load(..., weights_only=True) gives for edm_cifar_uncond_vp.pt and
            edm_cifar100_uncond_vp.pt of Chen et al., which fit `edm_cifar`.
        name: what errors call the checkpoint, such as its path.

    Raises:
        CheckpointError: for a key that is missing or not expected, or another shape. The denoiser is then as
            it was.
    """
    network = denoiser.model
    assert isinstance(network, DDPMpp)
    load_state(network, _ours(bare_weights(state, name), network, name), name)
    return denoiser.eval().requires_grad_(False)


def _ours(state: Mapping[str, Any], network: DDPMpp, name: str) -> dict[str, Any]:
    """Upstream's weights under the names of a `DDPMpp`; what it has no name for keeps its own."""
    ours: dict[str, Any] = dict(network.named_buffers())
    names = _layers(network)
    for key, value in state.items():
        layer, _, kind = re.sub(r"^(module\.|model\.)*", "", key).rpartition(".")
        place, _, last = names.get(layer, layer).rpartition(".")
        if layer == "map_augment":
            continue  # describes how a training image was augmented, zero for an image as it is
        if kind == "resample_filter":  # a 2×2 box is what average pooling and repetition do anyway
            if (got := tuple(getattr(value, "shape", ()))) != (1, 1, 2, 2):
                raise CheckpointError(f"{name}: {key}: expected shape (1, 1, 2, 2), got {got}")
        elif last in ("qkv", "NIN_3") and isinstance(value, Tensor):
            # A channel's query, key and value are neighbours among the outputs of qkv.
            parts = {f"NIN_{i}": value[i::3] for i in range(3)} if last == "qkv" else {last: value}
            for part, rows in parts.items():
                ours[f"{place}.{part}.{'W' if kind == 'weight' else 'b'}"] = (
                    rows.flatten(1).mT if kind == "weight" else rows
                )
        else:
            ours[f"{place}.{last}.{kind}" if layer in names else key] = value
    return ours


def _layers(network: DDPMpp) -> dict[str, str]:
    """Upstream's name of each layer, the image's size in it, and ours."""
    sizes = ["{0}x{0}".format(network.image[1] >> level) for level in range(network.levels)]
    first, last = sizes[0], sizes[-1]
    blocks = []
    for size in sizes:
        blocks += [f"enc.{size}_down"] * (size != first)
        blocks += [f"enc.{size}_block{i}" for i in range(network.blocks)]
    blocks += [f"dec.{last}_in0", f"dec.{last}_in1"]
    for size in reversed(sizes):
        blocks += [f"dec.{size}_up"] * (size != last)
        blocks += [f"dec.{size}_block{i}" for i in range(network.blocks + 1)]
    n, waiting = len(network.all_modules), iter(blocks)
    layers = {"map_layer0": 0, "map_layer1": 1, f"enc.{first}_conv": 2}
    layers |= {f"dec.{first}_aux_norm": n - 2, f"dec.{first}_aux_conv": n - 1}
    names = {theirs: f"all_modules.{place}" for theirs, place in layers.items()}
    for place, module in list(enumerate(network.all_modules))[3:-2]:
        if isinstance(module, ResidualBlock):
            block = next(waiting)
        parts = ATTENTION if isinstance(module, Attention) else BLOCK
        names |= {f"{block}.{theirs}": f"all_modules.{place}.{ours}" for theirs, ours in parts.items()}
    return names
