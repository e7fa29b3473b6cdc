"""AutoAttack through one adapter, with the noise draws of EOT batched into one call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.config import choice

VERSIONS = {"standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "rand": ("apgd-ce", "apgd-dlr")}
ATTACKS = ("clean", "apgd-ce", *VERSIONS)


@dataclass(frozen=True)
class AttackResult:
    """What an attack left behind.

    x_adv: (n, C, H, W) in [0, 1], within eps of the images.
    robust: (n,) bool, AutoAttack's own verdict: the image was right at first and in the one forward pass
        that followed each attack.
    warnings: what AutoAttack said about the defence, in order, each once.
    """

    x_adv: Tensor
    robust: Tensor
    warnings: tuple[str, ...] = ()


def run_attack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    seed: int,
    n_iter: int = 100,
    eot: int = 20,
    n_targets: int = 9,
    square_queries: int = 5000,
    max_batch: int = 640,
) -> AttackResult:
    """Attack a model with the contract of `purify.Purified`. The defaults are the paper's protocol.

    Args:
        name: "clean" (no perturbation), "apgd-ce" (one white-box attack, `eot` draws per gradient),
            "standard" (APGD-ce, APGD-t, FAB-t, Square; one draw) or "rand" (APGD-ce, APGD-dlr; `eot` draws).
        x, y: images (n, C, H, W) in [0, 1] and labels (n,).
        norm, eps: "Linf" or "L2" and the radius in the units of x.
        seed: of the attack; torch's global generator is left as it was.
        max_batch: the most images in one network call; EOT draws are batched up to it.

    Raises:
        ValueError: for an unknown attack.
    """
    choice("attack", name, ATTACKS)
    robust, listener = _is_right(model, x, y, max_batch), _Listener()
    if name == "clean":
        return AttackResult(x.clone(), robust)
    eot = 1 if name == "standard" else eot
    suite = _autoattack(model, norm, eps, seed, n_iter, eot, n_targets, square_queries, max_batch, listener)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # APGD's random start; AutoAttack reseeds in most places, but not in all
        if name == "apgd-ce":
            # best_loss keeps each image's worst point; otherwise images never seen misclassified would
            # come back clean, and could not be used against another defence or on other noise.
            suite.apgd.loss = "ce"
            x_adv = suite.apgd.perturb(x, y, best_loss=True).detach()
            robust &= _is_right(model, x_adv, y, max_batch)
        else:
            suite.attacks_to_run, suite.version = list(VERSIONS[name]), name
            x_adv, predicted = _evaluate(suite, x, y, max_batch)
            robust = predicted == y
    return AttackResult(x_adv.detach(), robust, tuple(dict.fromkeys(listener.said)))


class BatchedEOT:
    """A model's loss and gradient averaged over noise draws, all draws in one call.

    AutoAttack's APGD asks the model for one draw after the other. Its interface for models that bring their
    own gradients (made for TensorFlow) lets us answer at once: same average, one batch. As in AutoAttack,
    logits and loss are those of the last draw.
    """

    def __init__(self, model: nn.Module, eot: int, max_batch: int, dlr_loss: Callable[..., Tensor]) -> None:
        self.model, self.eot, self.max_batch, self.dlr_loss = model, eot, max_batch, dlr_loss

    def predict(self, x: Tensor) -> Tensor:
        """Logits (n, K) of one draw."""
        with torch.no_grad():
            return self.model(x)

    def get_logits_loss_grad_xent(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, K), cross-entropy (n,) and its mean gradient, like x."""
        return self._average(x, y, lambda logits, y: F.cross_entropy(logits, y, reduction="none"))

    def get_logits_loss_grad_dlr(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for AutoAttack's difference-of-logits-ratio loss."""
        return self._average(x, y, self.dlr_loss)

    def _average(
        self, x: Tensor, y: Tensor, loss_function: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.zeros_like(x)
        draws_at_once = max(1, self.max_batch // len(x))
        for first in range(0, self.eot, draws_at_once):
            draws = min(draws_at_once, self.eot - first)
            repeated = x.detach().repeat(draws, 1, 1, 1).requires_grad_()
            with torch.enable_grad():
                logits = self.model(repeated)
                loss = loss_function(logits, y.repeat(draws))
                (gradient,) = torch.autograd.grad(loss.sum(), repeated)
            total += gradient.reshape(draws, *x.shape).sum(0)
        return logits[-len(x) :].detach(), loss[-len(x) :].detach(), total / self.eot


def autoattack_class() -> type:
    """AutoAttack from `autoattack` (the original) or else from PyPI's `pyautoattack`; same attack code."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        from pyautoattack import AutoAttack
    return AutoAttack


def _autoattack(
    model: nn.Module,
    norm: str,
    eps: float,
    seed: int,
    n_iter: int,
    eot: int,
    n_targets: int,
    square_queries: int,
    max_batch: int,
    listener: "_Listener",
) -> Any:
    """An AutoAttack object with our budgets, and APGD's gradients batched over the EOT draws."""
    cls, device = autoattack_class(), str(next(iter(model.parameters())).device)
    suite = cls(model, norm=norm, eps=eps, seed=seed, version="standard", device=device)
    suite.verbose, suite.logger = False, listener

    def apgd(kind: type, attacked: Any, **more: Any) -> Any:
        return kind(
            attacked, n_iter=n_iter, norm=norm, eps=eps, seed=seed, device=device, logger=listener, **more
        )

    suite.apgd_targeted = apgd(type(suite.apgd_targeted), model, n_target_classes=n_targets)
    suite.apgd = apgd(type(suite.apgd), model)
    if eot > 1:
        batched = BatchedEOT(model, eot, max_batch, suite.apgd.dlr_loss)
        suite.apgd = apgd(type(suite.apgd), batched, is_tf_model=True)
    suite.fab.n_iter, suite.fab.n_target_classes = n_iter, n_targets
    suite.square.n_queries = square_queries
    return suite


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
