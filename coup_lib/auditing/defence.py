"""A defence of one's own: any module from images to logits, and what can be found out about it beforehand."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from coup_lib.ascent import margin
from coup_lib.checks import check_images, check_logits, check_module, described
from coup_lib.evaluation.identity import of_network
from coup_lib.evaluation.run import ran_out_of_memory
from coup_lib.gradients import generators, restored
from coup_lib.guidance import Guided
from coup_lib.purify import Purified

Model = nn.Module | tuple[nn.Module, nn.Module]
PROBED = 32  # images that a defence is asked about before it is attacked
DIGITS = 3  # of a logit, that tell whether a defence is the one whose records there are
TINY = 1e-30  # below float32's smallest probability


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
        noise: "none", "image" or "call", as in `Probe`.
        probabilities: whether the defence gives probabilities, whose logarithm are its logits.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self._held, self.shape = (model,), tuple(shape)
        self.noise, self.probabilities = "none", False
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
        return logits.clamp_min(TINY).log() if self.probabilities else logits


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
    (votes, temperatures, a softmax) is left out. Several classifiers are averaged.

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
            logits_of(model, x.detach())
        given = {id(part): images for part, images, _ in calls}  # the last call of each
        found = [part(_followed(given[id(part)], x)) for part in classifiers if id(part) in given]
        return torch.stack(found).mean(0)


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
    parts = list(dict.fromkeys(part for part in model.modules() if part is not model))
    with calls_of(parts) as calls:
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


class _Drawn(TorchDispatchMode):
    """Keeps how many numbers are drawn from torch's generators in here, and their sum, draw by draw."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []
        self.sums: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = result[0] if isinstance(result, tuple) else result
            self.counts.append(drawn.numel())
            self.sums.append(float(drawn.detach().double().sum()))
        return result


@dataclass(frozen=True)
class Probe:
    """What is found out about a defence before it is attacked.

    classes: how many. noise: "none"; "image": every image has noise of its own; "call": the images of a call
    share some of it, or nobody can tell. frozen: it draws random numbers, but in each call the same.
    probabilities: it gives those instead of logits. batch_statistics, dropping: the names of its parts in
    train mode that normalise by the batch (they have been put into eval mode), and of others (left so).
    error: why it has no gradient; "" if it has. zero, broken: the shares of images with a gradient of zero,
    and with NaN or infinity in it.
    """

    classes: int
    noise: str
    frozen: bool
    probabilities: bool
    batch_statistics: tuple[str, ...]
    dropping: tuple[str, ...]
    error: str
    zero: float
    broken: float

    @property
    def random(self) -> bool:
        """Whether each call is another draw."""
        return self.noise != "none"


