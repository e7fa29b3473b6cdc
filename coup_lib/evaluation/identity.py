"""What identifies the networks and images behind a record: their content, whatever they are called."""

import hashlib
from collections.abc import Iterable
from dataclasses import is_dataclass
from functools import cache
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from coup_lib.data import Images, load_split

DIGITS = 16  # of a hash, hexadecimal

# Of a network the hash, and which values of which tensors it is of: weights may be changed in place.
_known: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()


def of_network(network: nn.Module, *, constants: bool = False) -> str:
    """A hash of a network's weights and buffers with their names, on any device and in any precision.

    constants: also of what kind its modules are and of their plain attributes, which weights do not tell.
    """
    if constants:
        plain = [f"{name} {type(part).__qualname__} {_plain(part)}" for name, part in network.named_modules()]
        return hashlib.sha256("\n".join([of_network(network), *plain]).encode()).hexdigest()[:DIGITS]
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


def _plain(module: nn.Module) -> list[tuple[str, str]]:
    values = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    kinds = (bool, int, float, str, tuple, type(None))
    return sorted((name, repr(v)) for name, v in values.items() if isinstance(v, kinds) or is_dataclass(v))


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors with their names, on any device and in any precision."""
    found = hashlib.sha256()
    for name, tensor in named:
        values = tensor.detach().cpu()
        values = values.double() if values.is_floating_point() else values
        found.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()[:DIGITS]
