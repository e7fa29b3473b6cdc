"""Attacks by name: AutoAttack's through one adapter, plain PGD, and those made for random defences."""

import inspect
import math
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from coup_lib.ascent import (
    NORM_LABELS,
    NORMS,
    BatchedEOT,
    InParts,
    Keeping,
    Kept,
    Loss,
    LowFrequency,
    PerStep,
    Selective,
    cross_entropy,
    hidden_states,
    in_parts,
    low_frequencies,
    margin,
    norm_label,
    project,
    steepest,
)
from coup_lib.checks import (
    ROUNDING,
    are_probabilities,
    check_alike,
    check_images,
    check_labels,
    check_module,
    check_network,
    choice,
    count,
    number,
)
from coup_lib.outside import OUTSIDE, climb
from coup_lib.rays import rays
from coup_lib.sde import per_image

__all__ = ["ATTACKS", "NAMES", "NORMS", "NORM_LABELS", "Attack", "AttackResult", "in_parts", "project"]

# Those that begin where they are told:
STARTED = ("pgd", "apgd-ce", "apgd-dlr", "apgd-margin", "rand", "kept", "worst-draw", "em", "low-frequency")
SUITES = ("square", "standard")  # run by AutoAttack's own object
ATTACKS = ("clean", "noise", "fgsm", "rays", *STARTED, *SUITES)  # in the ball, of any classifier
NAMES = (*ATTACKS, "per-step", *OUTSIDE)
PARTS = {"rand": ("apgd-ce", "apgd-dlr"), "standard": ("apgd-ce", "apgd-t", "fab-t", "square")}
# The losses of "em", one after the other, and their values at the edge of a wrong decision (of ce at 1/2):
RESTARTS = {"apgd-margin": 0.0, "apgd-ce": math.log(2), "apgd-dlr": 0.0}
CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # the fewest that a loss compares, where they are more than two
PGD_STEP = 0.007 / (8 / 255)  # step over eps: of Table 3 (BPDA), and of Lee & Kim's PGD-200


@dataclass(frozen=True)
class AttackResult:
    """What an attack left behind.

    x_adv: (n, C, H, W) in [0, 1], within eps of the images.
    robust: (n,) bool, AutoAttack's own count: right in one clean draw, and in one draw after the attack, or
        after each of the attacks that "rand" and "standard" consist of; of "worst-draw" in all its draws.
    warnings: what AutoAttack and we said about the model, in order, each once.
    judged: (n,) bool, the same count without the clean draw, for an attack that comes after another one. None
        for `SUITES`, which leave out what the clean draw has lost.
    """

    x_adv: Tensor
    robust: Tensor
    warnings: tuple[str, ...] = ()
    judged: Tensor | None = None


