"""What attacks climb by: losses, the ball around an image, and gradients over a model's noise draws."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.checks import check_logits, choice, count
from coup_lib.contexts import assigned
from coup_lib.gradients import THROUGH_STEPS, replayed
from coup_lib.guidance import FirstOrder, to_state
from coup_lib.purify import Purified, Purifier
from coup_lib.sde import per_image
from coup_lib.solver import Callback, euler_step, step_times

NORM_LABELS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack spells them
NORMS = tuple(NORM_LABELS)
ROUNDS = 3  # of expectation and maximisation in `selected`
LOW = 0.5  # share of each axis' cosine frequencies that `low_frequencies` leaves, the lowest

Loss = Callable[..., Tensor]  # logits (n, K), labels (n,), targets (n,) if there are any → (n,), to be raised


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) from logits (n, K) and labels (n,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The highest other logit minus the true one, (n,): Carlini and Wagner's difference of logits."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits[true]


def norm_label(norm: str) -> str:
    """The norm as AutoAttack spells it, from a name in any case; ValueError for an unknown one."""
    return NORM_LABELS[choice("norm", str(norm).lower(), NORMS)]


def largest_radius(norm: str, shape: Sequence[int]) -> float:
    """The distance between the two images of this shape in [0, 1] that lie farthest apart."""
    return 1.0 if norm_label(norm) == "Linf" else float(torch.Size(shape).numel()) ** 0.5


def project(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """x_adv (n, C, H, W) moved into the eps-ball around x, and into [0, 1]."""
    shift = x_adv - x
    if norm_label(norm) == "Linf":
        return (x + shift.clamp(-eps, eps)).clamp(0, 1)
    length = per_image(shift.flatten(1).norm(dim=1), x)
    return (x + shift * (eps / length.clamp_min(eps))).clamp(0, 1)


def steepest(slope: Tensor, norm: str) -> Tensor:
    """The direction in which a step of length 1 climbs most along the slope (n, C, H, W), like it."""
    return slope.sign() if norm_label(norm) == "Linf" else unit(slope)


def unit(x: Tensor) -> Tensor:
    """Each image of x (n, C, H, W) divided by its L2 norm; a zero image stays zero."""
    return x / per_image(x.flatten(1).norm(dim=1).clamp_min(1e-30), x)


def in_parts(function: Callable[..., Sequence[Tensor]], size: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """function(*rows), rows of n images each, called on `size` at most; its results put together."""
    parts = zip(*(values.split(size) for values in rows), strict=True)
    return tuple(map(torch.cat, zip(*(function(*part) for part in parts), strict=True)))


_told: ContextVar[Callable[[int], None]] = ContextVar("of images in attacks", default=lambda images: None)


def told(tell: Callable[[int], None]) -> AbstractContextManager[None]:
    """In here `tell` is called with the number of images whenever an attack asks its model."""
    return assigned(_told, tell)


class InParts(nn.Module):
    """A model that is called with max_batch images at most, whatever it is asked."""

    def __init__(self, model: nn.Module, max_batch: int) -> None:
        super().__init__()
        self.model, self.max_batch, self.classes = model, max_batch, 2

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of x (n, C, H, W); of no images too, which Square asks for where logits are tied."""
        _told.get()(len(x))
        if not len(x):
            return x.new_zeros(0, self.classes)
        logits = torch.cat([check_logits(self.model(part), part) for part in x.split(self.max_batch)])
        self.classes = logits.shape[1]
        return logits


