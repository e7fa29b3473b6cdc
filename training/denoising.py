"""What a noise predictor is trained to lower, and measured by."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.data import Images
from coup_lib.guidance import to_state
from coup_lib.sde import VPSDE

BATCH = 512


def noise_error(network: nn.Module, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error per pixel of the predicted noise in images x (B, C, H, W) in [0, 1] at times t (B,).

    Denoising score matching for Eq. 3, the same weight for every t.
    """
    predicted = network(VPSDE().noised(to_state(x), t, noise), t)
    return F.mse_loss(predicted.float(), noise)


@torch.no_grad()
def denoising_loss(network: nn.Module, data: Images, t: float, *, repeats: int = 8, seed: int = 0) -> float:
    """`noise_error` at time t, over repeats fixed noises per image."""
    generator = torch.Generator().manual_seed(seed)
    x = data.x.repeat(repeats, 1, 1, 1)
    times, noise = torch.full((len(x),), t), torch.randn(x.shape, generator=generator)
    parts = zip(*(values.to(x.device).split(BATCH) for values in (x, times, noise)), strict=True)
    return sum(len(part[0]) * noise_error(network, *part).item() for part in parts) / len(x)
