"""Scores ∇ₓ log p_t(x) from networks that predict noise or the clean image, and denoisers from scores."""

import torch
from torch import Tensor, nn

from coup_lib.checks import check_like, count, number
from coup_lib.sde import VPSDE, per_image

DISCRETE_LEVELS = 999.0  # score_sde's continuous VP networks are labelled with t·999


class NoiseScore(nn.Module):
    """The score s(x, t) = -ε(x, label) / std of a network that predicts the noise.

    Args:
        network: (x (B, C, H, W) in the state's range [-1, 1], labels (B,)) → predicted noise, like x. It may
            be the `sample` of what the network returns, as in diffusers, and the first half of 2C channels:
            the variances that a network of improved DDPM has behind them are left out.
        sde: gives std(t), the continuous marginal.
        time_scale: labels are t·time_scale; 1 for our small networks, `DISCRETE_LEVELS` for the paper's
            DDPM++.
        n_levels: of a network that was trained on as many discrete steps of this SDE (DDPM's 1000 are those
            of the paper's): labels are n_levels·t - 1, the std is that step's, and time_scale is not used.
            Between 0 and the first step the first is taken.

    Raises:
        ValueError: in `forward`, for a network whose answer is not like x.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: VPSDE | None = None,
        time_scale: float = 1.0,
        *,
        n_levels: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.sde = sde or VPSDE()
        self.time_scale = number("time_scale", time_scale, 0)
        self.n_levels = None if n_levels is None else count("n_levels", n_levels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """s(x, t) for x (B, C, H, W) and t of shape () or (B,), in (0, 1]."""
        label, std = self._level(t)
        std = per_image(std, x)
        # Never in half precision: bfloat16 has no number between 99 and 99.5.
        labels = label.to(torch.promote_types(x.dtype, torch.float32)).expand(len(x))
        return -self._noise(x, labels) / std

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The label of t and the std that the network takes it for, each the shape of t."""
        if self.n_levels is None:
            return t * self.time_scale, self.sde.std(t)
        t = t.clamp(min=1 / self.n_levels)
        return t * self.n_levels - 1, self.sde.discrete_std(t, self.n_levels)

    def _noise(self, x: Tensor, labels: Tensor) -> Tensor:
        answer = self.network(x, labels)
        noise = getattr(answer, "sample", answer)
        if isinstance(noise, Tensor) and noise.shape[1:2] == (2 * x.shape[1],):
            noise = noise[:, : x.shape[1]]
        return check_like("network", noise, x)


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
        denoised = check_like("denoiser", self.denoiser(x / per_image(mean, x), std / mean), x)
        return (per_image(mean, x) * denoised - x) / per_image(std, x) ** 2


class ScoreDenoiser(nn.Module):
    """The denoiser D(x; σ) of a score, the inverse of `DenoisedScore`.

    With t where std(t)/m(t) = σ and x_t = m x, D = (x_t + std² s(x_t, t))/m; that is x + std²/m s(m x, t).

    Args:
        score: s(x, t) of the SDE, for t of the shape of σ.
        sde: its own; None: what the score says itself, see `agreed_sde`.
    """

    def __init__(self, score: nn.Module, sde: VPSDE | None = None) -> None:
        super().__init__()
        self.score = score
        self.sde = agreed_sde(score, sde)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; σ) for x (B, C, H, W), an image in [-1, 1] plus σ times noise, and σ > 0, () or (B,)."""
        t = self.sde.time_at(sigma)
        mean, std = self.sde.mean_coeff(t), self.sde.std(t)
        score = check_like("score", self.score(per_image(mean, x) * x, t), x)
        return x + per_image(std**2 / mean, x) * score


def sde_of(score: nn.Module) -> VPSDE | None:
    """The SDE of a score by the outermost `sde` that it or what it wraps has; None where nothing says.

    Raises:
        ValueError: for parts of different SDEs.
    """
    if hasattr(score, "sde"):
        return score.sde if isinstance(score.sde, VPSDE) else None
    found = dict.fromkeys(sde for part in score.children() if (sde := sde_of(part)))
    if len(found) > 1:
        raise ValueError(f"score: expected parts of one SDE; got {' and '.join(map(str, found))}")
    return next(iter(found), None)


def agreed_sde(score: nn.Module, sde: VPSDE | None) -> VPSDE:
    """`sde`, or the score's own, or the paper's: the first that is known.

    Raises:
        ValueError: for another one than the score's own.
    """
    own = sde_of(score)
    if sde and own and sde != own:
        raise ValueError(f"sde: expected that of the score, {own}; got {sde}")
    return sde or own or VPSDE()
