"""Gradients through the solver, by name; every one has the same forward pass.

exact        backpropagation through the discretised solver, second-order guidance term included
first_order  the same with the guidance held constant (what the authors' release does)
adjoint      the paper's augmented SDE (Sec. 4.2.1) by torchsde, on the same Brownian path
bpda         the identity (in `purify.Purifier`: it skips the forward noise and the scaling too)
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torchsde
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coup_lib.guidance import first_order
from coup_lib.sde import VPSDE
from coup_lib.solver import Callback, euler_step, reverse_drift, solve, step_times

ACTIVATION_BUDGET = 2 * 2**30  # bytes of activations that plain autograd may keep before replaying pays
THROUGH_STEPS = ("exact", "first_order")  # gradients that autograd takes step by step

# Of one step of one image, by score: an attack asks thousands of times.
_step_bytes: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()

PullBack = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def solve_with_gradient(
    gradient: str,
    score: nn.Module,
    sde: VPSDE,
    x: Tensor,
    times: Tensor,
    noise: Tensor | None,
    activation_budget: int = ACTIVATION_BUDGET,
) -> Tensor:
    """`solver.solve` with the named gradient for x.

    Where the activations of all steps take fewer bytes than activation_budget, plain autograd keeps them:
    that saves one forward pass. Else what is kept are the N + 1 states (and, for the adjoint, the noise):
    every step is replayed from its own stored state, so the memory for activations does not grow with N.
    The noise is additive and drops out of the derivative. Both ways give the same numbers.
    """
    followed = _followed(score, gradient)

    def run(x: Tensor, keep: Callback | None = None) -> Tensor:
        return solve(followed, sde, x, times, noise, keep)

    if not (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    if gradient == "adjoint":
        return _Path.apply(x, run, lambda states, v: adjoint(followed, sde, states, times, noise, v))
    if len(x) <= images_kept(gradient, score, sde, x, times, activation_budget):
        return run(x)
    return _Path.apply(x, run, lambda states, v: replay(followed, sde, states, times, v))


def images_kept(
    gradient: str,
    score: nn.Module,
    sde: VPSDE,
    x: Tensor,
    times: Tensor,
    activation_budget: int = ACTIVATION_BUDGET,
) -> int:
    """How many images like x fit with all activations of their paths, so that none needs to be replayed."""
    measured = _step_bytes.setdefault(score, {})
    kind = gradient, x.shape[1:], x.dtype, x.device
    if kind not in measured:
        measured[kind] = activation_bytes(_followed(score, gradient), sde, x[:1], times[:2])
    return activation_budget // max(measured[kind] * (len(times) - 1), 1)


def _followed(score: nn.Module, gradient: str) -> nn.Module:
    """The score as the gradient sees it."""
    return first_order(score) if gradient == "first_order" else score


def activation_bytes(score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor) -> int:
    """What plain autograd would keep for all steps: measured on one step of one image, and multiplied."""
    sizes: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*score.parameters(), *score.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    t, dt = step_times(times, x.dtype, x.device)[0]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        euler_step(score, sde, x[:1].detach().requires_grad_(), t, dt)
    return sum(sizes.values()) * len(x) * (len(times) - 1)


class _Path(torch.autograd.Function):
    """A path that keeps its states, and pulls a gradient back along them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[..., Tensor], pull_back: PullBack) -> Tensor:
        states: list[Tensor] = []
        result = run(x, lambda index, t, state: states.append(state))
        ctx.pull_back = pull_back
        ctx.save_for_backward(*states)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pull_back(ctx.saved_tensors, v), None, None


def replay(score: nn.Module, sde: VPSDE, states: tuple[Tensor, ...], times: Tensor, v: Tensor) -> Tensor:
    """vᵀ ∂x_N/∂x_0 by one vector-Jacobian product per step, last step first."""
    steps = step_times(times, v.dtype, v.device)
    for state, (t, dt) in zip(reversed(states[:-1]), reversed(steps), strict=True):
        with torch.enable_grad():
            x = state.detach().requires_grad_()
            (v,) = torch.autograd.grad(euler_step(score, sde, x, t, dt), x, v)
    return v


def adjoint(
    score: nn.Module,
    sde: VPSDE,
    states: tuple[Tensor, ...],
    times: Tensor,
    noise: Tensor | None,
    v: Tensor,
) -> Tensor:
    """vᵀ ∂x_N/∂x_0 by the paper's augmented SDE, which rebuilds the path backwards from its end.

    torchsde walks from 0 to t* - t_N with the grid's step; only the state at the end is handed over (as
    DiffPure and the COUP release do), so the rebuilt path drifts from the true one unless the step is small.
    Networks must be frozen: their parameters would otherwise join the adjoint state.
    """
    x = states[0].detach().flatten(1)
    path = GridBrownian(times, noise, states[0])
    ends = torch.tensor([0.0, float(times[0] - times[-1])], dtype=x.dtype, device=x.device)
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
        return -reverse_drift(self.score, self.sde, x.reshape(self.shape), self.t_star - s).flatten(1)

    def g(self, s: Tensor, x: Tensor) -> Tensor:
        scale = self.sde.diffusion(self.t_star - s) if self.noisy else torch.zeros_like(s)
        return scale * torch.ones_like(x)


class GridBrownian(torchsde.BaseBrownian):
    """The Brownian path whose increments on our grid are √dt·noise, linear in between."""

    def __init__(self, times: Tensor, noise: Tensor | None, like: Tensor) -> None:
        flat = like.flatten(1)
        self._like = flat
        self._times = (times[0] - times).to(like.device)
        increments = torch.zeros(len(times), *flat.shape, dtype=torch.float64, device=like.device)
        if noise is not None:
            roots = (times[:-1] - times[1:]).sqrt().to(like.device)
            increments[1:] = roots[:, None, None] * noise.flatten(2)
        self._path = increments.cumsum(0)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        return (self._at(tb) - self._at(ta)).to(self._like.dtype)

    def _at(self, s: Any) -> Tensor:
        index = min(max(int(torch.searchsorted(self._times, float(s))) - 1, 0), len(self._times) - 2)
        left, right = float(self._times[index]), float(self._times[index + 1])
        return torch.lerp(self._path[index], self._path[index + 1], (float(s) - left) / (right - left))

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def shape(self) -> torch.Size:
        return self._like.shape

    @property
    def levy_area_approximation(self) -> str:
        return "none"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={len(self._times) - 1})"
