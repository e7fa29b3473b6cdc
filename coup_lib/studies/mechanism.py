"""Why attacks that leave COUP's second-order term out are the stronger ones (notebook 07).

Everything here looks at the mean cross-entropy over noise draws, L(x), and at two gradients of it: the exact
one, E[∇ℓ] with the guidance differentiated, and the first-order one, with the guidance held constant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from coup_lib.attacks import project
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.noise import image_seeds
from coup_lib.evaluation.outcomes import Accuracy, Difference, worst_of
from coup_lib.evaluation.progress import Plan
from coup_lib.evaluation.protocol import Evaluation, Experiment, Measurement
from coup_lib.evaluation.records import ChunkedRecord, Worker, is_complete
from coup_lib.evaluation.specs import CLEAN, AttackSpec
from coup_lib.evaluation.stats import student
from coup_lib.guidance import FirstOrder, to_image
from coup_lib.purify import Purified, Purifier, together
from coup_lib.reporting.plots import PALETTE
from coup_lib.solver import euler_step, step_times

KINDS = ("exact", "first_order")
KIND_LABELS = {"exact": "exact", "first_order": "first-order", "worst": "worst of all"}
KIND_COLOURS = {"exact": PALETTE[3], "first_order": PALETTE[0], "worst": "black"}
KIND_MARKERS = {"exact": "o", "first_order": "s", "worst": "D"}
WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # λ of the control with the sign flipped
EOT_FACTORS = (0.05, 0.25, 1.0, 3.2)  # of the configured draws: 1, 5, 20, 64 at the full size
DRAWS = 64  # behind a mean gradient
SECOND_ORDER_PATHS = 4  # behind the share of the second-order term
SLOPE_DRAWS = 32
LANDSCAPE_DRAWS = 16
LANDSCAPE = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # distances, in units of eps
DIFFERENCES = (0.05, 0.1, 0.2)  # half-widths of the finite differences, in units of eps
FIT, FRESH = 4, 5  # streams of the seed beside those of `evaluate`
BATCH_PIXELS = 2**16  # in one network call, images times positions


# --- What is measured -------------------------------------------------------------------------------------


def halved(config: Config) -> Config:
    """Half of the iterations, for the series of attacks: their curves matter, not their last half point."""
    return replace(config, n_iter=max(1, config.n_iter // 2))


def eot_counts(config: Config) -> tuple[int, ...]:
    """The numbers of noise draws per gradient that are compared, ascending; the third is the config's own."""
    return tuple(sorted({max(1, round(factor * config.eot)) for factor in EOT_FACTORS}))


def sign_control(config: Config, *, verbose: bool = True) -> dict[float, dict[str, np.ndarray]]:
    """λ → "clean", "exact", "first_order", "worst" → share of right draws, (n,), of COUP with that λ.

    The worst is per image, over both gradients, BPDA and the transfers from none, reverse and DiffPure. λ = 0
    is the reverse SDE. The attacks have half the iterations.
    """
    return {weight: _both_gradients(one, verbose) for weight, one in sign_experiments(config).items()}


def smooth_control(config: Config, *, verbose: bool = True) -> dict[str, np.ndarray]:
    """Like one λ of `sign_control`: COUP at the config's λ, guided by the smoothed maximum."""
    return _both_gradients(smooth_experiment(config), verbose)


def sign_experiments(config: Config) -> dict[float, Experiment]:
    """λ → what `sign_control` attacks with it."""
    found, half = {}, halved(config)
    for weight in WEIGHTS:
        here = replace(half, guidance_weight=weight or config.guidance_weight)
        found[weight] = Experiment(here, _control_attacks("coup" if weight else "reverse"))
    return found


def smooth_experiment(config: Config) -> Experiment:
    """What `smooth_control` attacks."""
    return Experiment(halved(config), _control_attacks("smooth-max"))


def _control_attacks(target: str) -> dict[str, dict[str, AttackSpec]]:
    row = {"clean": CLEAN}
    row |= {kind: against("apgd-ce", target, kind) for kind in (*KINDS, "bpda")}
    row |= {f"from_{name}": against("apgd-ce", name) for name in ("none", "reverse", "diffpure")}
    return {target: row}


