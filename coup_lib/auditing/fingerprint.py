"""What a defence is, for the names of its records: all that it holds, the code of it, and its answers."""

import hashlib
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib.auditing.defence import logits_of
from coup_lib.auditing.probe import seeded
from coup_lib.evaluation.identity import of_tensors

DIGITS = 3  # of a logit, that count
FAR = 0.1  # images are asked about so far from the clean ones, too
LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "builtins", "math", "typing", "collections")
PLAIN = str | bytes | int | float | complex | bool | None | torch.dtype | torch.device


def fingerprint(model: nn.Module, x: Tensor) -> str:
    """A hash of a defence, of all that it refers to, and of its answers to x (n, ...) and near them.

    So a defence of other weights, constants or code has other records. What cannot be seen is the inside of
    libraries and of generators of noise.
    """
    found = hashlib.sha256(_content(model, {}).encode())
    answers = []
    for _ in range(2):
        with torch.no_grad(), seeded(0):
            near = (x + FAR * torch.randn_like(x)).clamp(0, 1)
            answers.append(torch.cat([logits_of(model, x), logits_of(model, near)]))
    if torch.allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5):
        found.update(repr([[f"{value:.{DIGITS}g}" for value in row] for row in answers[0].tolist()]).encode())
    return found.hexdigest()[:16]


def _content(value: Any, seen: dict[int, Any]) -> str:
    """What a value is, in a short text without any address; what was seen before is not looked at again."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.atleast_1d(np.asarray(value)).copy())
    if isinstance(value, Tensor):
        return of_tensors([("", value)])
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if id(value) in seen:
        return name
    seen[id(value)] = value  # held, so that its address stays its own
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
    if (kind.__module__ or "").split(".")[0] in LIBRARIES and not isinstance(value, nn.Module):
        return []
    if isinstance(value, FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [_code(value.__code__), value.__defaults__, value.__kwdefaults__, *closure, *_globals(value)]
    if isinstance(value, type):
        return [part for part in vars(value).values() if isinstance(part, FunctionType | PLAIN)]
    own = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.endswith("hooks")}
    return [type(value), own]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


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
