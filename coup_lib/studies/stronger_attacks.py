"""Every attack the field has thought of, and its sanity checks (notebook 07)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coup_lib.ascent import largest_radius
from coup_lib.auditing.signs import Sign, compared
from coup_lib.data import SHAPES
from coup_lib.defences import LABELS, PAPER
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config, radius
from coup_lib.evaluation.noise import DECIDE, image_seeds
from coup_lib.evaluation.outcomes import (
    RULES,
    Predictions,
    Transfer,
    WorstCase,
    direct,
    right_draws,
    transferred,
    worst_case,
    worst_of,
)
from coup_lib.evaluation.protocol import Evaluation, Experiment
from coup_lib.evaluation.records import Missing, reading_only
from coup_lib.evaluation.run import classes_of, predict
from coup_lib.evaluation.specs import AttackSpec, with_transfers
from coup_lib.evaluation.stats import student
from coup_lib.outside import TRIED
from coup_lib.reporting import tables
from coup_lib.reporting.plots import COLOURS, MARKERS, band, points, robustness_panel, titles
from coup_lib.reporting.tables import PerImage, Row
from coup_lib.studies.mechanism import LANDSCAPE, eot_counts, halved, landscape

Sources = dict[str, tuple[str, AttackSpec | None]]  # name → (label, source)
Columns = dict[str, dict[Any, Predictions]]  # defence → name of a source, or `Transfer` → score

PGD_FACTOR = 4  # PGD takes this many times APGD's iterations: 200 at the full size
EPS_FACTORS = {"linf": (0.5, 1.0, 2.0, 4.0), "l2": (0.5, 1.0, 2.0, 4.0, 8.0)}

# What is tried on the other defences, too: what spent the whole number of iterations, and other losses.
TRANSFERRED = (
    *("exact", "first_order", "restart", "dlr", "margin", "pgd", "pgd_first_order"),
    *("kept", "kept_first_order", "em", "em_first_order"),
)
# What does not suit an undefended classifier, which has one gradient and no noise.
FOR_PURIFIERS = (
    *("first_order", "adjoint", "bpda", "coarse", "eot", "pgd_first_order", "warm", "fixed"),
    *("kept", "em", "low_first_order", "per_step"),
)
# What each attack on these columns counted itself: images that no draw at any point got wrong.
COUNTED = {"kept": "any_draw", "kept_first_order": "any_draw_first_order"}
DECIDED = ("first_order", "per_step_first_order")  # on whose images many draws decide; PGD takes too long
MANY = 128  # draws that decide together, as in DiffBreak


def attacks(config: Config, target: str) -> Sources:
    """Name → (label, source) of everything that a defence faces; what sees less of the defence comes last.

    Exact, first-order, the restart, the fixed noise, what all draws keep and what EM selects take all of the
    configuration's iterations, PGD takes `PGD_FACTOR` times as many, the rest half: the convergence check
    shows what that half is worth. "worst-draw" leaves the images that "kept" leaves, and counts besides.
    Shorter runs of the exact attack have no label. Labels without a source belong to what
    `per_image_accuracy` adds.
    """
    found = _by_gradients(config, target) | _by_surrogates(config, target)
    return found | {
        "transferred": ("the others' attacks, all of them", None),
        "square": ("Square (black box)", against("square", target)),
        "fgsm": ("FGSM (one step)", against("fgsm", target)),
        "noise": ("random noise", against("noise", "none")),
        "clean": ("clean images", against("clean", "none")),
        "recorded": (tables.COLUMNS["recorded"], None),
    }


def _by_gradients(config: Config, target: str) -> Sources:
    """What climbs by the gradients of the target: of all losses, with more or fewer draws and steps."""
    half, quarter, counts = halved(config).n_iter, max(1, config.n_iter // 4), eot_counts(config)
    many, most, coarse = PGD_FACTOR * config.n_iter, counts[-1], max(1, config.n_steps // 2)
    looks = draws_looked_at(config)

    def apgd(gradient: str = "exact", loss: str = "ce", **more: Any) -> AttackSpec:
        return against(f"apgd-{loss}", target, gradient, **more)

    found: Sources = {
        "exact": ("APGD-ce, exact (paper's protocol)", apgd()),
        "quarter": ("", apgd(n_iter=quarter)),
        "short": ("", apgd(n_iter=half)),
        "first_order": ("APGD-ce, first-order", apgd("first_order")),
        "adjoint": ("APGD-ce, adjoint", apgd("adjoint", n_iter=half)),
        "bpda": ("APGD-ce, BPDA", apgd("bpda", n_iter=half)),
        "coarse": ("APGD-ce through half of the steps", apgd(n_iter=half, n_steps=coarse)),
        "restart": ("APGD-ce, exact, another seed", apgd(seed=config.seed + 1)),
    }
    for place, eot in enumerate(counts, start=1):
        found[f"eot_{place}"] = f"APGD-ce, exact, EOT {eot}", apgd(n_iter=half, eot=eot)
    found |= {
        "eot_first_order": (f"APGD-ce, first-order, EOT {most}", apgd("first_order", n_iter=half, eot=most)),
        "dlr": ("APGD-dlr, exact", apgd(loss="dlr", n_iter=half)),
        "margin": ("APGD-margin, exact", apgd(loss="margin", n_iter=half)),
        "pgd": (f"PGD-{many}, exact", against("pgd", target, n_iter=many)),
        "pgd_first_order": (f"PGD-{many}, first-order", against("pgd", target, "first_order", n_iter=many)),
    }
    for suffix, gradient in (("", "exact"), ("_first_order", "first_order")):
        name = gradient.replace("_", "-")
        low = against("low-frequency", target, gradient, n_iter=half)
        per_step = against("per-step", target, gradient, n_iter=half)
        found |= {
            f"kept{suffix}": (f"APGD-ce, {name}, kept by all draws", against("worst-draw", target, gradient)),
            f"any_draw{suffix}": (f"APGD-ce, {name}, lost once any of {looks} draws is wrong", None),
            f"em{suffix}": (f"EM selection of draws, {name}", against("em", target, gradient)),
            f"low{suffix}": (f"APGD-ce, {name}, low frequencies", low),
            f"per_step{suffix}": (f"APGD-ce and per-step losses, {name}, kept by all draws", per_step),
        }
    return found


def _by_surrogates(config: Config, target: str) -> Sources:
    """What rests on another defence's images, or on a single draw of noise."""
    surrogates, found = {"none": "undefended", "reverse": "reverse SDE", "diffpure": "DiffPure"}, Sources()
    for name in ("none", "reverse"):
        warm = against("apgd-ce", target, n_iter=halved(config).n_iter, start=against("apgd-ce", name))
        found[f"warm_{name}"] = f"warm start from {surrogates[name]}", warm
    fixed = against("apgd-ce", target, eot=1, fixed_noise=True)
    found["fixed"] = "fixed noise, fresh noise at the test", fixed
    found["fixed_own"] = "fixed noise, the same at the test", None
    for name, label in surrogates.items():
        found[f"from_{name}"] = f"transfer from {label}", against("apgd-ce", name)
    return found


