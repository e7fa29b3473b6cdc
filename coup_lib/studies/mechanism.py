"""Why attacks that leave COUP's second-order term out are the stronger ones (notebook 07).

Everything here looks at the mean cross-entropy over noise draws, L(x), and at two gradients of it: the exact
one, E[∇ℓ] with the guidance differentiated, and the first-order one, with the guidance held constant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from coup_lib.ascent import in_parts, project, steepest
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.noise import image_seeds
from coup_lib.evaluation.outcomes import Accuracy, Difference, worst_of
from coup_lib.evaluation.progress import Plan
from coup_lib.evaluation.protocol import Evaluation, Experiment, Measurement
from coup_lib.evaluation.records import ChunkedRecord, Worker, is_complete
from coup_lib.evaluation.specs import CLEAN, AttackSpec
from coup_lib.evaluation.stats import Estimate, student
from coup_lib.purify import Purified, images_per_call
from coup_lib.reporting.plots import PALETTE, band, estimates, titles
from coup_lib.reporting.tables import MISSING

KINDS = ("exact", "first_order")
NAMES = {"exact": "exact", "first_order": "first-order"}
CASES = {  # the cases of `slopes`
    "reverse": "no guidance",
    "coup": "COUP",
    "flipped": "COUP, sign flipped",
    "smooth": "COUP, smoothed max",
}
WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # λ of the control with the sign flipped
EOT_FACTORS = (0.05, 0.25, 1.0, 3.2)  # of the configured draws: 1, 5, 20, 64 at the full size
DRAWS = 64  # behind a mean gradient
SLOPE_DRAWS = 32
LANDSCAPE_DRAWS = 16
LANDSCAPE = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # distances, in units of eps
DIFFERENCES = (0.05, 0.1, 0.2)  # half-widths of the finite differences, in units of eps
FIT, FRESH = 4, 5  # streams of the seed beside those of `evaluate`
BATCH_PIXELS = 2**16  # in one network call, images times positions

Arrays = Mapping[str, np.ndarray]

# --- What is measured -------------------------------------------------------------------------------------


def halved(config: Config) -> Config:
    """Half of the iterations, for the series of attacks: their curves matter, not their last half point."""
    return replace(config, n_iter=max(1, config.n_iter // 2))


def eot_counts(config: Config) -> tuple[int, ...]:
    """The numbers of noise draws per gradient that are compared, ascending; the third is the config's own."""
    return tuple(sorted({max(1, round(factor * config.eot)) for factor in EOT_FACTORS}))


@dataclass(frozen=True)
class Mechanism:
    """All measurements: what the functions of these names return, by case the landscapes and the slopes."""

    controls: Mapping[float | str, Arrays]
    reached: Mapping[str, Mapping[int, np.ndarray]]
    landscapes: Mapping[str, Arrays]
    slopes: Mapping[str, Arrays]


def measure(config: Config) -> Mechanism:
    """All measurements, from their records where there are any."""
    flipped = replace(config, guidance_weight=-config.guidance_weight)
    return Mechanism(
        controls(config),
        reached(config),
        {case: landscape(one, "coup", "reverse") for case, one in (("coup", config), ("flipped", flipped))},
        {case: slopes(config, case) for case in CASES},
    )


def controls(config: Config) -> dict[float | str, Arrays]:
    """Control → "exact", "first_order", "worst" → share of right draws, (n,), of a purifier.

    A control is a λ of COUP, or "smooth" for COUP at the config's λ, guided by the smoothed maximum. λ = 0 is
    the reverse SDE. "worst" is the worst case per image, over both gradients, BPDA and the transfers from
    none, reverse and DiffPure. The attacks have half the iterations.
    """
    found: dict[float | str, Arrays] = {}
    for name, experiment in control_experiments(config).items():
        (scores,) = experiment.predictions().values()
        worst = worst_of([*scores.values()])
        found[name] = {kind: scores[kind].right for kind in KINDS} | {"worst": worst}
    return found


