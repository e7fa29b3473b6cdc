"""Networks with closed forms, to test the library against."""

import torch
from torch import Tensor, nn

from coup_lib.sde import VPSDE


class GaussianMixtureScore(nn.Module):
    """The exact score of a Gaussian mixture carried through the VP-SDE.

    means: (K, D) component means; std: the standard deviation of every component in every direction.
    """

    means: Tensor

    def __init__(self, means: Tensor, std: float) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.data_std = std
        self.sde = VPSDE()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights = torch.softmax(self._exponents(x, t), dim=1)
        t = t.reshape(-1, 1)
        m = self.sde.mean_coeff(t)
        return ((m * weights @ self.means - x.flatten(1)) / self._variance(t)).reshape(x.shape)

    def _variance(self, t: Tensor) -> Tensor:
        return (self.sde.mean_coeff(t) * self.data_std) ** 2 + self.sde.std(t) ** 2

    def _exponents(self, x: Tensor, t: Tensor) -> Tensor:
        distances = x.flatten(1)[:, None] - self.sde.mean_coeff(t).reshape(-1, 1, 1) * self.means
        return -distances.square().sum(-1) / (2 * self._variance(t).reshape(-1, 1))


class SmoothClassifier(nn.Module):
    """A small twice differentiable classifier of images (B, 1, 2, 2) into three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(4 * x)


class Dropping(SmoothClassifier):
    """MC dropout: random in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        flat, first, activation, last = self.layers
        return last(nn.functional.dropout(activation(first(flat(4 * x))), 0.5, training=True))


def small_problem() -> tuple[nn.Module, nn.Module, Tensor]:
    """(mixture score, classifier with frozen weights, images (5, 1, 2, 2) in [0, 1]) in float64."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64) * 0.5
    x = torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    return GaussianMixtureScore(means, 0.3), SmoothClassifier().double().requires_grad_(False), x


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖ of images (B, ...): the worst image's."""
    difference = (value - reference).flatten(1).norm(dim=1)
    return float((difference / reference.flatten(1).norm(dim=1)).max())