def draws_looked_at(config: Config) -> int:
    """How many draws of an image the attacks of `COUNTED` look at: those of every gradient."""
    return (config.n_iter + 1) * config.eot


def sources(config: Config, target: str) -> dict[str, AttackSpec]:
    """Name → source of everything that this target faces."""
    return {
        name: source
        for name, (_, source) in attacks(config, target).items()
        if source and not (target == "none" and name.startswith(FOR_PURIFIERS))
    }


def labels(config: Config) -> dict[str, str]:
    """Name → what the attack is called in the figure and the table, with this budget's numbers."""
    return {name: label for name, (label, _) in attacks(config, "coup").items() if label}


def experiment(config: Config, defences: Sequence[str] = PAPER) -> Experiment:
    """Every source on every defence, and those of `TRANSFERRED` on all others."""
    faced = {defence: sources(config, defence) for defence in defences}
    return Experiment(config, with_transfers(faced, TRANSFERRED))


def columns(evaluation: Evaluation, defences: Sequence[str] = PAPER) -> Columns:
    """The scores of the `experiment`."""
    return evaluation.predictions(experiment(evaluation.config, defences).attacks)


def per_image_accuracy(columns: Columns, recorded: Mapping[str, WorstCase]) -> PerImage:
    """Defence → name → share of right draws of each image, (n,).

    Added are "recorded", the worst case on record; "transferred", the worst of the attacks on other defences
    that have no name of their own; "two_runs", the worse of the exact attack and its restart; "fixed_own",
    the fixed-noise attack judged on the very noise that it was made for; and the counts of `COUNTED`.
    """
    found: PerImage = {}
    for defence, row in columns.items():
        found[defence] = {name: score.right for name, score in direct(row).items()}
        if "fixed" in row:
            found[defence]["fixed_own"] = row["fixed"].counted
        found[defence] |= {count: row[name].counted for name, count in COUNTED.items() if name in row}
        found[defence]["two_runs"] = worst_of([row["exact"], row["restart"]])
        found[defence]["transferred"] = worst_of([*transferred(row).values()])
        found[defence]["recorded"] = recorded[defence].right
    return found


