"""Scores ∇ₓ log p_t(x) from networks that predict noise."""

from torch import Tensor, nn

from coup_lib.sde import VPSDE

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
        labels = (t * self.time_scale).to(x.dtype).expand(len(x))
        std = self.sde.std(t)
        return -self.network(x, labels) / (std.reshape(-1, *[1] * (x.ndim - 1)) if std.ndim else std)
