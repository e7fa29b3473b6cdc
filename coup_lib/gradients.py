"""Gradients through the solver, by name; every one has the same forward pass.

exact        backpropagation through the discretised solver, second-order guidance term included
first_order  the same with the guidance held constant (the authors' release leaves that out of its adjoint)
adjoint      the paper's augmented SDE (Sec. 4.2.1) by torchsde, on the same Brownian path
bpda         the identity (in `purify.Purifier`: it skips the forward noise and the scaling too)
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.backends import cudnn
from torch.overrides import TorchFunctionMode

from coup_lib.checks import choice, in_one_line, number
from coup_lib.contexts import assigned
from coup_lib.guidance import FirstOrder, Guided
from coup_lib.randomness import Source, States, alike, restored, set_states, sources, states_of
from coup_lib.sde import VPSDE
from coup_lib.solver import Callback, Noise, check_end, euler_step, increments, step_times, walk

BUDGET_VARIABLE = "COUP_ACTIVATIONS"
CPU_BUDGET, GPU_SHARE, MOST = 2.0, 0.5, 1e6  # GiB of activations; on a GPU, of what is free
GRADIENTS = ("exact", "first_order", "adjoint", "bpda")
THROUGH_STEPS = ("exact", "first_order")  # gradients that autograd takes step by step

# Of one step, by score: an attack asks thousands of times.
_step_bytes: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()

Randomness = Sequence[States]  # of some sources, before every step and at the end
PullBack = Callable[[tuple[Tensor, ...], Randomness, Tensor], Tensor]
Step = Callable[[int, Tensor], Tensor]  # (index, state) → next state


def solve_with_gradient(
    gradient: str,
    score: nn.Module,
    sde: VPSDE,
    x: Tensor,
    times: Tensor,
    noise: Noise | None,
    activation_budget: int | None = None,
) -> Tensor:
    """`solver.solve` with the named gradient for x.

    Of the last steps, as many as the budget has room for, autograd keeps the activations: that saves their
    second forward pass. Of those before it keeps the states (the adjoint those of all steps, and the noise),
    and every step is replayed from its own, so that activations do not grow with N. The noise is additive and
    drops out of the derivative. Both ways give the same numbers, also of networks that draw random ones: a
    replay draws the same again.

    Args:
        activation_budget: bytes; None: those of `free_for_activations`.

    Raises:
        ValueError: for an unknown gradient, for weights that ask for a gradient and have no room for all
            activations, for "first_order" of a score that differentiates something which is not a `Guided`'s,
            and (when it is pulled back) for "adjoint" of one that draws random numbers.
    """
    choice("gradient", gradient, (*THROUGH_STEPS, "adjoint"))
    followed, left = _followed(score, gradient), increments(noise, x, times)

    def run(x: Tensor, keep: Callback | None = None, first: int = 0, end: int = len(times) - 1) -> Tensor:
        return walk(followed, sde, x, times[first : end + 1], left, keep)

    def pull_back(states: tuple[Tensor, ...], randomness: Randomness, v: Tensor) -> Tensor:
        from coup_lib.adjoint import adjoint  # torchsde, which nothing else needs, takes a second to load

        if not alike(randomness[0], randomness[-1]):
            raise ValueError("gradient: the score draws random numbers, which adjoint cannot draw again")
        return adjoint(followed, sde, states, times, noise, v)

    start = x
    if not (torch.is_grad_enabled() and x.requires_grad):
        x = run(x)
    elif gradient == "adjoint":
        x = _Path.apply(x, run, pull_back, sources(score, x.device))
    else:
        first = len(times) - 1 - steps_kept(gradient, score, sde, x, times, activation_budget)
        if first:
            if any(weight.requires_grad for weight in score.parameters()):
                raise ValueError("score: expected frozen weights, of which a replayed step knows no gradient")
            walked, steps = partial(run, end=first), step_times(times, x.dtype, x.device)
            x = replayed(x, walked, lambda index, x: euler_step(followed, sde, x, *steps[index]), score)
        x = run(x, first=first)
    return check_end(x, score, sde, start, times, noise)


_graphs = ContextVar("purifications that share one graph", default=1)


def in_one_graph(purifications: int) -> AbstractContextManager[None]:
    """In here so many purifications are differentiated together, and share the room for activations."""
    return assigned(_graphs, _graphs.get() * purifications)


@in_one_line()
def free_for_activations(device: torch.device) -> int:
    """Bytes for activations: COUP_ACTIVATIONS, in GiB, or else half of a GPU's free memory, 2 GiB on a CPU.

    A CPU's share does not follow its free memory: there the results' last digits depend on how many images
    go through the networks at once, see `purify.images_per_call`.

    Raises:
        ValueError: if COUP_ACTIVATIONS is no number from 0 to `MOST`.
    """
    if given := os.environ.get(BUDGET_VARIABLE):
        room = 2**30 * number(f"{BUDGET_VARIABLE} (GiB)", given, 0, MOST, closed=True)
    elif device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + held_back)
    else:
        room = 2**30 * CPU_BUDGET
    return int(room / _graphs.get())


def steps_kept(
    gradient: str, score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor, budget: int | None = None
) -> int:
    """Of how many steps from x (B, ...) the activations fit into the budget, see `solve_with_gradient`."""
    budget = free_for_activations(x.device) if budget is None else budget
    steps = len(times) - 1
    return min(budget // max(_bytes_of_a_step(gradient, score, sde, x, times), 1), steps)


def images_kept(
    gradient: str, score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor, budget: int | None = None
) -> int:
    """How many images like x fit with all activations of their paths, so that none needs to be replayed."""
    budget = free_for_activations(x.device) if budget is None else budget
    return budget // max(_bytes_of_a_step(gradient, score, sde, x[:1], times) * (len(times) - 1), 1)


def _bytes_of_a_step(gradient: str, score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor) -> int:
    """From all of x: it need not grow with the images, as `hessian.FrozenLayers` are for larger batches."""
    measured = _step_bytes.setdefault(score, {})
    kind = gradient, x.shape, x.dtype, x.device, tuple(times.tolist())
    if kind not in measured:
        followed = _followed(score, gradient)
        with restored(sources(score, x.device)):
            if gradient == "first_order":  # at every time, as guidance may come later
                with torch.enable_grad(), NoSecondDerivative():
                    for t, dt in step_times(times, x.dtype, x.device):
                        euler_step(followed, sde, x[:1].detach().requires_grad_(), t, dt)
            measured[kind] = activation_bytes(followed, sde, x, times[:2])
    return measured[kind]


def _followed(score: nn.Module, gradient: str) -> nn.Module:
    """The score as the gradient sees it."""
    return FirstOrder(score) if gradient == "first_order" else score


def check_compiled(gradient: str, score: nn.Module) -> None:
    """ValueError where the gradient needs a second derivative of compiled code, which autograd leaves out."""
    for module in score.modules() if gradient in ("exact", "adjoint") else ():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None)
        if compiled and any(isinstance(part, Guided) for part in module.modules()):
            raise ValueError(
                f"score: expected torch.compile inside of guidance, not around it, for gradient={gradient!r}"
            )


class NoSecondDerivative(TorchFunctionMode):
    """In here a gradient that can itself be differentiated is a ValueError: `FirstOrder` is to take none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.autograd.grad, Tensor.backward) and kwargs.get("create_graph"):
            raise ValueError(
                "gradient: first_order cannot tell guidance from score where something that is no "
                "coup_lib.guidance.Guided takes a gradient; make it a subclass, or take exact"
            )
        return func(*args, **kwargs)