def control_experiments(config: Config) -> dict[float | str, Experiment]:
    """Control → what `controls` attacks for it."""
    targets: dict[float | str, str] = {weight: "coup" if weight else "reverse" for weight in WEIGHTS}
    found: dict[float | str, Experiment] = {}
    for name, target in (targets | {"smooth": "smooth-max"}).items():
        row = {"clean": CLEAN}
        row |= {kind: against("apgd-ce", target, kind) for kind in (*KINDS, "bpda")}
        row |= {f"from_{other}": against("apgd-ce", other) for other in ("none", "reverse", "diffpure")}
        weight = name if target == "coup" else config.guidance_weight
        found[name] = Experiment(replace(halved(config), guidance_weight=weight), {target: row})
    return found


def landscape(
    config: Config, target: str, start: str, draws: int = LANDSCAPE_DRAWS, kinds: Sequence[str] = KINDS
) -> dict[str, np.ndarray]:
    """The mean loss (S, n) at the `LANDSCAPE` distances along the direction of each kind of mean gradient.

    The direction is that of an attack's step (the sign for Linf, the unit vector for L2), and so is the
    projection. Directions and losses share their noise draws: for these draws no direction rises more
    steeply at the start than the exact gradient's.

    Args:
        start: "clean", or "reverse" for the images that APGD-ce made against the reverse SDE.
    """
    evaluation = Evaluation(config, verbose=False)

    def compute(places: range) -> dict[str, Tensor]:
        x, y = evaluation.images.x[places], evaluation.images.y[places]
        begin = x if start == "clean" else _attacked(evaluation)[places]
        seeds, model = image_seeds(config.seed, FIT, places, draws), evaluation.bench.defence(target)
        found = {}
        for kind in kinds:
            gradient = draw_gradients(evaluation.bench.defence(target, kind), begin, y, seeds).mean(1)
            direction = config.eps * steepest(gradient, config.norm)
            images = [project(begin + s * direction, x, config.norm_label, config.eps) for s in LANDSCAPE]
            found[kind] = torch.stack([draw_losses(model, image, y, seeds).mean(1) for image in images])
        return found

    settings: dict[str, Any] = {"start": start, "distances": list(LANDSCAPE), "kinds": list(kinds)}
    return _record(evaluation, "landscape", compute, draws=draws, target=target, **settings)


