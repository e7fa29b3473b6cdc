"""The random numbers that a network draws: where they come from, set back and begun anew."""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

States: TypeAlias = Sequence[Any]  # of some sources, each as it gives its own


@dataclass(frozen=True)
class Other:
    """A source that is not torch's, asked as a torch.Generator is.

    begin: anew, from a seed.
    """

    get_state: Callable[[], Any]
    set_state: Callable[[Any], Any]
    begin: Callable[[int], Any]

    def manual_seed(self, seed: int) -> None:
        """Begin anew."""
        self.begin(seed % 2**32)  # NumPy's seeds have no more bits


Source: TypeAlias = torch.Generator | Other
STRIDE = 0x9E3779B1  # between the seeds of sources
SHARED = (
    Other(np.random.get_state, np.random.set_state, np.random.seed),
    Other(random.getstate, random.setstate, random.seed),
)


def sources(network: nn.Module, device: torch.device) -> list[Source]:
    """What a network on the device may draw from, torch's own generator first.

    The generators of torch, of NumPy and of Python that all share, and those that its modules hold: as
    attributes, in containers and functions, or in modules that are hidden there.
    """
    return [*_torchs(device), *SHARED, *_held(network, {})]


def _torchs(device: torch.device) -> list[torch.Generator]:
    gpu = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *gpu]


def _held(value: Any, seen: dict[int, Any]) -> Iterator[Source]:
    if isinstance(value, Tensor | str | int | float | type(None)) or id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, torch.Generator):
        yield value
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator

        def begin(seed: int) -> None:
            bits.state = type(bits)(seed).state

        yield Other(lambda: bits.state, partial(setattr, bits, "state"), begin)
    elif isinstance(value, np.random.RandomState):
        yield Other(value.get_state, value.set_state, value.seed)
    elif isinstance(value, random.Random):
        yield Other(value.getstate, value.setstate, value.seed)
    else:
        for part in _parts(value):
            yield from _held(part, seen)


def _parts(value: Any) -> list[Any]:
    """What may hold a source inside of a value."""
    if isinstance(value, nn.Module):
        return [part for name, part in vars(value).items() if name not in ("_parameters", "_buffers")]
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, list | tuple | set):
        return [*value]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        return held_by(value)
    return [value.__self__] if isinstance(value, MethodType | BuiltinMethodType) else []


def held_by(function: FunctionType) -> list[Any]:
    """The values that a function has from where it was made."""
    return [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def states_of(drawn_from: Sequence[Source]) -> States:
    """The states that sources are in."""
    return [source.get_state() for source in drawn_from]


def set_states(drawn_from: Sequence[Source], states: States) -> None:
    """Let sources go on from these states."""
    for source, state in zip(drawn_from, states, strict=True):
        source.set_state(state)


def alike(first: States, second: States) -> bool:
    """Whether these are the same states of the same sources."""
    return pickle.dumps([*map(_plain, first)]) == pickle.dumps([*map(_plain, second)])


def _plain(state: Any) -> Any:
    return state.tolist() if isinstance(state, Tensor) else state


@contextmanager
def restored(drawn_from: Sequence[Source]) -> Iterator[None]:
    """After this sources are as they were before."""
    before = states_of(drawn_from)
    try:
        yield
    finally:
        set_states(drawn_from, before)


@contextmanager
def begun(network: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """In here all that a network draws begins at the seed; afterwards its sources are as they were before.

    torch's own generators begin at the seed itself, every other source at one of its own.
    """
    drawn_from, own = sources(network, device), len(_torchs(device))
    with restored(drawn_from):
        for place, source in enumerate(drawn_from):
            source.manual_seed(seed + STRIDE * max(0, place - own + 1))
        yield