@dataclass(frozen=True)
class Attack:
    """An attack with its budget; call it on a model with the contract of `purify.Purified`.

    name: "clean" (no perturbation), "noise" (random, on the surface of the ball), "fgsm" (one step),
        "pgd" (fixed steps of `PGD_STEP`·eps), "apgd-ce", "apgd-dlr", "apgd-margin" (APGD on three losses),
        "rand" (AutoAttack's: apgd-ce, then apgd-dlr), all with `eot` draws per gradient; those that look at
        every one of these draws: "kept" (apgd-ce's climb; the point that the fewest draws got right, see
        `ascent.Kept`), "worst-draw" (the same images, and its own count: right in every draw at every point,
        as of an attacker who may submit again; its control is the same count at a tiny eps) and "em" (the
        gradient of the draws that can be broken together, see `ascent.selected`; a third of n_iter on each of
        the losses `RESTARTS`, images that are wrong in every draw left out, best point kept);
        "low-frequency" (apgd-ce along the lowest cosines, see `ascent.low_frequencies`); "per-step" (kept,
        with the `ascent.deviation` of a purifier's path added); "rays" (black box, by what most of `eot`
        draws decide, `square_queries` of them in all, see `rays.rays`); "square" (black box, by logits) and
        "standard" (AutoAttack's: APGD-ce, APGD-t, FAB-t, Square), one draw each. Two attacks on a defence
        that begins anew with the same noise are judged on the same noise; those in "rand" are not. Outside
        the ball: "filter" and "flow", see `outside`.
    norm, eps: "Linf" or "L2", in any case, and the radius in the units of x, a number or a string as "8/255".
        Outside the ball the norm means nothing, and eps is the reach of `outside.filtered` or `flowed`.
    seed: of the attack, at most 2³¹; torch's global generator is left as it was.
    n_targets: of APGD-t and FAB-t, which take no more than there are wrong classes.
    max_batch: the most images in one call of the model; EOT draws are batched up to it. To results it makes
        no difference but for rounding, if the model draws its noise image by image.

    Raises:
        ValueError: for an unknown attack or norm, or a number out of its range.
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
        choice("attack", self.name, NAMES)
        checked: dict[str, Any] = {"norm": norm_label(self.norm)}
        checked["eps"] = number("eps", self.eps, 0, OUTSIDE.get(self.name, math.inf))
        checked["seed"] = count("seed", self.seed, 2**31, low=0)
        for name in ("n_iter", "eot", "n_targets", "square_queries", "max_batch"):
            checked[name] = count(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @torch.inference_mode(False)  # in which nothing can be differentiated
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None = None) -> AttackResult:
        """Attack images x (n, C, H, W) in [0, 1] with labels y (n,), int64.

        Args:
            model: classifies x by logits (n, K); in eval mode, where x is.
            start: like x, where `STARTED` attacks begin; brought into the ball and into [0, 1] first. Others
                take none, and say so in `AttackResult.warnings`.

        Raises:
            ValueError: for a model, images, labels or a start that are not so, too few classes for apgd-dlr,
                or per-step on a model that shows no states. "rand", "standard" and "em" leave out what needs
                more classes than there are, and say so.
            FloatingPointError: for NaN or infinity from the model.
        """
        _check(model, x, y, start)
        if self.name == "per-step" and (why := hidden_states(model)):
            raise ValueError(why)
        x, y = x.detach().clone(), y.clone()
        whole = InParts(model, self.max_batch)
        # One pass over all of x comes first. It shows what the model gives, and is the clean draw of every
        # attack but AutoAttack's suites, which draw their own. Those make this pass, too, without counting
        # it: a defence draws its noise call by call, and the records that there are were made after this one.
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed + 1)  # not the first draw of the attack again
            logits = whole(x)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("NaN or infinity from the model")
        check_labels(y, classes := logits.shape[1])
        parts, said = _possible(PARTS.get(self.name, (self.name,)), classes)
        if are_probabilities(logits):
            said.append("the model returns probabilities, not logits: gradients through them are weak")
        if start is not None and self.name not in (*STARTED, "per-step"):
            said.append(f"{self.name} takes no start: what was given is not used")
        for warning in said:
            warnings.warn(warning, stacklevel=3)
        begin = None if start is None else self._inside(start.detach().clone(), x)
        task = _Task(whole, x, y, begin, classes, parts, said)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # AutoAttack reseeds in most places, but not in all
            if self.name in SUITES:
                x_adv, predicted = _evaluate(_suite(self, task), x, y)
                right, judged = predicted == y, None
            else:
                clean = logits.argmax(1) == y
                x_adv, judged = _by_parts(self, task, clean)
                right = clean & judged
        return AttackResult(x_adv.detach(), right, tuple(dict.fromkeys(said)), judged)

    def reseeded(self, generator: torch.Generator) -> "Attack":
        """This attack with a seed from the generator; adversarial training starts each step elsewhere."""
        return replace(self, seed=int(torch.randint(2**31, (), generator=generator, device=generator.device)))

    def _inside(self, start: Tensor, x: Tensor) -> Tensor:
        """The start, its images moved that are out of the ball around x or of [0, 1]; others to the bit."""
        moved = project(start, x, self.norm, self.eps)
        return torch.where(per_image((moved - start).abs().flatten(1).amax(1) > ROUNDING, x), moved, start)


def _by_parts(attack: Attack, task: "_Task", clean: Tensor) -> tuple[Tensor, Tensor]:
    """(images, verdicts) of all parts together: an image is kept from the first part that broke it.

    clean: (n,) bool, the clean draw's verdicts; what it lost is broken already.
    """
    if attack.name == "worst-draw":  # of an image that is lost anywhere, the point is kept where it is
        kept = _kept(attack, task)  # (DiffBreak, NeurIPS 2025; DiffHammer)
        return kept.x, kept.right == 1
    made = []
    for name in task.parts:
        torch.manual_seed(attack.seed)
        made.append(_images(attack, name, task))
    x_adv, judged = made[0][0], torch.ones_like(clean)
    for found, shown in made:  # all after the last seed, or a model with torch's noise would repeat it
        x_adv = torch.where(per_image(clean & judged, found), found, x_adv)
        judged = judged & task.right(shown)
    return x_adv, judged


def _images(attack: Attack, name: str, task: "_Task") -> tuple[Tensor, Tensor]:
    """(the images to keep, the images that AutoAttack would look at for its verdict)."""
    x = task.x
    if name == "clean":
        x_adv = x.clone()
    elif name == "noise":
        shift = torch.randn_like(x)
        x_adv = (x + attack.eps * steepest(shift, attack.norm)).clamp(0, 1)
    elif name == "fgsm":
        x_adv = _climb(attack, x, _gradient(attack, task).mean_gradient(x, task.y)[0], x, attack.eps)
    elif name == "pgd":
        x_adv = _pgd(attack, task)
    elif name == "rays":
        queries = max(1, attack.square_queries // attack.eot)
        x_adv = rays(partial(_outvoted, attack, task), x, attack.norm, attack.eps, queries)
    elif name in ("kept", "per-step"):
        x_adv = _kept(attack, task).x
    elif name == "em":
        x_adv = _em(attack, task)
    elif name in OUTSIDE:
        x_adv = climb(name, _gradient(attack, task), x, task.y, attack.eps, attack.n_iter)
    elif name == "low-frequency":
        return _low_frequency(attack, task)
    else:
        loss = _loss(attack, task, name.removeprefix("apgd-"))
        return _apgd(attack, task, BatchedEOT(task.model, attack.eot, attack.max_batch, loss))
    return x_adv, x_adv


def _pgd(attack: Attack, task: "_Task") -> Tensor:
    """The point of highest mean loss on a climb from a random point, or from `start`."""
    x, gradient = task.x, _gradient(attack, task)
    noise = attack.eps * (2 * torch.rand_like(x) - 1)
    x_adv = project(x + noise if task.start is None else task.start, x, attack.norm, attack.eps)
    best, highest = x_adv, torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(attack.n_iter + 1):
        slope, loss = gradient.mean_gradient(x_adv, task.y)
        best = torch.where(per_image(loss > highest, x), x_adv, best)
        highest = torch.maximum(loss, highest)
        x_adv = _climb(attack, x_adv, slope, x, PGD_STEP * attack.eps)
    return best


def _gradient(attack: Attack, task: "_Task") -> "BatchedEOT":
    return BatchedEOT(task.model, attack.eot, attack.max_batch, cross_entropy)


def _climb(attack: Attack, x_adv: Tensor, slope: Tensor, x: Tensor, step: float) -> Tensor:
    """A step along the sign of the slope (L2: its unit vector), kept in the ball around x."""
    return project(x_adv + step * steepest(slope, attack.norm), x, attack.norm, attack.eps)


def _possible(parts: Iterable[str], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """(the parts whose loss has classes enough, what is to be said of others); ValueError if none has."""
    possible = tuple(name for name in parts if classes >= CLASSES.get(name, 2))
    few = [f"{name} compares {CLASSES[name]} classes" for name in parts if name not in possible]
    if not possible:
        raise ValueError(f"attack: {few[0]}; the model has {classes}")
    return possible, [f"left out, as the model has {classes} classes: {', '.join(few)}"] if few else []


def _apgd(attack: Attack, task: "_Task", draws: BatchedEOT) -> tuple[Tensor, Tensor]:
    """APGD's point of highest loss, and the last one that it saw misclassified (none: the image).

    The first is kept: images never seen misclassified would otherwise come back clean, and could not be
    used against another defence or on other noise. AutoAttack judges by the second.
    """
    apgd = _batched(attack, _suite(attack, task).apgd, task, draws)
    apgd.loss = "dlr" if attack.name == "apgd-dlr" else "ce"  # with "dlr" it warns of zero gradients
    apgd.init_hyperparam(task.x)
    best, right, _, wrong = apgd.attack_single_run(task.x, task.y, x_init=task.start)
    return best, torch.where(per_image(right, wrong), task.x, wrong)


def _loss(attack: Attack, task: "_Task", name: str) -> Loss:
    """APGD's loss of this name: "ce", "dlr" or "margin"."""
    return {"ce": cross_entropy, "dlr": _suite(attack, task).apgd.dlr_loss, "margin": margin}[name]


