"""A defence of one's own: any module from images to logits, and what can be found out about it beforehand."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_lib.checks import check_images, check_logits, check_module, described
from coup_lib.guidance import Guided
from coup_lib.purify import Purified, StochasticPurifier

Model = nn.Module | tuple[nn.Module, nn.Module]
TINY = 1e-30  # of probabilities, before their logarithm is taken
FAR = 1e4  # of logits, instead of infinity
CALLS = 5  # of a defence that may be random, until what it can do has been seen


@dataclass(frozen=True)
class Defence:
    """A defence to be audited.

    model: from images in [0, 1] to logits (n, K); or a pair of modules (purifier, classifier), the purifier
    from images to images. gradients: by name, other modules of the same defence to be differentiated in its
    place, as {"bpda": module}; what is found with them is tried on the model itself.
    """

    model: Model
    gradients: Mapping[str, Model] = field(default_factory=dict)


class Audited(nn.Module):
    """A defence as the engine attacks it: images (n, C, H, W) in, finite gradients and logits (n, K) out.

    The defence itself is no submodule of it, so that what it does in train mode on purpose is left alone.

    Args:
        shape: of one image, as the defence wants it.

    Attributes:
        random, alone, probabilities: as in `probe.Probe`.
        finite: answers and gradients are made finite, for attacks; a judge wants to see what is none.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], *, finite: bool = True) -> None:
        super().__init__()
        self._held, self.shape, self.finite = (model,), tuple(shape), finite
        self.random = self.alone = self.probabilities = False
        self.eval()

    @property
    def model(self) -> nn.Module:
        """The defence."""
        return self._held[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K), float32, of x (n, C, H, W)."""
        x = x.reshape(len(x), *self.shape)
        if x.requires_grad:
            x.register_hook(torch.nan_to_num)
        logits = logits_of(self.model, x)
        if self.probabilities:
            logits = logits.clamp_min(TINY).log()
        if self.finite:
            logits = logits.nan_to_num(0.0, FAR, -FAR)
        if x.requires_grad and torch.is_grad_enabled():
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)  # no gradient in this call: zero
        return logits


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (n, K), float32, of images x (n, ...) as a defence takes them, in the precision of its weights.

    It gets a copy: what it changes in place is not the caller's.
    """
    weights = next(filter(Tensor.is_floating_point, model.parameters()), x)
    return check_logits(model(x.to(weights.dtype, copy=True)), x).float()


class StraightThrough(nn.Module):
    """The logits of a defence's inner classifiers, by BPDA (Athalye et al., arXiv:1802.00420).

    The defence is run first. What its classifiers were given is then classified again, with a gradient as if
    they had been given the image: all that comes before them counts as the identity, what comes behind them
    (votes, temperatures, a softmax) is left out. Several classifiers are averaged. Where a call takes none of
    them, the logits are the defence's own.

    Args:
        classifiers: parts of the model, as `inner_classifiers` finds them.
    """

    def __init__(self, model: nn.Module, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._held, self.training = (model, tuple(classifiers)), False

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of images x as the defence takes them."""
        model, classifiers = self._held
        with torch.no_grad(), calls_of(classifiers) as calls:
            logits = logits_of(model, x.detach())
        given = {id(part): images for part, images, _ in calls}  # the last call of each
        found = [part(_followed(given[id(part)], x)) for part in classifiers if id(part) in given]
        return torch.stack(found).mean(0) if found else logits


class ByGradient(nn.Module):
    """A defence whose purifiers are differentiated by another gradient than their own.

    purifiers: parts of the model. gradient: one of `gradients.GRADIENTS`.
    """

    def __init__(self, model: nn.Module, purifiers: Sequence[StochasticPurifier], gradient: str) -> None:
        super().__init__()
        self._held, self.gradient, self.training = (model, tuple(purifiers)), gradient, False

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of images x as the defence takes them."""
        model, purifiers = self._held
        before = [purifier.gradient for purifier in purifiers]
        try:
            for purifier in purifiers:
                purifier.gradient = self.gradient
            return logits_of(model, x)
        finally:
            for purifier, gradient in zip(purifiers, before, strict=True):
                purifier.gradient = gradient


def _followed(images: Tensor, x: Tensor) -> Tensor:
    """The images that a classifier was given, with the gradient of x, whatever their size and colours."""
    if images.shape[2:] != x.shape[2:]:
        x = F.interpolate(x, images.shape[2:])
    return images + (x - x.detach()).expand_as(images)


@contextmanager
def calls_of(modules: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, Any, Any]]]:
    """In here the calls of these modules are noted: (module, its first argument, its answer)."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        calls.append((module, given[0].clone() if given and isinstance(given[0], Tensor) else None, answer))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def inner_classifiers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The outermost parts of a model that classify images into its classes, one for one of x (n, ...).

    They may be given images of another size, and three colours for grey.
    """
    parts = [part for part in model.modules() if part is not model]
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return []  # nothing can be seen of what is compiled
    with calls_of(parts) as calls:
        for _ in range(CALLS):  # a random defence may take another part each time
            classes = logits_of(model, x).shape[1]
    found = [
        part
        for part, images, logits in calls
        if all(isinstance(one, Tensor) and len(one) == len(x) for one in (images, logits))
        and (images.shape == x.shape or (images.ndim == x.ndim == 4 and images.shape[1] in (x.shape[1], 3)))
        and logits.shape[1:] == (classes,)
    ]
    inside = {part for outer in found for part in outer.modules() if part is not outer}
    return [part for part in dict.fromkeys(found) if part not in inside]


