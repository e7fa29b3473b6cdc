"""What identifies what is behind a record: the content of networks, defences and images, however called."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib.data import Images, load_split
from coup_lib.randomness import held_by

DIGITS = 16  # of a hash, hexadecimal
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "math", "typing", "collections")
PLAIN = str | bytes | int | float | complex | bool | None | torch.dtype | torch.device

# Of a network the hash, and which values of which tensors it is of: weights may be changed in place.
_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def of_network(network: nn.Module) -> str:
    """A hash of a network's weights and buffers with their names, on any device and in any precision."""
    state = network.state_dict()
    values = [(tensor.data_ptr(), tensor._version) for tensor in state.values()]
    if network not in _known or _known[network][0] != values:
        _known[network] = values, of_tensors(sorted(state.items()))
    return _known[network][1]


def of_images(images: Images) -> str:
    """A hash of pixels and labels, in order."""
    return of_tensors([("x", images.x), ("y", images.y)])


@cache
def of_split(dataset: str, split: str, subset: str, n: int) -> str:
    """`of_images` of the first n images of a split."""
    return of_images(load_split(dataset, split, subset).first(n))


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors with their names, on any device and in any precision."""
    found = hashlib.sha256()
    for name, tensor in named:
        values = tensor.detach().cpu()
        values = values.double() if values.is_floating_point() else values
        found.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()[:DIGITS]


def of_content(value: Any, *others: Any) -> list[str]:
    """A hash of a value and of all that it refers to: weights, constants, and the code of its functions.

    What cannot be seen is the inside of libraries and of generators of noise.

    others: have a hash each, after the first one. What they share with the value is not looked at again:
    their hashes say where in it that stands, and mean nothing without the value's.
    """
    seen: dict[int, tuple[int, Any]] = {}
    found = [_content([value], seen), *(_content([other], dict(seen)) for other in others)]
    return [text[:DIGITS] for text in found]


def _content(value: Any, seen: dict[int, tuple[int, Any]]) -> str:
    """What a value is, in a short text without any address; of what was seen before, as which it was."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        return _content(torch.from_numpy(np.atleast_1d(np.asarray(value)).copy()), seen)
    if id(value) in seen:
        return f"number {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value  # held, so that its address stays its own
    if isinstance(value, Tensor):
        return of_tensors([("", value)])
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    content = "\n".join([name, *(_content(part, seen) for part in _parts(value))])
    return hashlib.sha256(content.encode()).hexdigest()


def _parts(value: Any) -> list[Any]:
    """What a value is made of."""
    if isinstance(value, Mapping):
        return [part for item in sorted(value.items(), key=lambda item: repr(item[0])) for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple):
        return [*value]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    kind = value if isinstance(value, type | FunctionType) else type(value)
    # The type of compiled functions names no module in every Python; the functions themselves do.
    module = kind.__module__ if isinstance(kind.__module__, str) else getattr(value, "__module__", "")
    if (module or "").split(".")[0] in LIBRARIES and not isinstance(value, nn.Module):
        return []
    if isinstance(value, FunctionType):
        given = value.__defaults__, value.__kwdefaults__
        return [_code(value.__code__), *given, *held_by(value), *_globals(value)]
    if isinstance(value, type):
        return [part for part in vars(value).values() if isinstance(part, FunctionType | PLAIN)]
    own = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.endswith("hooks")}
    return [type(value), own]


def _globals(function: FunctionType) -> list[Any]:
    """The functions, classes and plain values that a function names."""
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    kinds = FunctionType | PLAIN | type | Tensor | np.ndarray | list | tuple | dict
    return [value for value in named if isinstance(value, kinds)]


def _code(code: CodeType) -> str:
    """What a function does, whether or not its source is at hand."""
    constants = [_code(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    shown = [sorted(map(repr, one)) if isinstance(one, frozenset) else repr(one) for one in constants]
    return repr((code.co_code, code.co_names, shown))
