"""The variance-preserving SDE of Eq. 3 and 6, and its closed forms."""

from dataclasses import dataclass

import torch
from torch import Tensor

T_END = 1e-5  # the reverse SDE stops here: the score is singular at t = 0 (DiffPure, COUP release)


@dataclass(frozen=True)
class VPSDE:
    """dx = f(x,t) dt + g(t) dw with f = -β(t)x/2, g = √β(t) and β linear on t ∈ [0, 1] (Eq. 3, 6)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Tensor) -> Tensor:
        """β(t), the shape of t."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def gamma(self, t: Tensor) -> Tensor:
        """γ(t) = ½∫₀ᵗ β(s) ds of Proposition 2, the shape of t."""
        return 0.5 * t * self.beta_min + 0.25 * t**2 * (self.beta_max - self.beta_min)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) of Eq. 6 for x (B, ...) and t of shape () or (B,)."""
        return -0.5 * per_image(self.beta(t), x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) of Eq. 6, the shape of t."""
        return self.beta(t).sqrt()

    def mean_coeff(self, t: Tensor) -> Tensor:
        """m(t) = exp(-γ(t)), so that x_t | x_0 ~ N(m x_0, std² I)."""
        return torch.exp(-self.gamma(t))

    def std(self, t: Tensor) -> Tensor:
        """√(1 - m(t)²). By expm1: in float32 the plain formula is off by 6e-3 at t = 1e-5."""
        return torch.sqrt(-torch.expm1(-2 * self.gamma(t)))

    def time_at(self, sigma: Tensor) -> Tensor:
        """The t at which std(t)/m(t) is sigma ≥ 0, the shape of sigma: the inverse in closed form.

        There 2γ(t) = log(1 + sigma²), a quadratic in t. By log1p and by the form of the root in which nothing
        cancels: in float32 the plain formula is off by 6e-2 at t = 1e-5 and by 5e-4 at t = 1e-3.
        """
        double_gamma = torch.log1p(sigma**2)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * double_gamma)
        return 2 * double_gamma / (self.beta_min + root)

    def discrete_marginal(self, t_star: float, n_levels: int = 1000) -> tuple[float, float]:
        """(√ᾱ, √(1-ᾱ)) after the first n_levels·t* steps of the *discrete* chain.

        DiffPure noises its input with these, not with the closed form (0.94711 against 0.94672 at t* = 0.1).
        """
        alpha_bar = (1 - self._betas(n_levels))[: round(n_levels * t_star)].prod()
        return float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())

    def discrete_std(self, t: Tensor, n_levels: int = 1000) -> Tensor:
        """√(1-ᾱ) after n_levels·t steps of the *discrete* chain, the shape of t in [0, 1].

        Between two steps log ᾱ is interpolated linearly.
        """
        logs = torch.log1p(-self._betas(n_levels)).cumsum(0)
        logs = torch.cat([logs.new_zeros(1), logs]).to(t)
        step = (n_levels * t).long().clamp(0, n_levels - 1)
        return torch.sqrt(-torch.expm1(torch.lerp(logs[step], logs[step + 1], n_levels * t - step)))

    def _betas(self, n_levels: int) -> Tensor:
        """β of every step of the discrete chain, (n_levels,)."""
        first, last = self.beta_min / n_levels, self.beta_max / n_levels
        return torch.linspace(first, last, n_levels, dtype=torch.float64)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample of x_t | x_0 = x for x (B, ...), t () or (B,) and standard normal noise like x."""
        return per_image(self.mean_coeff(t), x) * x + per_image(self.std(t), x) * noise


def per_image(value: Tensor, x: Tensor) -> Tensor:
    """value of shape () or (B,) made broadcastable against x (B, ...). ValueError for any other shape."""
    if value.ndim and value.shape != x.shape[:1]:
        raise ValueError(f"expected a number, or one per image, ({len(x)},); got shape {tuple(value.shape)}")
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value
