"""Attacks by name: AutoAttack's through one adapter, with EOT's noise draws batched, and plain PGD."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.config import choice

APGD_LOSSES = ("ce", "dlr", "margin")
ATTACKS = ("clean", "noise", "fgsm", "pgd", *(f"apgd-{loss}" for loss in APGD_LOSSES), "square", "standard")
PGD_STEP = 0.007 / (8 / 255)  # step over eps: of Table 3 (BPDA), and of Lee & Kim's PGD-200

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (n, K), labels (n,) → (n,), to be raised


@dataclass(frozen=True)
class AttackResult:
    """What an attack left behind.

    x_adv: (n, C, H, W) in [0, 1], within eps of the images.
    robust: (n,) bool, AutoAttack's own verdict: the image was right at first and in the one forward pass
        that followed the attack.
    warnings: what AutoAttack said about the defence, in order, each once.
    """

    x_adv: Tensor
    robust: Tensor
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attack:
    """An attack with its budget; call it on a model with the contract of `purify.Purified`.

    name: "clean" (no perturbation), "noise" (random, on the surface of the ball), "fgsm" (one step),
        "pgd" (fixed steps of `PGD_STEP`·eps), "apgd-ce", "apgd-dlr", "apgd-margin" (APGD on three losses),
        all with `eot` draws per gradient; "square" (black box) and "standard" (AutoAttack: APGD-ce, APGD-t,
        FAB-t, Square), one draw each. AutoAttack's "rand" is apgd-ce and then apgd-dlr.
    norm, eps: "Linf" or "L2" and the radius in the units of x.
    seed: of the attack; torch's global generator is left as it was.
    max_batch: the most images in one network call; EOT draws are batched up to it.

    Raises:
        ValueError: for an unknown attack.
    """

    name: str
    norm: str
    eps: float
    seed: int = 0
    n_iter: int = 100
    eot: int = 20
    n_targets: int = 9
    square_queries: int = 5000
    max_batch: int = 640

    def __post_init__(self) -> None:
        choice("attack", self.name, ATTACKS)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None = None) -> AttackResult:
        """Attack images x (n, C, H, W) in [0, 1] with labels y (n,); PGD and APGD can begin at `start`."""
        right, listener = _is_right(model, x, y, self.max_batch), _Listener()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # AutoAttack reseeds in most places, but not in all
            if self.name in ("square", "standard"):
                suite = self._autoattack(model, listener)
                x_adv, predicted = _evaluate(suite, x, y, self.max_batch)
                right &= predicted == y
            else:
                x_adv, judged = self._images(model, x, y, start, listener)
                right &= _is_right(model, judged, y, self.max_batch)
        return AttackResult(x_adv.detach(), right, tuple(dict.fromkeys(listener.said)))

    def reseeded(self, generator: torch.Generator) -> "Attack":
        """This attack with a seed from the generator; adversarial training starts each step elsewhere."""
        return replace(self, seed=int(torch.randint(2**31, (), generator=generator, device=generator.device)))

    def _images(
        self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None, listener: "_Listener"
    ) -> tuple[Tensor, Tensor]:
        """(the images to keep, the images that AutoAttack would look at for its verdict)."""
        if self.name == "clean":
            x_adv = x.clone()
        elif self.name == "noise":
            shift = torch.randn_like(x)
            x_adv = (x + self.eps * (shift.sign() if self.norm == "Linf" else _unit(shift))).clamp(0, 1)
        elif self.name == "fgsm":
            x_adv = self._climb(x, self._gradient(model).mean_gradient(x, y)[0], x, self.eps)
        elif self.name == "pgd":
            x_adv = self._pgd(model, x, y, start)
        else:
            return self._apgd(model, x, y, start, listener)
        return x_adv, x_adv

    def _pgd(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None) -> Tensor:
        """The point of highest mean loss on a climb from a random point, or from `start`."""
        gradient, noise = self._gradient(model), self.eps * (2 * torch.rand_like(x) - 1)
        x_adv = project(x + noise if start is None else start, x, self.norm, self.eps)
        best, highest = x_adv, torch.full((len(x),), -torch.inf, device=x.device)
        for _ in range(self.n_iter):
            slope, loss = gradient.mean_gradient(x_adv, y)
            best = torch.where((loss > highest).reshape(-1, 1, 1, 1), x_adv, best)
            highest = torch.maximum(loss, highest)
            x_adv = self._climb(x_adv, slope, x, PGD_STEP * self.eps)
        loss = gradient.mean_gradient(x_adv, y)[1]
        return torch.where((loss > highest).reshape(-1, 1, 1, 1), x_adv, best)

    def _gradient(self, model: nn.Module) -> "BatchedEOT":
        return BatchedEOT(model, self.eot, self.max_batch, cross_entropy)

    def _climb(self, x_adv: Tensor, slope: Tensor, x: Tensor, step: float) -> Tensor:
        """A step along the sign of the slope (L2: its unit vector), kept in the ball around x."""
        direction = slope.sign() if self.norm == "Linf" else _unit(slope)
        return project(x_adv + step * direction, x, self.norm, self.eps)

    def _apgd(
        self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None, listener: "_Listener"
    ) -> tuple[Tensor, Tensor]:
        """APGD's point of highest loss, and the last one that it saw misclassified (none: the image).

        The first is kept: images never seen misclassified would otherwise come back clean, and could not be
        used against another defence or on other noise. AutoAttack judges by the second.
        """
        suite, name = self._autoattack(model, listener), self.name.removeprefix("apgd-")
        loss = {"ce": cross_entropy, "dlr": suite.apgd.dlr_loss, "margin": margin}[name]
        batched = BatchedEOT(model, self.eot, self.max_batch, loss)
        apgd = self._of_kind(suite.apgd, batched, listener, is_tf_model=True)
        apgd.loss = "dlr" if name == "dlr" else "ce"  # with "dlr" it warns of zero gradients
        apgd.init_hyperparam(x)
        best, right, _, wrong = apgd.attack_single_run(x, y, x_init=start)
        return best, torch.where(right.reshape(-1, 1, 1, 1), x, wrong)

    def _autoattack(self, model: nn.Module, listener: "_Listener") -> Any:
        """An AutoAttack object with our budgets, of version "standard" or with Square alone."""
        cls, device = autoattack_class(), str(next(iter(model.parameters())).device)
        suite = cls(model, norm=self.norm, eps=self.eps, seed=self.seed, version="standard", device=device)
        suite.verbose, suite.logger = False, listener
        suite.apgd = self._of_kind(suite.apgd, model, listener)
        suite.apgd_targeted = self._of_kind(
            suite.apgd_targeted, model, listener, n_target_classes=self.n_targets
        )
        suite.fab.n_iter, suite.fab.n_target_classes = self.n_iter, self.n_targets
        suite.square.n_queries = self.square_queries
        if self.name == "square":
            suite.attacks_to_run = ["square"]
        return suite

    def _of_kind(self, attack: Any, model: Any, listener: "_Listener", **more: Any) -> Any:
        """The same APGD anew: its schedule follows from n_iter when it is made."""
        common = {"n_iter": self.n_iter, "norm": self.norm, "eps": self.eps, "seed": self.seed}
        return type(attack)(model, device=attack.device, logger=listener, **common, **more)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) from logits (n, K) and labels (n,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The highest other logit minus the true one, (n,): Carlini and Wagner's difference of logits."""
    true = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(1) - logits[true]