def slopes(config: Config, case: str, draws: int = SLOPE_DRAWS) -> dict[str, np.ndarray]:
    """The slope that a gradient predicts, and the slope of the mean loss, at half of the images, attacked.

    For each kind, along its own direction d (per unit of its length): "foretold_<kind>" (n,), the predicted
    slope, which is the product of the mean gradient with d, and "measured_<kind>" (S, n), central differences
    of the mean loss over the same draws at the `DIFFERENCES`. If each path's loss is smooth the two agree.

    Args:
        case: "reverse" (no guidance), "coup", "flipped" (−λ) or "smooth" (`guidance.SmoothMax`).
    """
    weight = config.guidance_weight * (-1 if case == "flipped" else 1)
    evaluation = Evaluation(replace(config, guidance_weight=weight), verbose=False)
    target = {"reverse": "reverse", "smooth": "smooth-max"}.get(case, "coup")

    def compute(places: range) -> dict[str, Tensor]:
        x, y = _attacked(evaluation)[places], evaluation.images.y[places]
        seeds, found = image_seeds(config.seed, FIT, places, draws), {}
        model = cast(Purified, evaluation.bench.defence(target))
        model.purifier.margin = config.eps  # differences on either side of an image on the edge
        for kind in KINDS:
            gradient = draw_gradients(evaluation.bench.defence(target, kind), x, y, seeds).mean(1)
            direction, steps = steepest(gradient, config.norm), [s * config.eps for s in DIFFERENCES]
            found[f"foretold_{kind}"] = (gradient * direction).flatten(1).sum(1)
            differences = [central_difference(model, x, y, seeds, step * direction) / step for step in steps]
            found[f"measured_{kind}"] = torch.stack(differences)
        return found

    half = max(2, config.n_images // 2)
    settings: dict[str, Any] = {"differences": list(DIFFERENCES)}
    return _record(evaluation, "slopes", compute, draws=draws, target=target, n_images=half, **settings)


def reached(config: Config) -> dict[str, dict[int, np.ndarray]]:
    """kind → EOT draws → mean loss (n,) on fresh noise, of COUP at the images APGD-ce made with that kind.

    Half of the iterations; `eot_counts` draws per gradient.
    """
    experiment = reached_experiment(config)
    experiment.predictions()
    evaluation = Evaluation(experiment.config, verbose=False)

    def compute(spec: AttackSpec, places: range) -> dict[str, Tensor]:
        seeds = image_seeds(config.seed, FRESH, places, DRAWS)
        x, y = evaluation.x_adv(spec)[places], evaluation.images.y[places]
        return {"loss": draw_losses(evaluation.bench.defence("coup"), x, y, seeds).mean(1)}

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
    return [*control_experiments(config).values(), reached_experiment(config)]


def measurements(config: Config) -> list[Measurement]:
    """What is no attack here; the slopes are taken at half of the images."""
    kinds, n = len(KINDS), config.n_images
    landscapes = kinds * LANDSCAPE_DRAWS, kinds * len(LANDSCAPE) * LANDSCAPE_DRAWS
    slope = kinds * SLOPE_DRAWS, kinds * 2 * len(DIFFERENCES) * SLOPE_DRAWS
    return [
        *[Measurement(config, "coup", landscapes, n)] * 2,  # with guidance of either sign
        *[Measurement(config, "coup", slope, max(2, n // 2))] * len(CASES),
        *[Measurement(config, "coup", (0, DRAWS), n)] * kinds * len(eot_counts(config)),
    ]


# --- The tools --------------------------------------------------------------------------------------------


def draw_gradients(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
    """∇ₓ of the cross-entropy for each noise draw: (n, draws, C, H, W) for seeds (n, draws)."""

    def gradient(images: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        images = images.clone().requires_grad_()
        return torch.autograd.grad(_losses(model, images, labels, chosen).sum(), images)

    (found,) = in_parts(gradient, images_per_call(model, x, _at_once(x)), *_per_draw(x, y, seeds))
    return found.reshape(*seeds.shape, *x.shape[1:])


@torch.no_grad()
def draw_losses(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
    """The cross-entropy for each noise draw: (n, draws) for seeds (n, draws)."""
    (found,) = in_parts(lambda *part: (_losses(model, *part),), _at_once(x), *_per_draw(x, y, seeds))
    return found.reshape(seeds.shape)


def _losses(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
    logits = model(x, seeds=seeds) if isinstance(model, Purified) else model(x)
    return F.cross_entropy(logits, y, reduction="none")


def central_difference(model: nn.Module, x: Tensor, y: Tensor, seeds: Tensor, shift: Tensor) -> Tensor:
    """Half of the mean loss at x + shift minus that at x − shift, (n,): slope times length."""
    ahead, behind = (draw_losses(model, x + side * shift, y, seeds).mean(1) for side in (1, -1))
    return (ahead - behind) / 2


def _per_draw(x: Tensor, y: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and seeds, one entry per image and draw."""
    draws = seeds.shape[1]
    return x.repeat_interleave(draws, 0), y.repeat_interleave(draws), seeds.flatten()


def _at_once(x: Tensor) -> int:
    """How many images like those of x (n, C, H, W) go through the networks at once."""
    return max(1, BATCH_PIXELS // x[0, 0].numel())


def _attacked(evaluation: Evaluation) -> Tensor:
    return evaluation.x_adv(against("apgd-ce", "reverse"))


def _record(
    evaluation: Evaluation,
    name: str,
    compute: Callable[[range], dict[str, Tensor]],
    *,
    draws: int,
    target: str = "coup",
    attack: AttackSpec | None = None,
    n_images: int | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Arrays (…, n) of the first n_images (all), made of the tensors that `compute` gives for some of them.

    As many at a time as fill a batch with their draws: that much is lost by a kill, and processes share the
    rest. The record is named by these settings, the images', the defence's and those of an attack of its own.
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
        lambda places: {key: found.cpu().numpy() for key, found in compute(places).items()},
        lambda parts: {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]},
        Worker(config.shard, config.num_shards),
    )
    plan = Plan([0.0 if is_complete(work.path) else 1.0], verbose=True)
    plan.start(f"{name}, {target}")
    return work.finish(plan.advance)["arrays"]


# --- What the numbers say ---------------------------------------------------------------------------------


def predicted_over_measured(slope: Arrays, kind: str) -> Estimate:
    """Predicted over measured slope: of means over images and distances, with a bootstrap interval."""
    predicted, measured = slope[f"foretold_{kind}"], slope[f"measured_{kind}"].mean(0)
    rows = np.random.default_rng(0).integers(len(predicted), size=(2000, len(predicted)))
    ratios = predicted[rows].mean(-1) / measured[rows].mean(-1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(predicted.mean() / measured.mean()), float(low), float(high))


def _mean(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), *map(float, student(values)))


def _side(found: Any, reference: float | None) -> str:
    """On which side of the reference an interval lies."""
    if reference is None:
        return MISSING
    side = "above" if found.low > reference else "below" if found.high < reference else "includes"
    return f"{side} {reference:g}"


def findings(found: Mechanism) -> pd.DataFrame:
    """Each measured quantity with its 95 % interval, and what the interval says of no difference.

    Ratios have bootstrap intervals and mean losses Student's; accuracies and their differences have
    `stats.mean_interval`'s. "No difference" is a ratio of 1, and a difference of 0.
    """
    controls, draws = found.controls, max(found.reached["exact"])
    plain: dict[str, Any] = {
        f"Accuracy (%) of COUP, smoothed max, {label} attack": Accuracy.of(controls["smooth"][kind])
        for kind, label in NAMES.items()
    }
    ratios = {
        f"Predicted over measured slope, {CASES[case]}, {NAMES[kind]}": predicted_over_measured(slope, kind)
        for (case, slope), kind in product(found.slopes.items(), KINDS)
    }

    gain = found.reached["first_order"][draws] - found.reached["exact"][draws]
    differences: dict[str, Any] = {f"First-order − exact: loss reached, {draws} draws": _mean(gain)}
    for case, losses in found.landscapes.items():
        gain = losses["first_order"][1:].mean(0) - losses["exact"][1:].mean(0)
        differences[f"First-order − exact: loss along the direction, {CASES[case]}"] = _mean(gain)
    for name, row in controls.items():
        label = "smoothed max" if name == "smooth" else f"λ = {name:g}"
        gap = Difference.of(row["exact"], row["first_order"])
        differences[f"Exact − first-order attack: accuracy (points), {label}"] = gap
        for kind, attack in (("exact", "exact attack"), ("worst", "worst case over attacks, per image")):
            if name not in (0.0, "smooth"):
                change = Difference.of(row[kind], controls[0.0][kind])
                differences[f"{label} against λ = 0: accuracy (points), {attack}"] = change
    lines = [
        [quantity, f"{one.value:.3f}", f"[{one.low:.3f}, {one.high:.3f}]", _side(one, reference)]
        for reference, group in ((None, plain), (1, ratios), (0, differences))
        for quantity, one in group.items()
    ]
    columns = ["Quantity", "Value", "95 % interval", "What the interval says"]
    return pd.DataFrame(lines, columns=columns).set_index("Quantity")


def verdict(slopes: Mapping[str, Arrays]) -> str:
    """Markdown: whether the jumps of ∇ log max p mislead the exact gradient, by the slopes.

    It holds if the exact gradient predicts too small a slope for COUP and too large a one with the sign
    flipped, both by their intervals, if the smoothed maximum brings the ratio closer to 1 than either, and if
    the first-order gradient is closer in both cases. It does not hold if an interval contradicts a direction.
    """
    exact, first = (
        {case: predicted_over_measured(slope, kind) for case, slope in slopes.items()} for kind in KINDS
    )
    error, error_first = ({case: abs(one.value - 1) for case, one in row.items()} for row in (exact, first))
    closer = all(max(error["smooth"], error_first[case]) < error[case] for case in ("coup", "flipped"))
    said = "is not decided"
    if exact["coup"].low > 1 or exact["flipped"].high < 1:
        said = "does not hold"
    elif exact["coup"].high < 1 < exact["flipped"].low and closer:
        said = "holds"
    return f"That the jumps of ∇ log max p mislead the exact gradient **{said}**."


# --- Figure -----------------------------------------------------------------------------------------------

LOOKS: dict[str, Any] = {  # of the kinds of gradients, and of the worst case over attacks
    "exact": {"label": NAMES["exact"], "color": PALETTE[3], "marker": "o"},
    "first_order": {"label": NAMES["first_order"], "color": PALETTE[0], "marker": "s"},
    "worst": {"label": "worst case", "color": "black", "marker": "D"},
}
SMALL: dict[str, Any] = {"markersize": 4, "capsize": 1.8}
REFERENCE: dict[str, Any] = {"color": "0.6", "linewidth": 0.8, "zorder": 0}


def sign_panel(axes: Axes, controls: Mapping[float | str, Arrays], at: float) -> None:
    """Paired change of accuracy against λ = 0, per attack, with 95 % intervals; hollow: smoothed maximum.

    at: the λ of the smoothed maximum.
    """
    weights = [name for name in controls if not isinstance(name, str)]
    for offset, (kind, look) in zip((-0.07, 0, 0.07), LOOKS.items(), strict=True):
        base = controls[0.0][kind]
        changes = [  # λ = 0 is no estimate: the others are compared with it
            Difference.of(controls[weight][kind], base) if weight else Estimate(0, 0, 0) for weight in weights
        ]
        estimates(axes, np.array(weights) + offset, changes, **look | SMALL)
        smooth = Difference.of(controls["smooth"][kind], base).value
        hollow = {"label": "_", "markerfacecolor": "white", "markersize": 5.5, "zorder": 5}
        axes.plot(at + offset, smooth, **look | hollow)
    axes.axhline(0, **REFERENCE)
    axes.set(xlabel="guidance weight λ", ylabel="change against λ = 0 (points)")


def loss_panels(attacks: Axes, steps: Axes, found: Mechanism) -> None:
    """Paired gain in loss of first-order over exact, with 95 %: by attacks, and by steps."""
    exact, first = (found.reached[kind] for kind in KINDS)
    gains = [_mean(first[count] - exact[count]) for count in exact]
    estimates(attacks, [*exact], gains, fmt="D-", color=PALETTE[2], **SMALL)
    attacks.set_xscale("log")
    attacks.set_xticks([*exact], [str(count) for count in exact])
    attacks.minorticks_off()
    attacks.set(xlabel="noise draws per gradient", ylabel="loss reached, first-order − exact")

    styles = {"coup": ("D-", PALETTE[2]), "flipped": ("v-", PALETTE[1])}
    for case, losses in found.landscapes.items():
        gain = losses["first_order"] - losses["exact"]
        band(steps, LANDSCAPE, gain.mean(1), student(gain), *styles[case], label=CASES[case])
    steps.set(xlabel="step along the direction (eps)", ylabel="loss, first-order − exact")
    for axes in (attacks, steps):
        axes.axhline(0, **REFERENCE)


def slope_panel(axes: Axes, slopes: Mapping[str, Arrays]) -> None:
    """Predicted over measured slope for every case and kind, with 95 % intervals; 1 is the truth."""
    for offset, kind in zip((-0.12, 0.12), KINDS, strict=True):
        ratios = [predicted_over_measured(slope, kind) for slope in slopes.values()]
        look = LOOKS[kind] | SMALL | {"markersize": 4.5, "linestyle": "none"}
        estimates(axes, np.arange(len(slopes)) + offset, ratios, sideways=True, **look)
    axes.axvline(1, **REFERENCE)
    axes.set_yticks(range(len(slopes)), [CASES[case].replace(", ", ",\n") for case in slopes])
    axes.set(xlabel="slope predicted / measured", ylim=(len(slopes) - 0.5, -0.5))
    if 0 < axes.dataLim.x0 < axes.dataLim.x1 / 5:
        axes.set_xscale("log")
    axes.grid(visible=False, axis="y")


def mechanism_figure(found: Mechanism, config: Config) -> Figure:
    """Four panels, (a) to (d), of what was measured for the config."""
    figure, panels = plt.subplots(2, 2, figsize=(8.5, 6.6))
    (signs, attacks), (steps, slope) = panels
    sign_panel(signs, found.controls, config.guidance_weight)
    loss_panels(attacks, steps, found)
    slope_panel(slope, found.slopes)
    n, half = config.n_images, len(found.slopes["coup"]["foretold_exact"])
    shown = f"robustness against λ, n = {n}", "averaging more draws", "steps from the attacked image"
    titles(panels.flat, (*shown, f"the predicted slope, n = {half}"))
    steps.legend(loc="best", fontsize="small")
    names = signs.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=3, title="(a), (d); hollow: smoothed max")
    return figure