def _both_gradients(experiment: Experiment, verbose: bool) -> dict[str, np.ndarray]:
    (scores,) = experiment.scores(verbose=verbose).values()
    shares = {name: scores[name].right for name in ("clean", *KINDS)}
    return shares | {"worst": worst_of(list(scores.values()))}


def gradient_statistics(config: Config, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Both gradients of COUP at the images that APGD-ce made against reverse-only.

    cosine, ratio (n,): angle between the mean gradients, and length of the exact one over the other's.
    snr_exact, snr_first_order (n,): |mean| over the standard deviation of a single draw's gradient.
    second_order (N, n): the length of what the second-order term adds to a step's vector-Jacobian product,
        over that of the whole product; first step first, mean of 4 paths.
    switched (n,): the share of paths on which the classifier's decision changes from a step to the next.
    """
    evaluation = Evaluation(config, verbose=False)

    def compute(places: range) -> dict[str, np.ndarray]:
        x, y = _part(_attacked(evaluation), places), _part(evaluation.images.y, places)
        seeds, means, found = _seeds(config, FIT, places, draws), {}, {}
        for kind in KINDS:
            gradients = draw_gradients(evaluation.bench.defence("coup", kind), x, y, seeds)
            means[kind] = gradients.mean(1).flatten(1)
            found[f"snr_{kind}"] = signal_to_noise(gradients).cpu().numpy()
        lengths = {kind: mean.norm(dim=1) for kind, mean in means.items()}
        product = (means["exact"] * means["first_order"]).sum(1)
        found["cosine"] = (product / (lengths["exact"] * lengths["first_order"])).cpu().numpy()
        found["ratio"] = (lengths["exact"] / lengths["first_order"]).cpu().numpy()
        model = cast(Purified, evaluation.bench.defence("coup"))
        fresh = _seeds(config, FRESH, places, SECOND_ORDER_PATHS)
        paths = [_second_order(model, x, y, once) for once in fresh.T]
        found["second_order"] = torch.stack([share for share, _ in paths]).mean(0).cpu().numpy()
        found["switched"] = torch.stack([switched for _, switched in paths]).float().mean(0).cpu().numpy()
        return found

    return _record(evaluation, "gradients", compute, draws=draws)


def landscape(
    config: Config, target: str, start: str, draws: int = LANDSCAPE_DRAWS, kinds: Sequence[str] = KINDS
) -> dict[str, np.ndarray]:
    """The mean loss (S, n) at the `LANDSCAPE` distances along the direction of each kind of mean gradient.

    The direction is that of an attack's step (the sign for Linf, the unit vector for L2), and so is the
    projection. Directions and losses share their noise draws: for these draws no direction rises more
    steeply at the start than the exact gradient's.

    Args:
        start: "clean", or "reverse" for the images that APGD-ce made against reverse-only.
    """
    evaluation = Evaluation(config, verbose=False)

    def compute(places: range) -> dict[str, np.ndarray]:
        x, y = _part(evaluation.images.x, places), _part(evaluation.images.y, places)
        begin = x if start == "clean" else _part(_attacked(evaluation), places)
        seeds, model = _seeds(config, FIT, places, draws), evaluation.bench.defence(target)
        found = {}
        for kind in kinds:
            gradient = draw_gradients(evaluation.bench.defence(target, kind), begin, y, seeds).mean(1)
            direction = config.eps * step_direction(gradient, config)
            images = [project(begin + s * direction, x, config.norm_label, config.eps) for s in LANDSCAPE]
            found[kind] = torch.stack([draw_losses(model, image, y, seeds).mean(1) for image in images])
        return {kind: losses.cpu().numpy() for kind, losses in found.items()}

    settings = {"start": start, "distances": list(LANDSCAPE), "kinds": list(kinds)}
    return _record(evaluation, "landscape", compute, settings, draws=draws, target=target)


def landscapes(config: Config) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(case, start) → `landscape`, of COUP as it is ("coup") and with the sign of its guidance "flipped"."""
    weights = {"coup": config.guidance_weight, "flipped": -config.guidance_weight}
    return {
        (case, start): landscape(replace(config, guidance_weight=weight), "coup", start)
        for case, weight in weights.items()
        for start in ("clean", "reverse")
    }


def slopes(config: Config, case: str, draws: int = SLOPE_DRAWS) -> dict[str, np.ndarray]:
    """Does a gradient foretell how the mean loss changes? At half of the images, attacked as reverse-only.

    For each kind, along its own direction d (per unit of its length): "foretold_<kind>" (n,), the product of
    the mean gradient with d, and "measured_<kind>" (S, n), central differences of the mean loss over the
    same draws at the `DIFFERENCES`. Where the loss of every path is smooth the two agree.

    Args:
        case: "reverse" (no guidance), "coup", "flipped" (−λ) or "smooth" (`guidance.SmoothMax`).
    """
    weight = config.guidance_weight * (-1 if case == "flipped" else 1)
    evaluation = Evaluation(replace(config, guidance_weight=weight), verbose=False)
    target = {"reverse": "reverse", "smooth": "smooth-max"}.get(case, "coup")

    def compute(places: range) -> dict[str, np.ndarray]:
        x, y = _part(_attacked(evaluation), places), _part(evaluation.images.y, places)
        seeds, found = _seeds(config, FIT, places, draws), {}
        model = cast(Purified, evaluation.bench.defence(target))
        model.purifier.margin = config.eps  # differences on either side of an image on the edge
        for kind in KINDS:
            gradient = draw_gradients(evaluation.bench.defence(target, kind), x, y, seeds).mean(1)
            direction = step_direction(gradient, config)
            found[f"foretold_{kind}"] = (gradient * direction).flatten(1).sum(1).cpu().numpy()
            found[f"measured_{kind}"] = np.stack(
                [
                    central_difference(model, x, y, seeds, s * config.eps * direction) / (s * config.eps)
                    for s in DIFFERENCES
                ]
            )
        return found

    settings, half = {"differences": list(DIFFERENCES)}, max(2, config.n_images // 2)
    return _record(evaluation, "slopes", compute, settings, draws=draws, target=target, n_images=half)


def all_slopes(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Case → `slopes`."""
    return {case: slopes(config, case) for case in CASES}


def reached(config: Config, *, verbose: bool = True) -> dict[str, dict[int, np.ndarray]]:
    """kind → EOT draws → mean loss (n,) on fresh noise, of COUP at the images APGD-ce made with that kind.

    Half of the iterations; `eot_counts` draws per gradient.
    """
    experiment = reached_experiment(config)
    experiment.scores(verbose=verbose)
    evaluation = Evaluation(experiment.config, verbose=False)

    def compute(spec: AttackSpec, places: range) -> dict[str, np.ndarray]:
        x, y = _part(evaluation.x_adv(spec), places), _part(evaluation.images.y, places)
        seeds = _seeds(config, FRESH, places, DRAWS)
        return {"loss": draw_losses(evaluation.bench.defence("coup"), x, y, seeds).mean(1).cpu().numpy()}

    found: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    for (kind, eot), spec in experiment.attacks["coup"].items():
        losses = _record(evaluation, "reached", partial(compute, spec), draws=DRAWS, attack=spec)
        found[kind][eot] = losses["loss"]
    return found


def reached_experiment(config: Config) -> Experiment:
    """The attacks of `reached`, by (kind, EOT draws)."""
    row = {
        (kind, eot): against("apgd-ce", "coup", kind, eot=None if eot == config.eot else eot)
        for kind in KINDS
        for eot in eot_counts(config)
    }
    return Experiment(halved(config), {"coup": row})


def experiments(config: Config) -> list[Experiment]:
    """Everything that is attacked here."""
    return [*sign_experiments(config).values(), smooth_experiment(config), reached_experiment(config)]


def measurements(config: Config) -> list[Measurement]:
    """What is no attack here; the slopes are taken at half of the images."""
    kinds, n, half = len(KINDS), config.n_images, max(2, config.n_images // 2)
    statistics = kinds * (DRAWS + SECOND_ORDER_PATHS), SECOND_ORDER_PATHS
    steps = kinds * LANDSCAPE_DRAWS, kinds * len(LANDSCAPE) * LANDSCAPE_DRAWS
    slope = kinds * SLOPE_DRAWS, kinds * 2 * len(DIFFERENCES) * SLOPE_DRAWS
    after = (0, DRAWS)
    return [
        Measurement(config, "coup", statistics, n),
        *[Measurement(config, "coup", steps, n)] * 4,  # two cases, from two starts
        *[Measurement(config, "coup", slope, half)] * len(CASES),
        *[Measurement(config, "coup", after, n)] * kinds * len(eot_counts(config)),
    ]


# --- The tools --------------------------------------------------------------------------------------------


def draw_gradients(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
    """∇ₓ of the cross-entropy for each noise draw: (n, draws, C, H, W) for seeds (n, draws)."""
    n, draws = seeds.shape
    parts = []
    for images, labels, chosen in _batches(x, y, seeds, together(model, x, _at_once(x))):
        images = images.clone().requires_grad_()
        loss = F.cross_entropy(_logits(model, images, chosen), labels, reduction="sum")
        parts.append(torch.autograd.grad(loss, images)[0])
    return torch.cat(parts).reshape(n, draws, *x.shape[1:])


@torch.no_grad()
def draw_losses(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
    """The cross-entropy for each noise draw: (n, draws) for seeds (n, draws)."""
    parts = [
        F.cross_entropy(_logits(model, images, chosen), labels, reduction="none")
        for images, labels, chosen in _batches(x, y, seeds, _at_once(x))
    ]
    return torch.cat(parts).reshape(seeds.shape)


def central_difference(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor, shift: Tensor) -> np.ndarray:
    """Half of the mean loss at x + shift minus that at x − shift, (n,): slope times length."""
    ahead, behind = (draw_losses(model, x + side * shift, y, seeds).mean(1) for side in (1, -1))
    return ((ahead - behind) / 2).cpu().numpy()


def signal_to_noise(gradients: Tensor) -> Tensor:
    """|mean| over the root mean square distance to the mean, (n,), of gradients (n, draws, C, H, W)."""
    flat = gradients.flatten(2)
    mean = flat.mean(1, keepdim=True)
    spread = (flat - mean).square().sum(2).sum(1) / (flat.shape[1] - 1)
    return mean.norm(dim=2)[:, 0] / spread.sqrt()


def step_direction(gradient: Tensor, config: Config) -> Tensor:
    """An attack's step of size 1 in the config's norm, like gradient (n, C, H, W)."""
    if config.norm == "linf":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)


def _second_order(model: Purified, x: Tensor, y: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """(share (N, n) of the second-order term in each step's product, decision changed on the path (n,))."""
    states: list[Tensor] = []
    purifier = model.purifier
    purifier.trajectory(x, lambda index, t, state: states.append(state), seeds=seeds)
    decisions = torch.stack([model.classifier(to_image(state)).argmax(1) for state in states])
    end = states[-1].detach().requires_grad_()
    loss = F.cross_entropy(model.classifier(purifier.finish(end)), y, reduction="sum")
    (v,) = torch.autograd.grad(loss, end)
    shares, steps = [], step_times(purifier.times, x.dtype, x.device)
    for state, (t, dt) in zip(reversed(states[:-1]), reversed(steps), strict=True):
        whole, without = (
            _pulled_back(score, purifier, state, t, dt, v)
            for score in (purifier.score, FirstOrder(purifier.score))
        )
        # A path that ends deep in the right class has no gradient left to divide by.
        length = whole.flatten(1).norm(dim=1).clamp_min(1e-30)
        shares.append((whole - without).flatten(1).norm(dim=1) / length)
        v = whole
    return torch.stack(shares[::-1]), (decisions != decisions[0]).any(0)


def _pulled_back(
    score: nn.Module, purifier: Purifier, state: Tensor, t: Tensor, dt: Tensor, v: Tensor
) -> Tensor:
    x = state.detach().requires_grad_()
    return torch.autograd.grad(euler_step(score, purifier.sde, x, t, dt), x, v)[0]


def _logits(model: nn.Module, x: Tensor, seeds: Tensor) -> Tensor:
    return model(x, seeds=seeds) if isinstance(model, Purified) else model(x)


def _batches(x: Tensor, y: Tensor, seeds: Tensor, size: int) -> Any:
    """Images, labels and seeds, one entry per image and draw, in batches of this size."""
    draws = seeds.shape[1]
    repeated = (x.repeat_interleave(draws, 0), y.repeat_interleave(draws), seeds.flatten())
    return zip(*(values.split(size) for values in repeated), strict=True)


def _at_once(x: Tensor) -> int:
    """How many images like those of x (n, C, H, W) go through the networks at once."""
    return max(1, BATCH_PIXELS // x[0, 0].numel())


def _part(values: Tensor, places: range) -> Tensor:
    return values[places.start : places.stop]


def _seeds(config: Config, purpose: int, places: range, draws: int) -> Tensor:
    return image_seeds(config.seed, purpose, places, draws)


def _attacked(evaluation: Evaluation) -> Tensor:
    return evaluation.x_adv(against("apgd-ce", "reverse"))


def _record(
    evaluation: Evaluation,
    name: str,
    compute: Callable[[range], dict[str, np.ndarray]],
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    draws: int,
    target: str = "coup",
    attack: AttackSpec | None = None,
    n_images: int | None = None,
) -> dict[str, np.ndarray]:
    """Arrays (…, n) of the first n_images (all), made of what `compute` gives for some of them at a time.

    As many at a time as fill a batch with their draws: that much is lost by a kill, and processes share the
    rest. The settings are these, the images' and the defences', and those of an attack of its own.
    """
    config, n = evaluation.config, n_images or evaluation.config.n_images

    attack_name, images = evaluation.attack_settings(against("apgd-ce", "reverse"))
    named = {"images": images, "target": evaluation.bench.settings(target)}
    if attack:
        named["attack"] = evaluation.attack_settings(attack)[1]
    size = max(1, _at_once(evaluation.images.x) // draws)
    work = ChunkedRecord(
        config.profile,
        f"mechanism-{name}-{target}-{attack_name}",
        {**settings, **named, "draws": draws, "seed": config.seed},
        [range(start, min(start + size, n)) for start in range(0, n, size)],
        compute,
        lambda parts: {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]},
        Worker(config.shard, config.num_shards),
    )
    to_do = not is_complete(work.path)
    plan = Plan([float(to_do)], verbose=to_do)
    plan.start(f"{name}, {target}")
    return work.finish(plan.advance)["arrays"]


# --- What the numbers say ---------------------------------------------------------------------------------

CASES = {  # the cases of `slopes`
    "reverse": "no guidance",
    "coup": "COUP",
    "flipped": "COUP, sign flipped",
    "smooth": "COUP, smoothed max",
}


def ratio_of(result: Mapping[str, np.ndarray], kind: str) -> tuple[float, float, float]:
    """Foretold over measured slope, means over images and distances, with a 95 % bootstrap interval."""
    foretold, measured = result[f"foretold_{kind}"], result[f"measured_{kind}"].mean(0)
    rows = np.random.default_rng(0).integers(len(foretold), size=(2000, len(foretold)))
    ratios = foretold[rows].mean(1) / measured[rows].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(foretold.mean() / measured.mean()), float(low), float(high)


def explanation(
    statistics: Mapping[str, np.ndarray],
    landscapes: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
    found: Mapping[str, Mapping[str, np.ndarray]],
    losses: Mapping[str, Mapping[int, np.ndarray]],
    control: Mapping[float, Mapping[str, np.ndarray]],
    smooth: Mapping[str, np.ndarray],
    config: Config,
) -> str:
    """Markdown: which of the possible reasons the numbers support, or that they do not decide."""
    weight = config.guidance_weight
    return "\n\n".join(
        [
            _direction_line(statistics),
            _noise_line(statistics, losses),
            _landscape_line(landscapes),
            _slope_line(found, statistics),
            _smooth_line(smooth, control.get(weight)),
            _sign_line(control),
        ]
    )


def _direction_line(statistics: Mapping[str, np.ndarray]) -> str:
    cosine, ratio = (np.median(statistics[name]) for name in ("cosine", "ratio"))
    share = np.median(statistics["second_order"].max(0))
    return (
        f"**Two gradients that look alike.** At images attacked already their cosine is {cosine:.3f} "
        f"(median), the exact one has {ratio:.2f} times the length of the other; the second-order term makes "
        f"up {share:.0%} of a step's vector-Jacobian product (median over images, of the largest step)."
    )


def _noise_line(statistics: Mapping[str, np.ndarray], losses: Mapping[str, Mapping[int, np.ndarray]]) -> str:
    exact, first = (float(np.median(statistics[f"snr_{kind}"])) for kind in KINDS)
    most = max(losses["exact"])
    low, high = student(losses["first_order"][most] - losses["exact"][most])
    gap = float((losses["first_order"][most] - losses["exact"][most]).mean())
    if low > 0:
        verdict = "so the exact gradient does not catch up as noise is averaged out: noise is not the reason"
    elif high < 0:
        verdict = "so the exact gradient catches up and overtakes: with few draws, noise was the reason"
    else:
        verdict = "an interval with zero inside: this comparison does not decide about noise"
    return (
        f"**Is it noise?** One draw's signal-to-noise ratio is {exact:.2f} for the exact gradient and "
        f"{first:.2f} for the first-order one (median). With {most} draws per gradient, first-order APGD "
        f"ends at a mean loss that differs by {gap:+.3f} [{low:+.3f}, {high:+.3f}] (paired), {verdict}."
    )


def _landscape_line(landscapes: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> str:
    lines = []
    for (case, start), losses in landscapes.items():
        gain = (losses["first_order"] - losses["exact"])[1:].mean(0)
        low, high = student(gain)
        word = "more" if low > 0 else "less" if high < 0 else "neither more nor less"
        numbers = f"{gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"{CASES[case]}, from the {_START[start]} image, {word} ({numbers})")
    return (
        "**Is it the landscape?** On the very draws that both directions were computed from, and averaged "
        "over step sizes up to eps, a step along the first-order direction raises the mean loss, compared "
        f"with one along the exact direction: {'; '.join(lines)}."
    )


_START = {"clean": "clean", "reverse": "attacked"}


def _slope_line(found: Mapping[str, Mapping[str, np.ndarray]], statistics: Mapping[str, np.ndarray]) -> str:
    ratios = {case: {kind: ratio_of(result, kind) for kind in KINDS} for case, result in found.items()}

    def text(case: str, kind: str) -> str:
        value, low, high = ratios[case][kind]
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    listed = "; ".join(f"{CASES[case]} {text(case, 'exact')}" for case in found)
    coup, flipped, smooth = (ratios[case]["exact"] for case in ("coup", "flipped", "smooth"))
    wrong = coup[2] < 1 and flipped[1] > 1
    mended = abs(smooth[0] - 1) < min(abs(coup[0] - 1), abs(flipped[0] - 1))
    closer = all(
        abs(ratios[case]["first_order"][0] - 1) < abs(ratios[case]["exact"][0] - 1)
        for case in ("coup", "flipped")
    )
    text_ = (
        f"**Does the gradient foretell the slope?** Slope by the exact gradient over the slope that the mean "
        f"loss really has (finite differences, same draws): {listed}. By the first-order gradient: COUP "
        f"{text('coup', 'first_order')}, sign flipped {text('flipped', 'first_order')}."
    )
    if wrong and mended and closer:
        return text_ + (
            " The numbers support this reason. COUP's guidance is the gradient of log max p: it **jumps** "
            "where the classifier changes its mind, as it does on "
            f"{statistics['switched'].mean():.0%} of the paths. "
            "Between the jumps log max p is concave, so the second-order term damps (flipped: magnifies) "
            "just the directions that lead to another class; the jump at the boundary gives it back, but no "
            "derivative of a path ever sees a jump, with however many draws: the mean of the gradients is "
            "not the gradient of the mean. The first-order gradient leaves out both, and they nearly cancel. "
            "Without guidance, or with a maximum that has no kink, the exact gradient tells the truth."
        )
    return text_ + (
        " That would be explained by the jump of ∇ log max p where the classifier changes its mind, which no "
        "derivative of a path sees; here the numbers do not decide whether it is the reason."
    )


def _smooth_line(smooth: Mapping[str, np.ndarray], coup: Mapping[str, np.ndarray] | None) -> str:
    gap = Difference.of(smooth["exact"], smooth["first_order"])
    text = (
        f"**The control without a kink.** Guided by a smoothed maximum, COUP keeps "
        f"{Accuracy.of(smooth['exact'])} under the exact attack and {Accuracy.of(smooth['first_order'])} "
        f"under the first-order one (exact − first-order: {gap})"
    )
    if coup is not None:
        own = Difference.of(coup["exact"], coup["first_order"])
        text += f"; with its own guidance the same difference is {own}"
    return text + "."


def _sign_line(control: Mapping[float, Mapping[str, np.ndarray]]) -> str:
    base = control[0.0]
    lines = []
    for weight, row in control.items():
        if weight:
            changes = {name: Difference.of(row[name], base[name]) for name in ("exact", "worst")}
            lines.append(f"- λ = {weight:g}: exact {changes['exact']}, worst of all {changes['worst']}")
    verdicts = {
        name: {w: Difference.of(row[name], base[name]).verdict for w, row in control.items() if w}
        for name in ("exact", "worst")
    }
    raised = [w for w, verdict in verdicts["exact"].items() if w < 0 and verdict == "holds"]
    kept = [w for w, verdict in verdicts["worst"].items() if verdict == "holds"]
    lost = [w for w, verdict in verdicts["worst"].items() if verdict == "does not hold"]
    seen = (
        f"With the sign flipped the exact attack leaves more for λ = {_listed(raised)}: not what information "
        "preservation would do, but what a misled attack would."
        if raised
        else "With the sign flipped the exact attack leaves no more than chance explains."
    )
    survives = (
        f"Under the worst of all sources a gain over λ = 0 is left for λ = {_listed(kept)}."
        if kept
        else "Under the worst of all sources no λ has a gain over λ = 0 that its interval confirms."
    )
    if lost:
        survives += f" A loss is confirmed for λ = {_listed(lost)}."
    head = "**The control with the sign flipped.** Change of robustness against λ = 0:"
    return "\n".join([head, "", *lines, "", f"{seen} {survives}"])


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


# --- Figure -----------------------------------------------------------------------------------------------


def sign_panel(
    axes: Axes, control: Mapping[float, Mapping[str, np.ndarray]], smooth: Mapping[str, np.ndarray], at: float
) -> None:
    """Paired change of accuracy against λ = 0, per attack, with 95 % intervals; hollow: smoothed maximum."""
    weights = np.array(list(control))
    for place, kind in enumerate((*KINDS, "worst")):
        base, offset = control[0.0][kind], 0.07 * (place - 1)
        changes = [Difference.of(row[kind], base) for row in control.values()]
        bounds = np.array([[c.value - c.low, c.high - c.value] for c in changes]).T
        style = {"color": KIND_COLOURS[kind], "markersize": 4, "capsize": 1.8, "linewidth": 1.1}
        axes.errorbar(
            weights + offset,
            [change.value for change in changes],
            bounds * (weights != 0),  # λ = 0 is no estimate: the others are compared with it
            fmt=KIND_MARKERS[kind] + "-",
            label=KIND_LABELS[kind],
            **style,
        )
        axes.plot(
            at + offset,
            Difference.of(smooth[kind], base).value,
            KIND_MARKERS[kind],
            color=KIND_COLOURS[kind],
            markerfacecolor="white",
            markersize=5.5,
            zorder=5,
        )
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="guidance weight λ", ylabel="change against λ = 0 (points)")


def alike_panel(axes: Axes, statistics: Mapping[str, np.ndarray]) -> None:
    """Each image's cosine of the two gradients against the ratio of their lengths."""
    axes.plot(statistics["ratio"], statistics["cosine"], "o", color=PALETTE[4], markersize=3.5, alpha=0.7)
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="length, exact / first-order", ylabel="cosine, exact · first-order")


def second_order_panel(axes: Axes, statistics: Mapping[str, np.ndarray], t_star: float) -> None:
    """Size of the second-order term along the path: median, and 5–95 % of the images."""
    shares = 100 * statistics["second_order"]
    times = t_star * (1 - np.arange(len(shares)) / len(shares))
    low, middle, high = np.quantile(shares, [0.05, 0.5, 0.95], axis=1)
    axes.fill_between(times, low, high, color=PALETTE[4], alpha=0.15, linewidth=0)
    axes.plot(times, middle, "o-", color=PALETTE[4], markersize=4)
    axes.set(xlabel="time t of the step", ylabel="second-order part (%)", ylim=(0, None))
    axes.invert_xaxis()


def noise_panel(axes: Axes, statistics: Mapping[str, np.ndarray]) -> None:
    """Signal-to-noise ratio of a single draw, first-order against exact, one point per image."""
    exact, first = (statistics[f"snr_{kind}"] for kind in KINDS)
    top = 1.05 * max(exact.max(), first.max())
    axes.plot((0, top), (0, top), color="0.6", linewidth=0.8, zorder=0)
    axes.plot(exact, first, "o", color=PALETTE[4], markersize=3.5, alpha=0.7)
    axes.set(xlabel="signal to noise, exact", ylabel="signal to noise, first-order")


def reached_panel(axes: Axes, losses: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    """Paired gain of first-order over exact APGD in the loss reached, per draws of a gradient, with 95 %."""
    counts = list(losses["exact"])
    gains = np.stack([losses["first_order"][count] - losses["exact"][count] for count in counts])
    means = gains.mean(1)
    low, high = student(gains)
    style = {"color": PALETTE[2], "markersize": 4, "capsize": 1.8}
    axes.errorbar(counts, means, [means - low, high - means], fmt="D-", **style)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="noise draws per gradient", ylabel="loss reached, first-order − exact")


def landscape_panel(axes: Axes, landscapes: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Paired gain of first-order over exact direction in mean loss, per case, with 95 % intervals."""
    styles = {"coup": ("D-", PALETTE[2]), "flipped": ("v-", PALETTE[1])}
    for case, losses in landscapes.items():
        gain = losses["first_order"] - losses["exact"]
        style, colour = styles[case]
        axes.fill_between(LANDSCAPE, *student(gain), color=colour, alpha=0.15, linewidth=0)
        axes.plot(LANDSCAPE, gain.mean(1), style, color=colour, markersize=4, label=CASES[case])
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="step along the direction (eps)", ylabel="loss, first-order − exact")


def slope_panel(axes: Axes, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Foretold over measured slope for every case and kind, with 95 % intervals; 1 is the truth."""
    for offset, kind in zip((-0.12, 0.12), KINDS, strict=True):
        points = np.array([ratio_of(result, kind) for result in found.values()])
        axes.errorbar(
            points[:, 0],
            np.arange(len(found)) + offset,
            xerr=np.abs(points[:, 1:] - points[:, :1]).T,
            fmt=KIND_MARKERS[kind],
            color=KIND_COLOURS[kind],
            label=KIND_LABELS[kind],
            markersize=4.5,
            capsize=1.8,
            linewidth=1.1,
        )
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(found)), [CASES[case].replace(", ", ",\n") for case in found])
    axes.set(xlabel="slope foretold / measured", ylim=(len(found) - 0.5, -0.5))
    if 0 < axes.dataLim.x0 < axes.dataLim.x1 / 5:
        axes.set_xscale("log")
    axes.grid(visible=False, axis="y")


def mechanism_figure(
    control: Mapping[float, Mapping[str, np.ndarray]],
    smooth: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray],
    losses: Mapping[str, Mapping[int, np.ndarray]],
    landscapes: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
    found: Mapping[str, Mapping[str, np.ndarray]],
    config: Config,
) -> Figure:
    """Eight panels, (a) to (h); the arguments are what the functions above return."""
    figure, grid = plt.subplots(2, 4, figsize=(14, 6.6))
    panels = list(grid.flat)
    sign_panel(panels[0], control, smooth, config.guidance_weight)
    alike_panel(panels[1], statistics)
    second_order_panel(panels[2], statistics, config.t_star)
    noise_panel(panels[3], statistics)
    reached_panel(panels[4], losses)
    for axes, start in zip(panels[5:7], _START, strict=True):
        landscape_panel(axes, {case: row for (case, place), row in landscapes.items() if place == start})
    slope_panel(panels[7], found)
    titles = (
        "robustness against λ",
        "gradients alike",
        "second-order term",
        "noise of one draw",
        "averaging more draws",
        "steps from the clean image",
        "steps from the attacked image",
        "the slope foretold",
    )
    for letter, axes, title in zip("abcdefgh", panels, titles, strict=True):
        axes.set_title(f"({letter}) {title}", loc="left", fontsize="medium")
    panels[0].legend(loc="best", fontsize="small", title="hollow: smooth", title_fontsize="small")
    panels[6].legend(loc="best", fontsize="small")
    panels[7].legend(loc="best", fontsize="small")
    return figure