# --- Decisions by many draws, and attacks outside the ball ------------------------------------------------


def counts(
    evaluation: Evaluation, columns: Columns, recorded: Mapping[str, WorstCase]
) -> tuple[PerImage, dict[str, str]]:
    """(defence → way to decide → share of right decisions per image (n,), way → heading).

    By the draws on record in the worst case on record, as `tables.by_count` has it; by `MANY` fresh draws,
    where it begins with "many_", on each image's strongest attack among `DECIDED`; each also on clean images.
    "any_draw" is the control of `COUNTED`: clean images that none of as many draws gets wrong. "autoattack"
    is AutoAttack's own count by notebook 04, where that is on record.
    """
    config, looks = evaluation.config, draws_looked_at(evaluation.config)
    found, faced = tables.by_count(columns, recorded, config.n_draws), experiment(config, [*columns]).attacks
    for defence, row in columns.items():
        clean = {faced[defence]["clean"]: row["clean"]}
        names = [name for name in DECIDED if name in row] or ["exact"]
        own = {faced[defence][name]: row[name] for name in names}
        for start, chosen in (("many_", own), ("many_clean_", clean)):
            votes = drawn(evaluation, defence, chosen, MANY)
            found[defence] |= {f"{start}{rule}": votes.decided(rule) for rule in RULES}
        found[defence]["any_draw"] = drawn(evaluation, defence, clean, looks).decided("worst_draw")
    for defence, right in autoattack(config, [*columns]).items():
        found[defence]["autoattack"] = right
    head = tables.count_headings(config.n_draws)
    for way, label in tables.count_headings(MANY).items():
        if way != "clean_single":  # the draws on record say as much
            head[f"many_{way}"] = label.replace("Worst case", "Strongest")
    head |= {"any_draw": f"Clean: all of {looks} draws", "autoattack": tables.COLUMNS["autoattack"]}
    return found, head


def drawn(
    evaluation: Evaluation, target: str, scores: Mapping[AttackSpec, Predictions], draws: int
) -> Predictions:
    """A target's verdicts by so many fresh draws, on each image's strongest among these attacks; on record.

    An attack's images are made again where they are not here.
    """
    config, source = evaluation.config, worst_case([*scores.values()]).source

    def compute(place: int) -> dict[str, Any]:
        x, here = evaluation.images.x.clone(), slice(place, place + config.chunk_size)
        for number, spec in enumerate(scores):
            if (chosen := torch.from_numpy(source == number)).any():
                x[chosen] = evaluation.x_adv(spec)[chosen]
        seeds = image_seeds(config.seed, DECIDE, range(config.n_images)[here], draws)
        logits = predict(evaluation.bench.defence(target), x[here], seeds, evaluation.batch.most)
        votes = torch.nn.functional.one_hot(classes_of(logits), logits.shape[2]).sum(1)
        average, labels = classes_of(logits.mean(1)), evaluation.images.y[here]
        return {"labels": labels.tolist(), "votes": votes.tolist(), "average": average.tolist()}

    settings = {
        "target": evaluation.bench.settings(target),
        "attacks": [evaluation.attack_settings(spec)[1] for spec in scores],
        "source": source.tolist(),
        "draws": draws,
        "seed": config.seed,
    }
    name = f"decisions-{target}-on-{evaluation.bench.classifier_name}-{config.norm}"
    result = evaluation.record(name, settings, compute).finish()["result"]
    labels, average = np.array(result["labels"]), np.array(result["average"])
    report = np.stack([np.repeat(np.arange(len(votes)), votes) for votes in result["votes"]])
    return Predictions(labels, report, average, right_draws(report, labels))


