"""The reverse-time SDE (Eq. 4, 5) by Euler–Maruyama on an integer-indexed grid."""

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from coup_lib.checks import check_like
from coup_lib.sde import T_END, VPSDE, per_image

Callback = Callable[[int, float, Tensor], None]
Noise: TypeAlias = Iterable[
    Tensor
]  # an increment per step, the same ones whenever it is asked: a tensor will do


def time_grid(t_star: float, n_steps: int, t_end: float = T_END) -> Tensor:
    """t_i = t*·(1 - i/N), and t_N = t_end: (N + 1,) in float64, from t* down.

    t* = 0.1 and N = 100 give the paper's dt = 1e-3 with the last step 0.99 dt. The times are computed from
    the index, never summed up, so that a replay meets exactly the times of the forward pass.

    Raises:
        ValueError: if a step t*/N would not be longer than t_end.
    """
    if n_steps < 1 or not t_star / n_steps > t_end:
        raise ValueError(f"expected n_steps >= 1 and t_star / n_steps > {t_end:g}; got {t_star} / {n_steps}")
    times = t_star * (1 - torch.arange(n_steps + 1, dtype=torch.float64) / n_steps)
    times[-1] = t_end
    return times


def reverse_drift(score: nn.Module, sde: VPSDE, x: Tensor, t: Tensor) -> Tensor:
    """f(x,t) - g(t)² s(x,t) of Eq. 4; with a `Guided` score it is the drift of Eq. 5. Like x (B, ...)."""
    return sde.drift(x, t) - per_image(sde.beta(t), x) * check_like("score", score(x, t), x)


def euler_step(
    score: nn.Module, sde: VPSDE, x: Tensor, t: Tensor, dt: Tensor, noise: Tensor | None = None
) -> Tensor:
    """From x at t to t - dt (dt > 0); noise ~ N(0, I) like x, or None for no Brownian motion."""
    x = x - reverse_drift(score, sde, x, t) * dt
    return x if noise is None else x + sde.diffusion(t) * dt.sqrt() * noise


def solve(
    score: nn.Module,
    sde: VPSDE,
    x: Tensor,
    times: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Carry x (B, ...) from times[0] to times[-1] and return the state there.

    Args:
        times: (N + 1,) descending, from `time_grid`.
        noise: N standard normal increments like x, asked for one by one, or None: no Brownian motion
            (Sec. 5.3.1).
        callback: called as callback(i, t_i, x_i) for i = 0 … N, the last one with the result.

    Raises:
        ValueError: for noise of another shape, or a score whose answer is not like x.
        FloatingPointError: when the result is not finite, naming the step and the network where it began.
    """
    return check_end(
        walk(score, sde, x, times, increments(noise, x, times), callback), score, sde, x, times, noise
    )


def walk(
    score: nn.Module,
    sde: VPSDE,
    x: Tensor,
    times: Tensor,
    noise: Iterator[Tensor | None],
    callback: Callback | None = None,
) -> Tensor:
    """`solve` without its checks: as many increments are taken as there are steps."""
    numbers = times.tolist()
    for index, (t, dt) in enumerate(step_times(times, x.dtype, x.device)):
        if callback:
            callback(index, numbers[index], x)
        x = euler_step(score, sde, x, t, dt, next(noise))
    if callback:
        callback(len(numbers) - 1, numbers[-1], x)
    return x


def increments(noise: Noise | None, x: Tensor, times: Tensor) -> Iterator[Tensor | None]:
    """The noise of one walk from x; without noise, None for every step.

    Raises:
        ValueError: for a tensor of another shape; when asked for them, for increments that are not like x, or
            fewer than steps.
    """
    expected = (len(times) - 1, *x.shape)
    if isinstance(noise, Tensor) and noise.shape != expected:
        raise ValueError(f"noise: expected shape {expected}, steps first; got {tuple(noise.shape)}")

    def checked(noise: Noise) -> Iterator[Tensor]:
        for increment in noise:
            yield check_like("noise", increment, x)
        raise ValueError(f"noise: expected {expected[0]} increments, the same ones each time; got fewer")

    return repeat(None) if noise is None else checked(noise)


def check_end(
    end: Tensor, score: nn.Module, sde: VPSDE, start: Tensor, times: Tensor, noise: Noise | None
) -> Tensor:
    """The end of a path from `start`. FloatingPointError, as of `solve`, if it is not finite."""
    if not bool(end.isfinite().all()):  # asked once: asked at every step, a GPU would wait for the answers
        raise FloatingPointError(_fault(score, sde, start, times, noise))
    return end


def _fault(score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor, noise: Noise | None) -> str:
    """Where a path from x left the finite numbers: walked once more, with a look at every module's output."""
    if not bool(x.isfinite().all()):
        return "a path begins at a state with NaN or infinity"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            if isinstance(result, Tensor) and not bool(result.isfinite().all()):
                found.append(f"{name or 'score'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in score.named_modules()]
    try:
        left = increments(noise, x, times)
        for index, (t, dt) in enumerate(step_times(times, x.dtype, x.device)):
            with torch.no_grad():
                x = euler_step(score, sde, x, t, dt, next(left))
            if found or not bool(x.isfinite().all()):
                where = found[0] if found else "the step itself"
                return f"NaN or infinity from {where} in step {index} of {len(times) - 1}, t = {t:g}"
    finally:
        for handle in hooks:
            handle.remove()
    return "a path ended in NaN or infinity, and did not when it was walked once more"


def step_times(times: Tensor, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(t_i, t_i - t_{i+1}) of every step, differences taken in float64; `time_of` knows t_i's number."""
    begins = times[:-1].to(device, dtype).unbind()
    for t, value in zip(begins, times.to(dtype).tolist(), strict=False):
        vars(t)["number"] = value
    return list(zip(begins, (times[:-1] - times[1:]).to(device, dtype).unbind(), strict=True))


def time_of(t: Tensor) -> float:
    """t of shape () as a number, without waiting for the device where t is from `step_times`."""
    return getattr(t, "number", None) or float(t)