class Pair(nn.Sequential):
    """A purifier, from images to images, and the classifier behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of images x (n, ...). ValueError for a pair that is the wrong way round."""
        purifier, classifier = self
        images = purifier(x)
        if images.ndim == 2 < x.ndim and images[0].numel() != x[0].numel():
            got = described(images)
            raise ValueError(f"expected a pair (purifier, classifier); its first part gives {got}")
        return classifier(images)


def as_module(name: str, model: Any) -> nn.Module:
    """A model as one module: a pair (purifier, classifier) becomes one that calls both.

    ValueError for what is neither.
    """
    if isinstance(model, tuple | list) and len(model) == 2:
        for part in model:
            check_module(name, part)
        pair = Pair(*model)
        pair.training = False  # its parts stay as they are
        return pair
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module, or a pair of them (purifier, classifier)"
        raise ValueError(f"{name}: expected {expected}; got {type(model).__name__}")
    return model


def own_gradients(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Name → the same defence with another gradient, as far as they can be made without being told how.

    Args:
        x: a few images as the defence takes them.
    """
    if isinstance(model, Purified):
        names = ["first_order"] * _is_guided(model.purifier) + ["bpda"]
        return {name: _with_gradient(model, name) for name in names}
    found: dict[str, nn.Module] = {}
    purifiers = [part for part in model.modules() if isinstance(part, StochasticPurifier)]
    if any(map(_is_guided, purifiers)):
        found["first_order"] = ByGradient(model, purifiers, "first_order")
    inner = inner_classifiers(model, x)
    return found | ({"bpda": StraightThrough(model, inner)} if inner else {})


def _is_guided(purifier: nn.Module) -> bool:
    """Whether there is guidance, and with it a second-order term."""
    return any(isinstance(part, Guided) for part in purifier.modules()) or bool(
        getattr(purifier, "guide", None)
    )


def _with_gradient(model: Purified, gradient: str) -> Purified:
    changed = copy(model)
    changed._modules = {**model._modules, "purifier": copy(model.purifier)}
    changed.purifier.gradient = gradient
    changed.purifier.reseed()
    return changed


def check_data(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Images x (n, ...) as float32 and labels y (n,) as int64, from tensors or arrays.

    Raises:
        ValueError: for what is no images in [0, 1] with a label each, or fewer than two.
    """
    images, labels = _numbers("x", x), _numbers("y", y)
    if not images.is_floating_point():
        raise ValueError(f"x: expected floating point in [0, 1]; got {images.dtype} (divide bytes by 255)")
    if images.ndim < 2 or len(images) < 2:
        raise ValueError(f"x: expected two images or more, (n, ...); got {described(images)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"y: expected a whole number for each of {len(images)} images; got {described(labels)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"y: expected labels from 0 on; got {int(labels.min())}")
    check_images(images.reshape(len(images), *as_planes(images.shape[1:])))
    return images.float(), labels.long()


def _numbers(name: str, given: Any) -> Tensor:
    """A tensor or an array as a tensor; ValueError for what holds no numbers."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a tensor or an array of numbers; {error}") from None


def as_planes(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) for an image of any shape: as it is, a plane of grey, or the squarest plane of a row."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    size = int(torch.Size(shape).numel())
    rows = max(rows for rows in range(1, int(size**0.5) + 1) if size % rows == 0)
    return (1, rows, size // rows)
