"""The paper's gradient: the augmented SDE of Sec. 4.2.1, solved backwards by torchsde."""

from bisect import bisect_left
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

from coup_lib.sde import VPSDE
from coup_lib.solver import Noise, reverse_drift


def adjoint(
    score: nn.Module,
    sde: VPSDE,
    states: tuple[Tensor, ...],
    times: Tensor,
    noise: Noise | None,
    v: Tensor,
) -> Tensor:
    """vᵀ ∂x_N/∂x_0 by the paper's augmented SDE, which rebuilds the path backwards from its end.

    torchsde walks from 0 to t* - t_N with the grid's step; only the state at the end is handed over (as
    DiffPure and the COUP release do), so the rebuilt path drifts from the true one unless the step is small.
    Weights get no gradient.
    """
    x = states[0].detach().flatten(1)
    path = GridBrownian(times, noise, states[0])
    ends = torch.tensor([0.0, float(times[0] - times[-1])], dtype=x.dtype)  # where torchsde can look at them
    with torch.enable_grad():
        x.requires_grad_()
        walked = torchsde.sdeint_adjoint(
            ReverseSDE(score, sde, float(times[0]), states[0].shape, noisy=noise is not None),
            x,
            ends,
            bm=path,
            method="euler",
            adjoint_method="euler",
            dt=float(times[0] - times[1]),
            adjoint_params=(),
        )
        (gradient,) = torch.autograd.grad(walked[-1], x, v.flatten(1))
    return gradient.reshape(states[0].shape)


class ReverseSDE(nn.Module):
    """The reverse SDE as torchsde wants it: flat states, a time s = t* - t that grows."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(
        self, score: nn.Module, sde: VPSDE, t_star: float, shape: torch.Size, *, noisy: bool
    ) -> None:
        super().__init__()
        self.score, self.sde, self.t_star, self.shape, self.noisy = score, sde, t_star, shape, noisy

    def f(self, s: Tensor, x: Tensor) -> Tensor:
        t = (self.t_star - s).to(x.device, non_blocking=True)
        return -reverse_drift(self.score, self.sde, x.reshape(self.shape), t).flatten(1)

    def g(self, s: Tensor, x: Tensor) -> Tensor:
        return float(self.sde.diffusion(self.t_star - s)) * self.noisy * torch.ones_like(x)


class GridBrownian(torchsde.BaseBrownian):
    """The Brownian path whose increments on our grid are √dt·noise, linear in between."""

    shape = dtype = device = None  # of the flat state; torchsde asks for these and for the next two
    levy_area_approximation = "none"
    __repr__ = object.__repr__

    def __init__(self, times: Tensor, noise: Noise | None, like: Tensor) -> None:
        flat = like.flatten(1)
        self.shape, self.dtype, self.device = flat.shape, flat.dtype, flat.device
        self._times = (times[0] - times).tolist()
        increments = torch.zeros(len(times), *flat.shape, dtype=torch.float64, device=like.device)
        if noise is not None:
            roots = (times[:-1] - times[1:]).sqrt().to(like.device)
            for place, (root, increment) in enumerate(zip(roots, noise, strict=True), start=1):
                increments[place] = root * increment.flatten(1).double()
        self._path = increments.cumsum(0)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        return (self._at(tb) - self._at(ta)).to(self.dtype)

    def _at(self, s: Any) -> Tensor:
        index = min(max(bisect_left(self._times, float(s)) - 1, 0), len(self._times) - 2)
        left, right = self._times[index : index + 2]
        return torch.lerp(self._path[index], self._path[index + 1], (float(s) - left) / (right - left))
