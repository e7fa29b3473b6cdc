"""Scores ∇ₓ log p_t(x) from networks that predict noise or the clean image, and denoisers from scores."""

import torch
from torch import Tensor, nn

from coup_lib.sde import VPSDE, per_image

DISCRETE_LEVELS = 999.0  # score_sde's continuous VP networks are labelled with t·999


class NoiseScore(nn.Module):
    """The score s(x, t) = -ε(x, t·time_scale) / std(t) of a network that predicts the noise.

    Args:
        network: (x (B, C, H, W) in the state's range [-1, 1], labels (B,)) → predicted noise, like x.
        sde: gives std(t), the continuous marginal.
        time_scale: 1 for our small networks, `DISCRETE_LEVELS` for the paper's DDPM++.
    """

    def __init__(self, network: nn.Module, sde: VPSDE | None = None, time_scale: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.sde = sde or VPSDE()
        self.time_scale = time_scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """s(x, t) for x (B, C, H, W) and t of shape () or (B,), in (0, 1]."""
        # Never in half precision: bfloat16 has no number between 99 and 99.5.
        labels = (t * self.time_scale).to(torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        std = self.sde.std(t)
        return -self.network(x, labels) / (std.reshape(-1, *[1] * (x.ndim - 1)) if std.ndim else std)


class DenoisedScore(nn.Module):
    """The score s(x, t) = (m D(x/m; σ) - x) / std² of a denoiser, with m and std of the SDE and σ = std/m.

    By Tweedie's formula. Near t = 0 two nearly equal images are subtracted: in float32 the score's relative
    error is some 1e-7/std.

    Args:
        denoiser: D, (x (B, C, H, W) in [-1, 1] plus σ times noise, σ of the shape of t) → the clean image.
        sde: whose score it is to be.
    """

    def __init__(self, denoiser: nn.Module, sde: VPSDE | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sde = sde or VPSDE()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """s(x, t) for x (B, C, H, W) and t of shape () or (B,), in (0, 1]."""
        mean, std = self.sde.mean_coeff(t), self.sde.std(t)
        denoised = self.denoiser(x / per_image(mean, x), std / mean)
        return (per_image(mean, x) * denoised - x) / per_image(std, x) ** 2


class ScoreDenoiser(nn.Module):
    """The denoiser D(x; σ) of a score, the inverse of `DenoisedScore`.

    With t where std(t)/m(t) = σ and x_t = m x, D = (x_t + std² s(x_t, t))/m; that is x + std²/m s(m x, t).

    Args:
        score: s(x, t) of the SDE, for t of the shape of σ.
        sde: its own.
    """

    def __init__(self, score: nn.Module, sde: VPSDE | None = None) -> None:
        super().__init__()
        self.score = score
        self.sde = sde or VPSDE()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; σ) for x (B, C, H, W), an image in [-1, 1] plus σ times noise, and σ > 0, () or (B,)."""
        t = self.sde.time_at(sigma)
        mean, std = self.sde.mean_coeff(t), self.sde.std(t)
        return x + per_image(std**2 / mean, x) * self.score(per_image(mean, x) * x, t)