def activation_bytes(score: nn.Module, sde: VPSDE, x: Tensor, times: Tensor) -> int:
    """What plain autograd would keep of all steps from x (B, ...): measured on one step, and multiplied."""
    sizes: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*score.parameters(), *score.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    t, dt = step_times(times, x.dtype, x.device)[0]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        euler_step(score, sde, x.detach().requires_grad_(), t, dt)
    return sum(sizes.values()) * (len(times) - 1)


def replayed(x: Tensor, run: Callable[..., Tensor], step: Step, network: nn.Module) -> Tensor:
    """run(x, callback) by `step`, with a gradient that keeps the states only.

    Every step is run again, last one first, for one vector-Jacobian product; so what `step` leaves out must
    have no part in the derivative. Random numbers are those that the network drew the first time.

    Args:
        run: walks from x, and calls back as callback(index, t, state) before every step and at the end.
        step: (index, state) → next state.
        network: what `run` and `step` ask.
    """
    drawn_from = sources(network, x.device)

    def pull_back(states: tuple[Tensor, ...], randomness: Randomness, v: Tensor) -> Tensor:
        with restored(drawn_from), torch.enable_grad(), deterministic():
            for index in reversed(range(len(states))):
                set_states(drawn_from, randomness[index])
                state = states[index].detach().requires_grad_()
                (v,) = torch.autograd.grad(step(index, state), state, v)
        return v

    return _Path.apply(x, run, pull_back, drawn_from)


@contextmanager
def deterministic() -> Iterator[None]:
    """In here a GPU convolves in one way only, so that a replayed step meets the step that was walked."""
    before, cudnn.deterministic = cudnn.deterministic, True
    try:
        yield
    finally:
        cudnn.deterministic = before


class _Path(torch.autograd.Function):
    """A path that keeps its states but the last, and pulls a gradient back along them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        run: Callable[..., Tensor],
        pull_back: PullBack,
        drawn_from: Sequence[Source],
    ) -> Tensor:
        states: list[Tensor] = []
        randomness: list[States] = []

        def keep(index: int, t: float, state: Tensor) -> None:
            states.append(state)
            randomness.append(states_of(drawn_from))

        with deterministic():
            result = run(x, keep)
        ctx.pull_back, ctx.randomness = pull_back, randomness
        ctx.save_for_backward(*states[:-1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.pull_back(ctx.saved_tensors, ctx.randomness, v), None, None, None