def _kept(attack: Attack, task: "_Task") -> Kept:
    """What the climb of apgd-ce leaves, if every draw of every gradient is looked at."""
    kept, kind = Kept(task.x), PerStep if attack.name == "per-step" else Keeping
    draws = kind(task.model, attack.eot, attack.max_batch, cross_entropy, kept)
    _apgd(attack, task, draws)
    _say_alike(attack, task, draws)
    return kept


def _em(attack: Attack, task: "_Task") -> Tensor:
    """The best point for each image of restarts by several losses (Wang et al.'s DiffHammer, NeurIPS 2024).

    They start anew at random, and leave out the images that were wrong in every draw at some point before.
    All others are attacked at once, so that it makes no difference which of them are the hardest.
    """
    kept, left = Kept(task.x), torch.arange(len(task.x), device=task.x.device)
    possible, said = _possible(RESTARTS, task.classes)
    task.said.extend(said)
    short = replace(attack, n_iter=max(1, attack.n_iter // len(possible)))
    part = task
    for name in possible:
        loss = _loss(attack, task, name.removeprefix("apgd-"))
        given = task.model, attack.eot, attack.max_batch, loss, kept, left
        draws = Selective(*given, undecided=RESTARTS[name], norm=attack.norm, eps=attack.eps)
        _apgd(short, part, draws)
        left = (kept.right > 0).nonzero()[:, 0]
        if not len(left):
            break
        part = replace(task, x=task.x[left], y=task.y[left], start=None)
    _say_alike(attack, task, draws)
    return kept.x


def _low_frequency(attack: Attack, task: "_Task") -> tuple[Tensor, Tensor]:
    """What `_apgd` gives, by the cross-entropy's low frequencies; also the random start has no others."""
    noise = low_frequencies(torch.randn_like(task.x))
    start = _climb(attack, task.x, noise, task.x, attack.eps) if task.start is None else task.start
    if max(task.x.shape[2:]) == 1:
        task.said.append("low-frequency: images of one pixel have no high frequencies to leave out")
    draws = LowFrequency(task.model, attack.eot, attack.max_batch, cross_entropy)
    return _apgd(attack, replace(task, start=start), draws)


def _outvoted(attack: Attack, task: "_Task", points: Tensor, places: Tensor) -> Tensor:
    """Whether most of a decision's draws are wrong, (m,) bool, at points of the images at these places."""
    with torch.no_grad():
        classes = task.model(points.repeat(attack.eot, 1, 1, 1)).argmax(1).reshape(attack.eot, -1)
    return (classes != task.y[places]).float().mean(0) > 0.5


def _say_alike(attack: Attack, task: "_Task", draws: Keeping) -> None:
    if attack.eot > 1 and draws.alike:
        task.said.append(f"{attack.name}: the model's draws are all alike, so that one would do")


def _suite(attack: Attack, task: "_Task") -> Any:
    """An AutoAttack object with our budgets, of version "standard" or with Square alone.

    It sees one batch. That is parted where the model is called, or its loss and gradient asked for.
    """
    cls, targets = autoattack_class(), min(attack.n_targets, task.classes - 1)
    common = {"norm": attack.norm, "eps": attack.eps, "seed": attack.seed, "device": str(task.x.device)}
    suite = cls(task.model, version="standard", **common)
    suite.verbose, suite.logger = False, _logger(task.said)
    targeted, fab = suite.apgd_targeted, suite.fab

    def targeted_loss(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        targeted.y_target = target  # where AutoAttack's loss looks for it
        return targeted.dlr_loss_targeted(logits, y)

    single, aimed = (
        BatchedEOT(task.model, 1, attack.max_batch, loss) for loss in (cross_entropy, targeted_loss)
    )
    suite.apgd = _batched(attack, suite.apgd, task, single)
    suite.apgd_targeted = _batched(attack, targeted, task, aimed, n_target_classes=targets)
    fab.n_iter, fab.n_target_classes = attack.n_iter, targets
    slopes = fab.get_diff_logits_grads_batch_targeted
    fab.get_diff_logits_grads_batch_targeted = partial(in_parts, slopes, attack.max_batch)
    suite.square.n_queries = attack.square_queries
    suite.attacks_to_run = list(task.parts)
    return suite


def _batched(attack: Attack, apgd: Any, task: "_Task", draws: BatchedEOT, **more: Any) -> Any:
    """AutoAttack's APGD made anew, on our draws: its schedule follows from n_iter when it is made."""
    ours = {"n_iter": attack.n_iter, "norm": attack.norm, "eps": attack.eps, "seed": attack.seed} | more
    return type(apgd)(draws, device=apgd.device, logger=_logger(task.said), is_tf_model=True, **ours)


def autoattack_class() -> type:
    """AutoAttack from `autoattack` (the original) or else from PyPI's `pyautoattack`; same attack code."""
    try:
        from autoattack import AutoAttack
    except ImportError:
        from pyautoattack import AutoAttack
    return AutoAttack


def _evaluate(suite: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(adversarial images, predicted labels) by whichever AutoAttack this is, of all images in one batch."""
    for package in ("autoattack", "pyautoattack"):  # a dynamic defence seen before is not this one
        if checks := sys.modules.get(f"{package}.checks"):
            checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    run = suite.run_standard_evaluation
    if "bs" in inspect.signature(run).parameters:  # the original package
        return run(x, y, bs=len(x), return_labels=True)
    return run(x, y, batch_size=len(x))


def _check(model: nn.Module, x: Tensor, y: Tensor, start: Tensor | None) -> None:
    """ValueError for what cannot be attacked, as far as that is seen before the model is called."""
    check_module("model", model)
    check_images(x)
    check_network("model", model, x)
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    check_alike("y", y, labels, "one label per image")
    if start is not None:
        check_alike("start", start, x, "images like x")
        if not bool(start.isfinite().all()):
            raise ValueError("start: expected finite values; got NaN or infinity")


@dataclass(frozen=True)
class _Task:
    """What is attacked: images x and y on a model (in parts) of so many classes, from a start in the ball.

    parts: the names of what the attack consists of. said: what is warned of, more is added on the way.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    start: Tensor | None
    classes: int
    parts: tuple[str, ...]
    said: list[str]

    def right(self, x: Tensor) -> Tensor:
        """(n,) bool: one draw's verdict."""
        with torch.no_grad():
            return self.model(x).argmax(1) == self.y


def _logger(said: list[str]) -> SimpleNamespace:
    """Stands in for AutoAttack's logger and keeps what it warns of.

    pyautoattack calls warning(); the original calls log(), for nothing but warnings while verbose is off.
    """
    return SimpleNamespace(warning=said.append, log=said.append, info=str, debug=str)