def autoattack(config: Config, defences: Sequence[str]) -> dict[str, np.ndarray]:
    """Defence → AutoAttack's own count of these images (n,) by notebook 04's protocol, where on record."""
    same = ("profile", "budget", "norm", "classifier", "subset", "device", "eps", "t_star", "n_steps")
    report = Config(**{name: getattr(config, name) for name in (*same, "guidance_weight", "split", "seed")})
    if report.n_images < config.n_images:
        return {}
    try:
        with reading_only():
            found = Evaluation(report, verbose=False).columns(defences, autoattack=True)
    except Missing:
        return {}
    counted = tables.per_image_accuracy(found)
    return {name: right["autoattack"][: config.n_images] for name, right in counted.items()}


def outside_experiments(config: Config, defences: Sequence[str] = PAPER) -> list[Experiment]:
    """First-order attacks outside the ball, by the names of `TRIED`, with a quarter of the iterations."""
    short = replace(config, n_iter=max(1, config.n_iter // 4))
    return [
        Experiment(
            replace(short, eps=reach),
            {defence: {label: against(name, defence, "first_order")} for defence in defences},
        )
        for (name, reach), label in TRIED.items()
    ]


def shares(experiments: Sequence[Experiment]) -> dict[str, dict[Any, np.ndarray]]:
    """Defence → key of its attack in any of the experiments → share of right draws of each image, (n,)."""
    found = [one.predictions() for one in experiments]
    return {name: {key: row.right for one in found for key, row in one[name].items()} for name in found[0]}


# --- Tables -----------------------------------------------------------------------------------------------


def across(rows: Sequence[Row], names: Mapping[str, str], title: str = "Accuracy under (%)") -> pd.DataFrame:
    """Columns by name × defences, "accuracy [95 % interval]" in percent; names: column → heading."""
    return tables.accuracies(rows, names).T.rename_axis(title)


# --- The sanity checks of the field -----------------------------------------------------------------------


# What is compared: name → (its column by `auditing.signs`, what it is called).
COMPARED = {
    "exact": ("ce", "exact"),
    "short": ("short", "half of the iterations"),
    "pgd": ("long", "PGD"),
    "fgsm": ("fgsm", "one step"),
    "square": ("square", "Square"),
    "noise": ("noise", "random noise"),
    "first_order": ("first_order", "first-order"),
    "adjoint": ("adjoint", "adjoint"),
    "bpda": ("bpda", "BPDA"),
    "coarse": ("coarse", "half of the steps"),
    "from_none": (Transfer("none", "exact"), "transfer from undefended"),
    "from_reverse": (Transfer("reverse", "exact"), "transfer from reverse SDE"),
    "from_diffpure": (Transfer("diffpure", "exact"), "transfer from DiffPure"),
}


def eps_experiments(config: Config) -> list[Experiment]:
    """Every defence under APGD-ce with the exact gradient, by multiples of eps; 0 is the clean images.

    Half of the images and half of the iterations.
    """
    small, found = replace(halved(config), n_images=max(2, config.n_images // 2)), []
    most = largest_radius(config.norm, SHAPES[config.setup.dataset])
    for factor in (0.0, *EPS_FACTORS[config.norm]):
        faced = {name: {factor: against("apgd-ce" if factor else "clean", name)} for name in PAPER}
        found.append(Experiment(replace(small, eps=min((factor or 1.0) * config.eps, most)), faced))
    return found


def clean_landscapes(config: Config) -> dict[str, np.ndarray]:
    """Defence → mean loss (S, n) from the clean image along its own exact gradient."""
    return {name: landscape(config, name, "clean", kinds=("exact",))["exact"] for name in PAPER}


def checks(
    columns: Columns, eps: Mapping[str, Mapping[float, np.ndarray]], losses: Mapping[str, np.ndarray]
) -> list[Sign]:
    """On every defence an audit's signs of masking, seen or not, and the loss along the gradient."""
    label = dict(COMPARED.values()) | {"restart": "the worse of two starts"}
    found = []
    for target, row in columns.items():
        right = {key: row[name].right for name, (key, _) in COMPARED.items() if name in row}
        right["restart"] = worst_of([row["exact"], row["restart"]])
        right["worst"] = worst_of([*row.values()])
        selection = right | {key: row[name].selection for name, (key, _) in COMPARED.items() if name in row}
        labels = row["clean"].labels
        found += compared(target, right, selection, label, eps[target], labels, own=("ce",))
        mean = losses[target].mean(1)
        shown, falls = f"{mean[0]:.2f} → {mean[-1]:.2f}", bool((np.diff(mean) <= 0).any())
        found.append(Sign(target, "the loss does not rise along the gradient", shown, seen=falls))
    return found


def check_table(found: Sequence[Sign]) -> str:
    """Markdown: signs × defences, whether each is seen, by which numbers; and where a gradient is masked."""
    cells: dict[str, dict[str, str]] = {}
    for sign in found:
        cell = f"{'✗' if sign.seen else '✓'} {sign.shown}"
        cells.setdefault(sign.name, {})[LABELS[sign.defence]] = cell
    frame = pd.DataFrame.from_dict(cells, orient="index").fillna(tables.MISSING)
    names = ", ".join(dict.fromkeys(LABELS[sign.defence] for sign in found if sign.masking)) or "none of them"
    return (
        f"{tables.markdown(frame.rename_axis('Exact gradient: ✗ is a sign of masking'))}\n\n"
        f"{sum(not sign.seen for sign in found)} of {len(found)} signs are not seen (✓) by paired 95 % "
        f"intervals, which with few images little is. Gradient masking is shown in: **{names}**."
    )


# --- Figures ----------------------------------------------------------------------------------------------


def sources_panel(axes: Axes, rows: Sequence[Row], config: Config) -> None:
    """Sources from top to bottom, accuracy to the right, one marker per defence with its 95 % interval.

    The dashed lines stand at each defence's worst case on record; the last row is their value.
    """
    names = labels(config)
    for offset, row in zip(np.linspace(-0.26, 0.26, len(rows)), rows, strict=True):
        defence, here = row.keys["defence"], [name for name in names if name in row.right]
        places = np.array([list(names).index(name) for name in here]) + offset
        look = {"fmt": MARKERS[defence], "color": COLOURS[defence], "label": row.label, "markersize": 4.5}
        points(axes, places, [row.right[name] for name in here], sideways=True, **look)
        worst = 100 * row.right["recorded"].mean()
        axes.axvline(worst, color=COLOURS[defence], linestyle="--", linewidth=1, alpha=0.7, zorder=0)
    for place in range(0, len(names), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.96", zorder=-1)
    axes.axhspan(len(names) - 1.5, len(names) - 0.5, color="#fff3c4", zorder=-1)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(-2, 102))
    said = "of a single draw where nothing else is said;\ndashed: worst case on record"
    axes.set_xlabel(f"accuracy (%), n = {config.n_images}, 95 % interval,\n{said}")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def sanity_figure(
    results: PerImage,
    config: Config,
    eps: Mapping[str, Mapping[float, np.ndarray]],
    losses: Mapping[str, np.ndarray],
) -> Figure:
    """Four panels: larger radii, weaker attacks, more effort, and the loss along the exact gradient."""
    figure, panels = plt.subplots(2, 2, figsize=(8.5, 6))
    (larger, weaker), (effort, loss) = panels
    small, rows = eps_experiments(config)[0].config, tables.rows(results, config)
    factors = {factor: f"{factor:g}" for factor in (0.0, *EPS_FACTORS[config.norm])}
    robustness_panel(larger, tables.rows(eps, small), factors)
    larger.set(xlabel=f"radius (units of eps = {radius(config.eps)})", ylim=(-2, 102))

    threats = {"clean": "clean", "noise": "random noise", "square": "Square"}
    robustness_panel(weaker, rows, threats | {"fgsm": "FGSM", "exact": "APGD exact"}, width=7)

    runs = {"quarter": f"{max(1, config.n_iter // 4)}", "short": f"{halved(config).n_iter}"}
    runs |= {"exact": f"{config.n_iter}", "two_runs": f"2 × {config.n_iter}"}
    robustness_panel(effort, rows, runs | {"pgd": f"PGD {PGD_FACTOR * config.n_iter}"}, width=7)
    effort.set_xlabel("runs × iterations of APGD, then PGD, exact")

    for defence, values in losses.items():
        look = MARKERS[defence] + "-", COLOURS[defence]
        band(loss, LANDSCAPE, values.mean(1), student(values), *look)
    loss.set(xlabel="step along the exact gradient (eps)", ylabel="mean cross-entropy")
    shown = f"larger radius, n = {small.n_images}", f"weaker attacks, n = {config.n_images}"
    titles(panels.flat, (*shown, "more effort", "loss along the gradient"))
    figure.legend(*larger.get_legend_handles_labels(), loc="outside upper center", ncols=len(results))
    return figure