class BatchedEOT:
    """A model's loss and gradient averaged over noise draws, all draws in one call.

    AutoAttack's APGD asks the model for one draw after the other. Its interface for models that bring their
    own gradients (made for TensorFlow) lets us answer at once: same average, one batch. As in AutoAttack,
    the logits and the loss that APGD sees are those of the last draw.

    At most max_batch images are differentiated at once. The noise is drawn in the same order whatever that
    is: draw after draw of all images.
    """

    def __init__(self, model: nn.Module, eot: int, max_batch: int, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.eot, self.max_batch = count("eot", eot), count("max_batch", max_batch)

    def predict(self, x: Tensor) -> Tensor:
        """Logits (n, K) of one draw."""
        with torch.no_grad():
            return InParts(self.model, self.max_batch)(x)

    def get_logits_loss_grad_xent(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, K), loss (n,) and its mean gradient, like x, under the name that APGD calls for "ce".

        labels: (n,) each, what the loss takes beside the logits.
        """
        logits, losses, gradient = self._draws(x, *labels)
        return logits, losses[-1], gradient

    get_logits_loss_grad_dlr = get_logits_loss_grad_target = get_logits_loss_grad_xent

    def mean_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, like x, and the loss (n,), both averaged over the draws."""
        _, losses, gradient = self._draws(x, y)
        return gradient, losses.mean(0)

    def _draws(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (n, K) of the last draw, losses (eot, n), the mean gradient)."""
        total, seen = torch.zeros_like(x), []
        for logits, losses, gradients in self._parts(x, *labels):
            total += gradients.sum(0)
            seen.append((logits, losses))
        logits, losses = map(torch.cat, zip(*seen, strict=True))
        return logits[-1], losses, total / self.eot

    def _parts(self, x: Tensor, *labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All draws, as many at once as fit: (logits (d, n, K), losses (d, n), gradients (d, n, C, H, W))."""
        draws_at_once = max(1, self.max_batch // len(x))
        for first in range(0, self.eot, draws_at_once):
            draws = min(draws_at_once, self.eot - first)
            rows = x.detach().repeat(draws, 1, 1, 1), *(values.repeat(draws) for values in labels)
            logits, loss, gradient = in_parts(self._one, self.max_batch, *rows)
            yield (
                logits.reshape(draws, len(x), -1),
                loss.reshape(draws, -1),
                gradient.reshape(draws, *x.shape),
            )

    def _one(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, losses, gradient) of one draw for each x, in one call."""
        with torch.enable_grad():
            x = x.requires_grad_()
            logits, loss = self._asked(x, *labels)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return logits.detach(), loss.detach(), gradient

    def _asked(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (n, K), what is to be raised (n,)) of one draw for each x, differentiable."""
        logits = self.model(x)
        return logits, self.loss(logits, *labels)


class Kept:
    """Of each image the point that the fewest draws got right; of equal ones that of the highest margin.

    APGD keeps the point of highest loss in a single draw, which on a random model is one of good luck
    (auto-attack's pull request 105; Liu et al., Towards understanding the robustness of diffusion-based
    purification, 2024).

    Attributes:
        x: like the images. right: the share of right draws there, (n,). margin: their mean `margin`, (n,).
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.right = x.clone(), x.new_full((len(x),), torch.inf)
        self.margin = -self.right

    def offer(self, places: Tensor, x: Tensor, right: Tensor, margin: Tensor) -> None:
        """Take points x of the images at these places (m,), where they are better than what is kept."""
        there, equal = self.right[places], right == self.right[places]
        better = (right < there) | (equal & (margin > self.margin[places]))
        chosen = places[better]
        self.x[chosen], self.right[chosen], self.margin[chosen] = x[better], right[better], margin[better]


class Keeping(BatchedEOT):
    """Offers every point to `kept`, judged by the draws of its gradient, which it was chosen before.

    places: (n,) int64, of the images that it will be asked about among those of `kept`; None: all.

    Attributes:
        alike: whether all draws at all points were the same so far: the model has no noise.
    """

    def __init__(
        self, model: nn.Module, eot: int, max_batch: int, loss: Loss, kept: Kept, places: Tensor | None = None
    ) -> None:
        super().__init__(model, eot, max_batch, loss)
        self.kept, self.alike = kept, True
        self.places = torch.arange(len(kept.x), device=kept.x.device) if places is None else places

    def _parts(self, x: Tensor, *labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for part in super()._parts(x, *labels):
            found.append(part[0])
            yield part
        logits, y = torch.cat(found), labels[0].repeat(self.eot)
        self.alike &= bool((logits == logits[0]).all())
        right = (logits.argmax(2) == labels[0]).to(x).mean(0)
        margins = margin(logits.flatten(0, 1), y).reshape(self.eot, -1).mean(0)
        self.kept.offer(self.places, x.detach(), right, margins)


class Selective(Keeping):
    """The gradient of those draws that a common direction can break, see `selected`.

    undecided: the loss at the edge of a wrong decision. norm, eps: of the ball.
    """

    def __init__(self, *given: Any, undecided: float, norm: str, eps: float) -> None:
        super().__init__(*given)
        self.undecided, self.norm, self.eps = undecided, norm, eps

    def _draws(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, the mean loss (1, n), which steers APGD's step size, the gradient of selected draws)."""
        logits, losses, gradients = map(torch.cat, zip(*self._parts(x, *labels), strict=True))
        weights = selected(losses - self.undecided, gradients, self.norm, self.eps)
        return logits[-1], losses.mean(0, keepdim=True), _weighted(weights, gradients)


def selected(losses: Tensor, gradients: Tensor, norm: str, eps: float) -> Tensor:
    """Weights (d, n) of draws, adding up to 1 for each image: how vulnerable each is to a common direction.

    Some draws cannot be broken together with the others, and their gradients spoil the mean. As in
    DiffHammer (Wang et al., NeurIPS 2024) expectation and maximisation take turns, from equal weights on: a
    draw's vulnerability is the sigmoid of its loss, to first order, a step of eps along the common direction
    away; the common direction is the `steepest` along the weighted gradient.

    Args:
        losses: (d, n), above 0 where a draw is wrong.
        gradients: theirs, (d, n, C, H, W).
    """
    weights = torch.full_like(losses, 1 / len(losses))
    for _ in range(ROUNDS):
        direction = steepest(_weighted(weights, gradients), norm)
        gains = eps * (gradients * direction).flatten(2).sum(2)
        weights = F.logsigmoid(losses + gains).softmax(0)
    return weights


def _weighted(weights: Tensor, gradients: Tensor) -> Tensor:
    """(n, C, H, W), the sum over draws of gradients (d, n, C, H, W) with weights (d, n)."""
    return (weights[:, :, None, None, None] * gradients).sum(0)


class LowFrequency(BatchedEOT):
    """The mean gradient without its high frequencies, see `low_frequencies`."""

    def _draws(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, losses, gradient = super()._draws(x, *labels)
        return logits, losses, low_frequencies(gradient)


def low_frequencies(x: Tensor) -> Tensor:
    """x (n, C, H, W) with the lowest share `LOW` of each axis' cosine coefficients (DCT-II) alone, like x.

    Purifiers remove high frequencies first (Guo et al., Low frequency adversarial perturbation, UAI 2019).
    """
    lowest = (cosines(size)[: max(1, round(LOW * size))] for size in x.shape[2:])
    rows, columns = ((waves.T @ waves).to(x) for waves in lowest)
    return rows @ x @ columns


def cosines(size: int) -> Tensor:
    """The orthonormal cosines of DCT-II, (frequency, place), each of this size, in float64."""
    places = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi * places[:, None] * (places + 0.5) / size)
    return waves / waves.norm(dim=1, keepdim=True)


class PerStep(Keeping):
    """Raises the loss plus the `deviation` of a purifier's path; model: in parts, see `hidden_states`."""

    def _asked(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        defence: Any = self.model.model
        _told.get()(len(x))
        purified, away = deviation(defence.purifier, x)
        logits = defence.classifier(purified)
        return logits, self.loss(logits, *labels) + away


def hidden_states(model: nn.Module) -> str:
    """Why a model's states cannot be attacked step by step; "" if they can."""
    if type(model) is not Purified or not isinstance(model.purifier, Purifier):
        expected = "a purify.Purified around one purify.Purifier, which shows its states"
        return f"per-step: expected {expected}; got {type(model).__name__}"
    gradient = model.purifier.gradient
    known = f"per-step: expected a gradient through the steps, {' or '.join(THROUGH_STEPS)}; got {gradient}"
    return "" if gradient in THROUGH_STEPS else known


def deviation(purifier: Purifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """(purified images like x, how far their path has led away from x (n,)), differentiable.

    DiffAttack (Kang et al., NeurIPS 2023) raises the distance between the reverse states x_t' and the forward
    states m(t) x + std(t) ε of the input. Averaged over ε, the squared one is |x_t' - m(t) x|² and a constant
    that no attack can change. So it is defined without forward noise, too: it is the mean over pixels and
    over the times after every step of (x_t' - m(t) x)², with x in [-1, 1]. It is added to the
    cross-entropy with weight 1. Memory holds the states and one step.

    Args:
        x: (n, C, H, W) in [0, 1]; the noise is fresh, from the purifier's own generator.
    """
    noise, steps = [*purifier._noise(x, None)], step_times(purifier.times, x.dtype, x.device)
    score = FirstOrder(purifier.score) if purifier.gradient == "first_order" else purifier.score
    means = purifier.sde.mean_coeff(purifier.times).tolist()

    def step(index: int, state: Tensor) -> Tensor:
        reverse, given, away = state
        reverse = euler_step(score, purifier.sde, reverse, *steps[index], noise[index + 1])
        return torch.stack([reverse, given, away + (reverse - means[index + 1] * given).square()])

    def run(state: Tensor, keep: Callback) -> Tensor:
        for index in range(len(steps)):
            keep(index, 0.0, state)
            state = step(index, state)
        keep(len(steps), 0.0, state)
        return state

    given = to_state(x)
    start = torch.stack([purifier.start(given, noise), given, torch.zeros_like(given)])
    reverse, _, away = replayed(start, run, step, score)
    return purifier.finish(reverse), away.flatten(1).mean(1) / len(steps)
