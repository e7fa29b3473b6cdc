"""The random numbers that a network draws: where they come from, set back and begun anew."""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

States: TypeAlias = Sequence[Tensor]  # of some sources


class Other:
    """A source that is not torch's, asked as a torch.Generator is.

    get, put: its state. begin: anew, from a seed.
    """

    def __init__(
        self, get: Callable[[], Any], put: Callable[[Any], Any], begin: Callable[[int], Any]
    ) -> None:
        self._get, self._put, self._begin = get, put, begin

    def get_state(self) -> Tensor:
        """Its state, in bytes."""
        return torch.frombuffer(bytearray(pickle.dumps(self._get())), dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        """Go on from what `get_state` gave."""
        self._put(pickle.loads(state.numpy().tobytes()))

    def manual_seed(self, seed: int) -> None:
        """Begin anew."""
        self._begin(seed % 2**32)  # NumPy's seeds have no more bits


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


@contextmanager
def restored(drawn_from: Sequence[Source], states: States | None = None) -> Iterator[None]:
    """In here sources are in these states (None: as they are), afterwards as they were before."""
    before = [source.get_state() for source in drawn_from]
    try:
        for source, state in zip(drawn_from, states or before, strict=True):
            source.set_state(state)
        yield
    finally:
        for source, state in zip(drawn_from, before, strict=True):
            source.set_state(state)


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
