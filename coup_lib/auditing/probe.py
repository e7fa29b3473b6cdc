"""What can be found out about a defence before it is attacked, by asking it about a few images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from coup_lib.ascent import margin
from coup_lib.auditing.defence import CALLS, logits_of
from coup_lib.checks import are_probabilities
from coup_lib.evaluation.run import ran_out_of_memory
from coup_lib.randomness import begun, restored, sources

PROBED = 32  # images that a defence is asked about
NEAR = 1e-3  # a step after which a gradient should not have turned
TURNED = 0.2  # cosine of gradients so near to one another, below which they are noise


@dataclass(frozen=True)
class Probe:
    """What is found out about a defence.

    classes: how many. random: each call is another draw. alone: an image has to be asked by itself, as the
    images of a call share noise (or nobody can tell), or change each other's answers. frozen: it draws random
    numbers, but in each call the same. probabilities: it gives those instead of logits. batch_statistics,
    dropping: names of its parts in train mode that normalise by the batch (they have been put into eval
    mode), and that drop (left as they are). error: why it has no gradient; "" if it has. missing, zero,
    broken: the share of calls without a gradient, and of images with one of zero, and with NaN or infinity in
    it. turned: gradients a step of `NEAR` apart have nothing in common. unanswered: the share of images that
    it answers with NaN. answers: logits (n, K), before anything else was asked of it; None of a random
    defence. changed: after the audit it answers otherwise than before.
    """

    classes: int
    random: bool
    alone: bool
    frozen: bool
    probabilities: bool
    batch_statistics: tuple[str, ...]
    dropping: tuple[str, ...]
    error: str
    missing: float
    zero: float
    broken: float
    turned: bool
    unanswered: float
    answers: Tensor | None
    changed: bool = False


def probe(model: nn.Module, x: Tensor, y: Tensor) -> Probe:
    """Ask a defence about a few images x, as it takes them, with labels y.

    Raises:
        ValueError: for a defence that fails on such images, gives no logits, or NaN on all of them.
    """
    training = {name: part for name, part in model.named_modules() if part.training}
    normalising = {name: part for name, part in training.items() if hasattr(part, "running_mean")}
    for part in normalising.values():
        part.eval()
    answers, drawn = _answers(model, x)
    logits, sums = answers[0], [noted.sums for noted in drawn]
    answered = ~logits.isnan().any(1)
    if not bool(answered.any()):
        raise ValueError(f"defences: expected logits; got NaN on all of {len(x)} images")
    changes = any(one != sums[0] for one in sums) or not all(_alike(logits, other) for other in answers[1:])
    repeats = _repeats(model, x)
    shares = changes and not (repeats and _grows(model, x, drawn[0].counts))
    slopes, errors = _slopes(model, x, y, CALLS if changes else 1)
    slope = slopes[0].flatten(1)[logits.argmax(1) == y] if slopes else x.new_zeros(0, 1)
    return Probe(
        classes=logits.shape[1],
        random=changes,
        alone=shares or (not changes and not _alike(*_together_and_alone(model, x))),
        frozen=bool(sums[0]) and not changes,
        probabilities=are_probabilities(logits),
        batch_statistics=tuple(normalising),
        dropping=tuple(name for name, part in training.items() if isinstance(part, _DropoutNd)),
        error="" if slopes else errors[0],
        missing=len(errors) / (len(errors) + len(slopes)),
        zero=float((slope == 0).all(1).float().mean()) if len(slope) else 0.0,
        broken=float((~slope.isfinite()).any(1).float().mean()) if len(slope) else 0.0,
        turned=bool(slopes) and repeats and _turned(model, x, y),
        unanswered=1 - float(answered.float().mean()),
        answers=None if changes else logits,
    )


@torch.no_grad()
def asked_again(found: Probe, model: nn.Module, x: Tensor) -> Probe:
    """What was found out, and whether the defence has come to answer otherwise on the same images x."""
    if found.answers is None:
        return found
    with begun(model, x.device, 0):
        return replace(found, changed=not _alike(found.answers, logits_of(model, x[: len(found.answers)])))


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


@torch.no_grad()
def _answers(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[_Drawn]]:
    """(logits in several calls, what was drawn in each)."""
    answers, drawn = [], []
    for seed in range(2 * CALLS):
        try:
            with begun(model, x.device, seed), _Drawn() as noted:
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
    logits, other = logits.nan_to_num(), other.nan_to_num()
    return float((other - logits).abs().max()) <= 1e-4 * float(logits.abs().max())


@torch.no_grad()
def _together_and_alone(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a few images asked in one call, and one by one."""
    few = x[:8]
    return logits_of(model, few), torch.cat([logits_of(model, one) for one in few.split(1)])


@torch.no_grad()
def _repeats(model: nn.Module, x: Tensor) -> bool:
    """Whether a defence answers alike on the same noise, as far as its generators can be set back."""
    again = []
    for _ in range(2):
        with begun(model, x.device, 0):
            again.append(logits_of(model, x))
    return _alike(again[0], again[1])


@torch.no_grad()
def _grows(model: nn.Module, x: Tensor, counts: Sequence[int]) -> bool:
    """Whether all that is drawn grows with the images: each has noise of its own."""
    half = len(x) // 2
    with restored(sources(model, x.device)), _Drawn() as noted:
        logits_of(model, x[:half])
    return bool(counts) and [count * len(x) // half for count in noted.counts] == [*counts]


def _slopes(model: nn.Module, x: Tensor, y: Tensor, calls: int) -> tuple[list[Tensor], list[str]]:
    """(the gradients of the margin like x, why some calls gave none)."""
    slopes, errors = [], []
    for seed in range(calls):
        with torch.enable_grad(), begun(model, x.device, seed):
            image = x.detach().clone().requires_grad_()
            try:
                loss = margin(logits_of(model, image).nan_to_num(), y)
                slopes.append(torch.autograd.grad(loss.sum(), image)[0])
            except Exception as error:  # of whatever kind: it is somebody else's code
                if ran_out_of_memory(error):
                    raise
                errors.append(_said(error))
    return slopes, errors


def _turned(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether gradients on the same noise, a step of `NEAR` apart, have nothing in common."""
    shift = NEAR * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign().to(x)
    slopes = [_slopes(model, images, y, 1)[0] for images in (x, x + shift, x - shift)]
    if not all(slopes):
        return False
    here, *beside = (one[0].flatten(1).nan_to_num() for one in slopes)
    cosines = torch.stack([F.cosine_similarity(here, other) for other in beside])
    moved = here.abs().amax(1) > 0
    return bool(moved.any()) and float(cosines[:, moved].median()) < TURNED


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