def project(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """x_adv (n, C, H, W) moved into the eps-ball around x, and into [0, 1]."""
    shift = x_adv - x
    if norm == "Linf":
        return (x + shift.clamp(-eps, eps)).clamp(0, 1)
    length = shift.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return (x + shift * (eps / length.clamp_min(eps))).clamp(0, 1)


def _unit(x: Tensor) -> Tensor:
    """Each image of x (n, C, H, W) divided by its L2 norm; a zero image stays zero."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)


class BatchedEOT:
    """A model's loss and gradient averaged over noise draws, all draws in one call.

    AutoAttack's APGD asks the model for one draw after the other. Its interface for models that bring their
    own gradients (made for TensorFlow) lets us answer at once: same average, one batch. As in AutoAttack,
    the logits and the loss that APGD sees are those of the last draw.
    """

    def __init__(self, model: nn.Module, eot: int, max_batch: int, loss: Loss) -> None:
        self.model, self.eot, self.max_batch, self.loss = model, eot, max_batch, loss

    def predict(self, x: Tensor) -> Tensor:
        """Logits (n, K) of one draw."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in x.split(self.max_batch)])

    def get_logits_loss_grad_xent(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, K), loss (n,) and its mean gradient, like x, under the name that APGD calls for "ce"."""
        logits, losses, gradient = self._draws(x, y)
        return logits, losses[-1], gradient

    get_logits_loss_grad_dlr = get_logits_loss_grad_xent

    def mean_gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, like x, and the loss (n,), both averaged over the draws."""
        _, losses, gradient = self._draws(x, y)
        return gradient, losses.mean(0)

    def _draws(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (n, K) of the last draw, losses (eot, n), the mean gradient)."""
        total, losses = torch.zeros_like(x), []
        draws_at_once = max(1, self.max_batch // len(x))
        for first in range(0, self.eot, draws_at_once):
            draws = min(draws_at_once, self.eot - first)
            rows = x.detach().repeat(draws, 1, 1, 1), y.repeat(draws)
            parts = zip(*(values.split(self.max_batch) for values in rows), strict=True)
            logits, loss, gradient = map(torch.cat, zip(*(self._one(*part) for part in parts), strict=True))
            total += gradient.reshape(draws, *x.shape).sum(0)
            losses.append(loss.reshape(draws, -1))
        return logits[-len(x) :], torch.cat(losses), total / self.eot

    def _one(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, losses, gradient) of one draw for each x, in one call."""
        with torch.enable_grad():
            x = x.requires_grad_()
            logits = self.model(x)
            loss = self.loss(logits, y)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return logits.detach(), loss.detach(), gradient


def autoattack_class() -> type:
    """AutoAttack from `autoattack` (the original) or else from PyPI's `pyautoattack`; same attack code."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        from pyautoattack import AutoAttack
    return AutoAttack


def _evaluate(suite: Any, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """(adversarial images, predicted labels) by whichever AutoAttack this is."""
    run = suite.run_standard_evaluation
    if "bs" in inspect.signature(run).parameters:  # the original package
        return run(x, y, bs=batch_size, return_labels=True)
    return run(x, y, batch_size=batch_size)


def _is_right(model: nn.Module, x: Tensor, y: Tensor, max_batch: int) -> Tensor:
    """(n,) bool: one draw's verdict."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(max_batch)]) == y


class _Listener:
    """Stands in for AutoAttack's logger and keeps what it warns of.

    pyautoattack calls warning(); the original calls log(), for nothing but warnings while verbose is off.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, message: str) -> None:
        self.said.append(message)

    log = warning

    def debug(self, message: str) -> None:
        pass

    info = debug
