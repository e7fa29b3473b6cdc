"""What inputs have to be: every error names what was expected and what came."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 1e-6  # how far beyond [0, 1] an image may lie


@contextmanager
def in_one_line() -> Iterator[None]:
    """A ValueError from inside ends a notebook in its message alone, without the code that refused."""
    try:
        yield
    except ValueError as error:
        line = f"{type(error).__name__}: {error}"
        vars(error)["_render_traceback_"] = lambda: [line]  # what IPython asks an exception for
        raise


def choice(name: str, value: Any, known: Any) -> Any:
    """`value` if it is one of `known`, else a ValueError that names what was expected and what came."""
    if value not in tuple(known):  # a mapping would ask for its hash, which a list has not
        listed = [str(one) for one in known]
        raise ValueError(f"{name}: expected one of {', '.join(listed)}; got {value!r}{meant(value, listed)}")
    return value


def meant(value: Any, known: Sequence[str]) -> str:
    """A question that names what of `known` a text may stand for; "" if nothing is near, or it is no text."""
    if not isinstance(value, str):
        return ""
    same = [one for one in known if one.split("/")[-1].lower() == value.lower()]  # but for case or folder
    near = same or get_close_matches(value, known, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def number(name: str, value: Any, low: float, high: float = float("inf"), *, closed: bool = False) -> float:
    """A float in (low, high], or [low, high] if closed, from a number or a string as "0.1" or "8/255"."""
    try:
        result = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (TypeError, ValueError, ArithmeticError):  # also 8/0 and 1e999
        raise ValueError(f'{name}: expected a number or a fraction such as "8/255"; got {value!r}') from None
    above = result >= low if closed else result > low
    if not above or result > high or result == float("inf"):
        lower = f"of at least {low:g}" if closed else f"greater than {low:g}"
        upper = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"{name}: expected a number {lower}{upper}; got {value!r}")
    return result


def count(name: str, value: Any, high: float = float("inf"), low: int = 1) -> int:
    """A whole number in [low, high]; papermill hands over 1e3 as a float and that is fine."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = float("nan")
    if isinstance(value, bool) or not low <= result <= high or result % 1:  # of inf that is NaN
        upper = "" if high == float("inf") else f" and at most {high}"
        raise ValueError(f"{name}: expected a whole number of at least {low}{upper}; got {value!r}")
    return int(result)


def described(value: Any) -> str:
    """What an error says of a value: a tensor's shape, type and device, or the name of another type."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return type(value).__name__


def yes_or_no(name: str, value: Any) -> bool:
    """True or False, also by these words in any case, as papermill hands them over; else a ValueError."""
    words = {"true": True, "false": False}
    word = str(value).lower()
    return words[word if word in words else choice(name, value, words)]


def check_images(x: Any, margin: float = ROUNDING) -> None:
    """ValueError for what is no batch of images (B, C, H, W) in [0, 1], give or take the margin."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not len(x) or not x.is_floating_point():
        expected = "at least one image, (B, C, H, W), in floating point"
        raise ValueError(f"x: expected {expected}; got {described(x)}")
    low, high = torch.stack(x.detach().aminmax()).tolist()
    if not (low >= -margin and high <= 1 + margin):  # NaN is neither
        got = f"{low:.4g} to {high:.4g}" if low == low else "NaN"
        raise ValueError(f"x: expected values in [0, 1]; got {got}")


def check_module(name: str, network: Any) -> None:
    """ValueError for what is no network."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name}: expected a torch.nn.Module; got {type(network).__name__}")


def check_network(name: str, network: nn.Module, x: Tensor) -> None:
    """ValueError for a network with a part in train mode, or one that does not lie where the images x do."""
    for place, module in network.named_modules():
        if module.training:
            part = f"{name}.{place}".rstrip(".")
            raise ValueError(f"{part}: is in train mode, which its random layers are for; call eval()")
    for weights in (*network.parameters(), *network.buffers()):
        if weights.device != x.device:
            raise ValueError(
                f"{name}: expected on {x.device}, where the images are; it is on {weights.device}"
            )


def check_seeds(seeds: Any, x: Tensor) -> None:
    """ValueError unless seeds are whole numbers (B,), one per image of x (B, ...)."""
    if not isinstance(seeds, Tensor) or seeds.shape != x.shape[:1] or seeds.dtype != torch.int64:
        expected = f"one per image, shape ({len(x)},), torch.int64"
        raise ValueError(f"seeds: expected {expected}; got {described(seeds)}")


def check_alike(name: str, value: Any, like: Tensor, what: str) -> None:
    """ValueError for what is no tensor of the shape, type and device of `like`; `what` names it."""
    if described(value) != described(like):
        raise ValueError(f"{name}: expected {what}, {described(like)}; got {described(value)}")


def check_labels(y: Tensor, classes: int) -> None:
    """ValueError for labels y (B,) that are not among the classes."""
    low, high = y.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(
            f"y: expected labels among the model's classes, 0 to {classes - 1}; got {low} to {high}"
        )


def check_logits(logits: Any, x: Tensor) -> Tensor:
    """What a classifier answered to images x (B, ...), if it is logits (B, K), K ≥ 2; else a ValueError."""
    if not isinstance(logits, Tensor) or logits.shape[:-1] != x.shape[:1] or logits.shape[-1] < 2:
        expected = f"logits ({len(x)}, K) of two classes or more"
        raise ValueError(f"classifier: expected {expected}; got {described(logits)}")
    return logits


def are_probabilities(logits: Tensor) -> bool:
    """Whether what is to be logits (B, K) are probabilities."""
    return bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all())


def warn_of_probabilities(name: str, logits: Tensor, what: str) -> None:
    """Warn of a classifier that gives probabilities; `what` says what comes of it."""
    if are_probabilities(logits):
        warnings.warn(f"the {name} returns probabilities, not logits: {what}", stacklevel=3)


def check_like(name: str, answer: Any, x: Tensor) -> Tensor:
    """What a network answered to x, if it has the shape of x; else a ValueError: it would be broadcast."""
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        expected = f"an answer of its input's shape, {tuple(x.shape)}"
        raise ValueError(f"{name}: expected {expected}; got {described(answer)}")
    return answer