def probe(model: nn.Module, x: Tensor, y: Tensor) -> Probe:
    """Ask a defence about a few images x, as it takes them, with labels y.

    Raises:
        ValueError: for a defence that fails on such images, or gives no logits.
        FloatingPointError: for NaN or infinity.
    """
    training = {name: part for name, part in model.named_modules() if part.training}
    normalising = {name: part for name, part in training.items() if hasattr(part, "running_mean")}
    for part in normalising.values():
        part.eval()
    dropping = [name for name, part in training.items() if name not in normalising and not [*part.children()]]
    answers, drawn = _answers(model, x)
    logits = answers[0]
    if not bool(logits.isfinite().all()):
        raise FloatingPointError("NaN or infinity from the model")
    changes = drawn[0].sums != drawn[1].sums or not all(_alike(logits, other) for other in answers[1:])
    slope, error = _slope(model, x, y)
    right = logits.argmax(1) == y
    slopes = slope.flatten(1)[right] if bool(right.any()) else slope.flatten(1)
    return Probe(
        classes=logits.shape[1],
        noise=_noise(model, x, drawn[0].counts) if changes else "none",
        frozen=bool(drawn[0].sums) and not changes,
        probabilities=bool((logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all()),
        batch_statistics=tuple(normalising),
        dropping=tuple(dropping),
        error=error,
        zero=float((slopes == 0).all(1).float().mean()) if not error else 0.0,
        broken=float((~slopes.isfinite()).any(1).float().mean()),
    )


@torch.no_grad()
def _answers(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[_Drawn]]:
    """(logits in three calls, what was drawn in each)."""
    answers, drawn = [], []
    with torch.random.fork_rng():
        for seed in range(3):
            torch.manual_seed(seed)
            try:
                with _Drawn() as noted:
                    answers.append(logits_of(model, x))
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                expected = f"defences: expected to take images of shape {tuple(x.shape[1:])}"
                raise ValueError(f"{expected}; it says: {_said(error)}") from error
            drawn.append(noted)
    return answers, drawn


def _alike(logits: Tensor, other: Tensor) -> bool:
    """Whether two answers are the same but for rounding."""
    return float((other - logits).abs().max()) <= 1e-4 * float(logits.abs().max())


@torch.no_grad()
def _noise(model: nn.Module, x: Tensor, counts: Sequence[int]) -> str:
    """Its noise: "image" where all of it is seen to come from torch and grows with the images.

    counts: of the numbers that were drawn for x.
    """
    known = generators(model, x.device)
    states, again = [generator.get_state() for generator in known], []
    for _ in range(2):
        with restored(known, states):
            again.append(logits_of(model, x))
    with restored(known), _Drawn() as half:
        logits_of(model, x[: len(x) // 2])
    grown = [count * len(x) // (len(x) // 2) for count in half.counts]
    return "image" if counts and grown == [*counts] and _alike(*again) else "call"


def _slope(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, str]:
    """(the gradient of the margin like x, why there is none)."""
    with torch.enable_grad(), torch.random.fork_rng():
        image = x.detach().clone().requires_grad_()
        try:
            loss = margin(logits_of(model, image), y)
            return torch.autograd.grad(loss.sum(), image)[0], ""
        except Exception as error:  # of whatever kind: it is somebody else's code
            if isinstance(error, RuntimeError) and ran_out_of_memory(error):
                raise
            return torch.zeros_like(x), _said(error)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def as_module(name: str, model: Any) -> nn.Module:
    """A model as one module: a pair (purifier, classifier) becomes one that calls both.

    ValueError for what is neither.
    """
    if isinstance(model, tuple | list) and len(model) == 2:
        for part in model:
            check_module(name, part)
        pair = nn.Sequential(*model)
        pair.training = False  # its parts stay as they are
        return pair
    check_module(name, model)
    return model


def own_gradients(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """Name → the same defence with another gradient, as far as they can be made without being told how.

    Args:
        x: a few images as the defence takes them.
    """
    if isinstance(model, Purified):
        guided = any(isinstance(part, Guided) for part in model.modules())
        names = ["first_order"] * guided + ["bpda"]
        return {name: _with_gradient(model, name) for name in names}
    inner = inner_classifiers(model, x)
    return {"bpda": StraightThrough(model, inner)} if inner else {}


def _with_gradient(model: Purified, gradient: str) -> Purified:
    changed = copy(model)
    changed._modules = {**model._modules, "purifier": copy(model.purifier)}
    changed.purifier.gradient = gradient
    changed.purifier.reseed()
    return changed


def fingerprint(model: nn.Module, x: Tensor) -> str:
    """A hash of a defence: its weights and constants, the code of its parts, and its answer to x if fixed.

    So a defence whose code was changed gets records of its own, even where weights do not tell.
    """
    found = hashlib.sha256(of_network(model, constants=True).encode())
    for part in model.modules():
        foreign = {} if type(part).__module__.startswith("torch.") else vars(type(part))
        for value in (*foreign.values(), *vars(part).values()):
            if inspect.isfunction(value):
                found.update(_code(value.__code__).encode())
    with torch.no_grad(), torch.random.fork_rng():
        answers = []
        for _ in range(2):
            torch.manual_seed(0)
            answers.append(logits_of(model, x))
    if torch.allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5):
        found.update(repr([[f"{value:.{DIGITS}g}" for value in row] for row in answers[0].tolist()]).encode())
    return found.hexdigest()[:16]


def _code(code: CodeType) -> str:
    """What a function does, whether or not its source is at hand."""
    constants = [_code(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    shown = [sorted(map(repr, one)) if isinstance(one, frozenset) else repr(one) for one in constants]
    return repr((code.co_code, code.co_names, shown))


def check_data(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Images x (n, ...) as float32 and labels y (n,) as int64, from tensors or arrays.

    Raises:
        ValueError: for what is no images in [0, 1] with a label each, or fewer than two.
    """
    images, labels = torch.as_tensor(x), torch.as_tensor(y)
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


def as_planes(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) for an image of any shape: as it is, a plane of grey, or the squarest plane of a row."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    size = int(torch.Size(shape).numel())
    rows = max(rows for rows in range(1, int(size**0.5) + 1) if size % rows == 0)
    return (1, rows, size // rows)
