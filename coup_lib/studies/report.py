"""One page: every number and claim of the paper beside what is measured here, from the records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coup_lib import paths
from coup_lib.attacks import NORMS
from coup_lib.checks import choice, in_one_line
from coup_lib.defences import LABELS, MAXIMISERS, PAPER
from coup_lib.evaluation.config import NORM_NAMES, Config
from coup_lib.evaluation.outcomes import Accuracy, Difference
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import Missing, reading_only, record
from coup_lib.files import write_atomically
from coup_lib.reporting import paper, publishing, tables
from coup_lib.reporting.plots import COLOURS, estimates
from coup_lib.reporting.tables import PerImage, Right
from coup_lib.studies import ablation as clean
from coup_lib.studies import adversarial_training as cross
from coup_lib.studies import bpda, case_study, likelihood_study, sweeps, toy, toy_figures

QUOTED = "not comparable: quoted by the paper, not measured here"
LEVEL = "not comparable: other data and networks"
NOTHING = "–"
PROTOCOL, WORST = "Here, the paper's protocol", "Here, worst case on record"
PLACES = ("first", "second")  # of a profile's classifiers
TOY = ("Fig. 3b", "Prop. 1", "Prop. 2")

Spending = Mapping[str, Mapping[str, Any]]  # classifier → what it has other than the rest, by `SPENDABLE`
SAME: Spending = MappingProxyType({})  # no classifier has anything other
SPENDABLE = ("n_images", "n_iter", "eot", "n_draws", "precision", "compiled")


@dataclass(frozen=True)
class Line:
    """One number or claim: where it stands in the paper, what it says, what is measured here, the verdict.

    here and verdict are under the paper's own protocol; worst and worst_verdict in the worst case on record.
    """

    where: str
    what: str
    reported: str
    here: str = NOTHING
    n: int | None = None
    verdict: str = NOTHING
    worst: str = NOTHING
    worst_verdict: str = NOTHING


@dataclass(frozen=True)
class Gap:
    """A claimed difference of two defences: the paper's number, if it gives one, and ours in two ways."""

    what: str
    reported: float | None
    protocol: Difference
    worst: Difference | None

    @classmethod
    def of(cls, what: str, reported: float | None, better: Right, than: Right, protocol: str) -> "Gap":
        """Of two defences by this column, and by the worst case on record where there is one of an attack."""
        ours, worst = Difference.of(better[protocol], than[protocol]), None
        if protocol != "clean" and "recorded" in better:
            worst = Difference.of(better["recorded"], than["recorded"])
        return cls(what, reported, ours, worst)


def level(where: str, what: str, reported: float, share: np.ndarray, worst: np.ndarray | None = None) -> Line:
    """An accuracy of the paper beside ours; levels of other data and networks do not compare."""
    here, strongest = Accuracy.of(share), NOTHING if worst is None else str(Accuracy.of(worst))
    return Line(where, what, f"{reported:.2f}", str(here), here.n, LEVEL, strongest)


def levels(where: str, reported: Mapping[str, paper.Reported], results: PerImage, robust: str) -> list[Line]:
    """Accuracy and robustness of the paper's defences beside ours, a line each; robust: which column."""
    lines = []
    for name, row in reported.items():
        found, label = results[name], LABELS[name]
        lines.append(level(where, f"{label}: accuracy", row.accuracy, found["clean"]))
        worst = found.get("recorded")
        lines.append(level(where, f"{label}: robustness", row.robustness, found[robust], worst))
    return lines


def kept(where: str, what: str, reported: str, right: np.ndarray, own: np.ndarray) -> Line:
    """What a defence leaves of the classifier's own accuracy on clean images, beside the paper's."""
    here = str(Accuracy.kept(right, own)) if own.any() else NOTHING
    return Line(where, f"{what}: accuracy, in % of the classifier's own", reported, here, len(own))


def quoted(where: str, rows: Sequence[paper.Reported]) -> list[Line]:
    """Rows that the paper takes from the literature: accuracy and robustness, a line each."""
    return [
        Line(where, f"{row.defence}: {what}", f"{value:.2f}", verdict=QUOTED)
        for row in rows
        for what, value in (("accuracy", row.accuracy), ("robustness", row.robustness))
    ]


def claim(where: str, gap: Gap) -> Line:
    """A claimed difference beside ours, with its verdict."""
    reported = "larger" if gap.reported is None else f"{gap.reported:+.2f} points"
    worst = {} if gap.worst is None else {"worst": str(gap.worst), "worst_verdict": gap.worst.verdict}
    return Line(where, gap.what, reported, str(gap.protocol), gap.protocol.n, gap.protocol.verdict, **worst)


def autoattack(config: Config) -> tuple[list[Line], list[Gap]]:
    """Table 1 or 2, by the norm of the configuration of notebook 04."""
    where = paper.TITLES[config.norm].split(":")[0]
    evaluation = Evaluation(config)
    columns = evaluation.columns(PAPER, autoattack=True)
    results = tables.per_image_accuracy(columns, evaluation.recorded(columns))
    reported, norm = paper.PURIFIERS[config.norm], NORM_NAMES[config.norm]
    lines = quoted(where, paper.LITERATURE[config.norm])
    lines += levels(where, reported, results, "autoattack")
    accuracy = reported["coup"].accuracy - reported["diffpure"].accuracy
    robustness = reported["coup"].robustness - reported["diffpure"].robustness
    coup, diffpure, reverse = (results[name] for name in ("coup", "diffpure", "reverse"))
    gaps = [
        Gap.of(f"{norm}: COUP − DiffPure, accuracy", accuracy, coup, diffpure, "clean"),
        Gap.of(f"{norm}: COUP − DiffPure, AutoAttack", robustness, coup, diffpure, "autoattack"),
        Gap.of(f"{norm}: COUP − {LABELS['reverse']}, AutoAttack", None, coup, reverse, "autoattack"),
    ]
    return [*lines, *(claim(where, one) for one in gaps)], gaps


def ablation(config: Config, classifiers: Sequence[str], fig2b: Spending) -> tuple[list[Line], list[Gap]]:
    """Fig. 2b, by notebook 02's configuration and classifiers: bars without numbers, so only an order."""
    gaps = []
    for place, classifier in zip(PLACES, classifiers, strict=False):
        evaluation = Evaluation(spending(config, classifier, fig2b), classifier)
        columns = evaluation.columns(clean.PURIFIERS)
        results = tables.per_image_accuracy(columns, evaluation.recorded(columns))
        for than in ("reverse", "diffpure"):
            what = f"{place} classifier: COUP − {LABELS[than]}, APGD-ce"
            gaps.append(Gap.of(what, None, results["coup"], results[than], "adaptive"))
    return [claim("Fig. 2b", gap) for gap in gaps], gaps


def spending(config: Config, classifier: str, fig2b: Spending) -> Config:
    """The configuration of a classifier of Fig. 2b."""
    return replace(config, **fig2b.get(classifier, {}))


def purification_costs(config: Config, classifiers: Sequence[str]) -> list[Line]:
    """What purification leaves of clean accuracy, by notebook 02's second configuration, beside Table 1."""
    lines = []
    for place, classifier in zip(PLACES, classifiers, strict=False):
        shares = clean.measure(config, classifier)
        for name in ("diffpure", "coup"):
            what, papers = f"{place} classifier, {LABELS[name]}", f"{clean.reported(config, name):.2f}"
            lines.append(kept("Table 1", what, papers, shares[name], shares[clean.ALONE]))
    return lines


def bpda_table(config: Config) -> tuple[list[Line], list[Gap]]:
    """Table 3, by the configuration of notebook 05: BPDA with the most EOT draws, a single purification."""
    where, most = "Table 3", bpda.column(max(bpda.checked_counts(None, config)))
    results = bpda.by_rule(bpda.experiment(config).predictions())["single"]
    lines = quoted(where, paper.BPDA_LITERATURE) + levels(where, paper.BPDA, results, most)
    reported = paper.BPDA["coup"].robustness - paper.BPDA["diffpure"].robustness
    what = "L∞: COUP − DiffPure, BPDA + EOT"
    gap = Gap.of(what, reported, results["coup"], results["diffpure"], most)
    return [*lines, claim(where, gap)], [gap]


def combination(configs: dict[str, Config]) -> tuple[list[Line], list[Gap]]:
    """Fig. 2c: the cross setting, and COUP around adversarially trained classifiers, in every setting."""
    found, lines, gaps = cross.measure(configs), [], []
    alone, behind = paper.TRAINED_THEN_COUP
    for norm, panel in found.items():
        (other,) = set(found) - {norm}
        attack = f"attacked in {NORM_NAMES[norm]}"
        what = f"{attack}: trained for {NORM_NAMES[norm]} − trained for {NORM_NAMES[other]}"
        gap = Gap.of(what, None, panel[norm]["none"], panel[other]["none"], "adaptive")
        lines.append(claim("Fig. 2c", gap))
        for training in found:
            row, trained = panel[training], f"trained for {NORM_NAMES[training]}"
            what = f"{trained}, COUP against {NORM_NAMES[norm]}"
            lines.append(kept("Fig. 2c", what, NOTHING, row["coup"]["clean"], row["none"]["clean"]))
            what = f"{trained}, {attack}: COUP − alone"
            gaps.append(Gap.of(what, behind - alone, row["coup"], row["none"], "adaptive"))
    return lines + [claim("Sec. 5.4.1", gap) for gap in gaps], gaps


def hyperparameters(config: Config, t_stars: Sequence[float], weights: Sequence[float]) -> list[Line]:
    """Fig. 4, by the configuration and the lists of notebook 03, on the validation split."""
    times = sweeps.sweep(config, "t_star", sweeps.values_to_sweep(config, "t_star", t_stars))
    values = sweeps.values_to_sweep(config, "guidance_weight", weights)
    along = sweeps.sweep(config, "guidance_weight", values)
    verdict, evidence = sweeps.falls(times)
    lines = [Line("Fig. 4a", "accuracy falls as t* grows", "falls", evidence, config.n_images, verdict)]
    judged = (
        ("Fig. 4a", "too short and too long t* are worse", "inside", sweeps.peaks_inside, (times,)),
        ("Fig. 4a", "the most robust t*", f"{config.t_star:g}", sweeps.is_best, (times, config.t_star)),
        (
            "Fig. 4b",
            "the most robust λ",
            f"{config.guidance_weight:g}",
            sweeps.is_best,
            (along, config.guidance_weight),
        ),
    )
    for where, what, reported, judge, (found, *value) in judged:
        (verdict, here), (worst_verdict, worst) = (judge(found, column, *value) for column in sweeps.JUDGED)
        lines.append(Line(where, what, reported, here, config.n_images, verdict, worst, worst_verdict))
    return lines


def bad_cases(config: Config) -> list[Line]:
    """Fig. 2a, by the configuration of notebook 01: every bad case at the profile's eps."""
    study = case_study.case_study(config)
    n = len(study.rescued("all"))
    said = case_study.verdicts(study, "all")
    rescued = f"{Accuracy.of(study.rescued('all'))} % rescued" if n else NOTHING
    papers = f"{case_study.PAPER_CASES} bad cases"
    return [
        Line("Fig. 2a", statement, papers, rescued if name == "3" else NOTHING, n, said[name])
        for name, statement in case_study.STATEMENTS.items()
    ]


def toy_claims() -> list[Line]:
    """Fig. 3b and the Propositions, from the records of notebook 00."""
    settings, data = toy.ToySettings(), toy.TwoGaussians()
    found = {
        name: record("toy", name, asdict(settings), partial(measure, data, settings))["result"]
        for name, measure in (
            ("label_flips", toy.label_flips),
            ("prop1", toy.prop1_hypotheses),
            ("prop2", toy.prop2_check),
        )
    }
    flips, n = found["label_flips"], settings.n_runs
    opposite = {"holds": "does not hold", "does not hold": "holds", "is not decided": "is not decided"}
    lines = []
    for index, noise in enumerate(flips["levels"]):
        share, intervals = toy_figures.shares(flips, "flipped", index)
        here = f"{100 * share[0]:.2f} → {100 * share[-1]:.2f} % of runs at λ = {flips['weights'][-1]:g}"
        reported, verdict = "helpful under small or no noise", toy_figures.rarer(intervals)
        if noise > 1:  # the paper draws no line between small and high noise
            last = noise == flips["levels"][-1]
            reported, verdict = "untrustworthy when noise is high", opposite[verdict] if last else NOTHING
        lines.append(
            Line("Fig. 3b", f"guidance by a classifier of noise c = {noise:g}", reported, here, n, verdict)
        )
    (_, slope), harmed = found["prop1"]["slope"], sum(flips["crossed_harmed"][0])
    hypothesis, crossed = f"∂f₀/∂x ≤ {slope:.3g} everywhere", f"{harmed} runs made to cross"
    held = min(found["prop2"]["held_printed"])
    said = {True: "holds", False: "does not hold"}
    return [
        *lines,
        Line("Prop. 1", "its hypothesis (ii)", "assumed", hypothesis, None, said[slope >= 0]),
        Line("Prop. 1", "its conclusion, true classifier", "Eq. 7", crossed, n, said[harmed == 0]),
        Line("Prop. 2", "the bound of Eq. 8", "all runs", f"{100 * held:.2f} % of runs", n, said[held == 1]),
    ]


def likelihood(config: Config) -> tuple[list[Line], list[Gap]]:
    """Sec. 5.2.1, by the second configuration of notebook 04."""
    where, results = "Sec. 5.2.1", likelihood_study.measure(config)
    reported = {name: row.robustness for name, row in paper.LIKELIHOOD.items()}
    lines = [
        level(where, f"{LABELS[name]}: robustness", reported[name], row["bpda"], row["recorded"])
        for name, row in results.items()
    ]
    plain, guided = MAXIMISERS
    what = "likelihood maximisation: guided − plain, APGD-ce"
    gap = Gap.of(what, reported[guided] - reported[plain], results[guided], results[plain], "bpda")
    return [*lines, claim(where, gap)], [gap]


PARTS = (
    "Table 1", "Table 2", "Table 3", "clean", "Fig. 2b", "Fig. 2c", "Sec. 5.2.1", "Fig. 2a", "toy", "Fig. 4",
)  # fmt: skip


@in_one_line()
def checked_parts(parts: Sequence[str] | None, classifiers: Sequence[str], fig2b: Spending) -> list[str]:
    """The parts of the paper that are asked for; None is all.

    ValueError for an unknown one, or for what `fig2b` says of an unknown classifier or setting.
    """
    given = list(fig2b.values()) if isinstance(fig2b, Mapping) else [fig2b]
    if not all(isinstance(spent, Mapping) for spent in given):
        raise ValueError(f'fig2b: expected {{"resnet20": {{"n_images": 256}}}} or the like; got {fig2b!r}')
    for classifier, spent in fig2b.items():
        choice("fig2b", classifier, classifiers)
        for name in spent:
            choice(f"fig2b, {classifier}", name, SPENDABLE)
    if isinstance(parts, str):
        raise ValueError(f"parts: expected a list out of {', '.join(PARTS)}; got {parts!r}")
    return [choice("parts", part, PARTS) for part in (PARTS if parts is None else parts)]


def everything(
    config: Config,
    classifiers: Sequence[str],
    parts: Sequence[str] | None = None,
    t_stars: Sequence[float] = sweeps.T_STARS,
    weights: Sequence[float] = sweeps.WEIGHTS,
    fig2b: Spending = SAME,
) -> tuple[list[Line], list[Gap]]:
    """All of it that is on record, with the profile, budget and seed of `config`, and each notebook's sizes.

    Args:
        classifiers: of Fig. 2b.
        parts: out of `PARTS`; None is all of them.
        t_stars, weights: of Fig. 4.
        fig2b: what single classifiers of Fig. 2b have other than the budget's.

    Raises:
        ValueError: for an unknown part, classifier or setting.
    """
    chosen = checked_parts(parts, classifiers, fig2b)
    kept = ("profile", "budget", "classifier", "subset", "device", "seed")
    same: dict[str, Any] = {name: getattr(config, name) for name in kept}

    def of(purpose: str, **more: Any) -> Config:
        return Config(purpose=purpose, **same, **more)

    found: dict[str, Callable[[], tuple[list[Line], list[Gap]]]] = {
        "Table 1": lambda: autoattack(of("report")),
        "Table 2": lambda: autoattack(of("report", norm="l2")),
        "Table 3": lambda: bpda_table(of("sweep")),
        "clean": lambda: (purification_costs(of("clean"), classifiers), []),
        "Fig. 2b": lambda: ablation(of("report"), classifiers, fig2b),
        "Fig. 2c": lambda: combination({norm: of("sweep", norm=norm) for norm in NORMS}),
        "Sec. 5.2.1": lambda: likelihood(of("compare")),
        "Fig. 2a": lambda: (bad_cases(of("compare")), []),
        "toy": lambda: (toy_claims(), []),
        "Fig. 4": lambda: (hyperparameters(of("sweep", split="validation"), t_stars, weights), []),
    }
    lines: list[Line] = []
    gaps: list[Gap] = []
    for part in (part for part in PARTS if part in chosen):
        try:
            with reading_only():
                more, differences = found[part]()
        except Missing:
            more, differences = [Line(part, "not on record: run its notebook first", NOTHING)], []
            publishing.incomplete(part)
        lines, gaps = lines + more, gaps + differences
    return lines, gaps


def table(lines: Sequence[Line]) -> pd.DataFrame:
    """The lines as a table, one row each; what the paper only quotes comes last."""
    lines = sorted(lines, key=lambda line: line.verdict == QUOTED)
    frame = pd.DataFrame([asdict(line) for line in lines])
    frame["n"] = [NOTHING if line.n is None else f"{line.n:,}" for line in lines]
    frame.columns = ["Where", "What", "Paper", PROTOCOL, "n", "Verdict", WORST, "Verdict under it"]
    return frame.set_index("Where")


def side_by_side() -> str:
    """Markdown: the paper beside every profile that has a report, here or published; side_by_side.md.

    Only what a profile measures: no quotations, and not the toy analysis, which is the same for all.
    """
    found, captions = [], []
    for name in PROFILES:
        places = [folder / name / "report.csv" for folder in (paths.FIGURES, paths.ROOT / "figures")]
        if written := next((place for place in places if place.exists()), None):
            found.append(_of_profile(name, pd.read_csv(written, keep_default_na=False)))
            captions.append(written.with_suffix(".md").read_text().strip().split("\n\n")[-1])
    frame = pd.concat(found, axis=1, sort=False).fillna(NOTHING).reset_index().set_index("Where")
    text = "\n\n".join([tables.markdown(frame), *captions])
    path = publishing.note(paths.FIGURES / "side_by_side.md")
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
    return text


def _of_profile(name: str, report: pd.DataFrame) -> pd.DataFrame:
    """Its two columns; a row for each line and number of the paper's."""
    rows = report[(report["Verdict"] != QUOTED) & ~report["Where"].isin(TOY)]
    rows = rows.set_index(["Where", "What", "Paper"])
    return pd.DataFrame(
        {
            f"{name}: the paper's protocol (n)": rows.agg(
                lambda row: _cell(row[PROTOCOL], row["Verdict"], row["n"]), axis=1
            ),
            f"{name}: worst case on record": rows.agg(
                lambda row: _cell(row[WORST], row["Verdict under it"]), axis=1
            ),
        }
    )


def _cell(value: str, verdict: str, n: str = NOTHING) -> str:
    """The verdict where there is one, the number, and on how many images it stands."""
    parts = ("" if verdict == LEVEL else f"**{verdict}**", value, f"({n})")
    return " ".join(part for part in parts if part and NOTHING not in part) or NOTHING


def counts(lines: Sequence[Line]) -> str:
    """Markdown: how many claims hold, do not hold, or are not decided, in both ways of attacking."""

    def said(verdicts: Sequence[str]) -> str:
        words = {"does not hold": "do not hold", "is not decided": "are not decided", "holds": "hold"}
        counted = {word: sum(verdict == word for verdict in verdicts) for word in words}
        return ", ".join(f"{n} {words[word]}" for word, n in counted.items())

    ours, worst = (said([getattr(line, name) for line in lines]) for name in ("verdict", "worst_verdict"))
    rest = sum(line.verdict.startswith("not comparable") for line in lines)
    return (
        f"Of the paper's claims {ours} under its own protocol. Of those about robustness {worst} in the "
        f"worst case on record. Another {rest} of the paper's numbers get no verdict: it quotes them from "
        "other papers, or they are accuracies on its own data and networks."
    )


def caption(config: Config, classifiers: Sequence[str], fig2b: Spending = SAME) -> str:
    """What stands behind the page."""
    full = config.setup.budgets["report"]["full"]
    spent = f"{config.n_iter}/{full.n_iter} iterations of APGD and {config.eot}/{full.eot} EOT draws"
    most = max(bpda.checked_counts(None, replace(config, purpose="sweep")))
    other = "".join(
        f"; {classifier} has in Fig. 2b {', '.join(f'{name} = {value}' for name, value in spent.items())}"
        for classifier, spent in fig2b.items()
    )
    return (
        f"{config.profile} ({', '.join(classifiers)}), budget {config.budget}, {config.seed_label}; of "
        f"the paper's protocol Tables 1 and 2 and Fig. 2b spend {spent}, Table 3's BPDA {most} of them{other}"
        "; accuracies in % with 95 % intervals, differences in points and what is kept of a "
        "classifier's own accuracy with paired 95 % intervals. Fig. 4 is judged on the validation split, all "
        "else on the test split. The pair 70.90 → 77.15 of Sec. 5.4.1 belongs to one training and one attack "
        "that the paper does not name, so it stands beside all four."
    )


def figure(gaps: Sequence[Gap]) -> Figure:
    """Every claimed difference: the paper's number, and ours with 95 % intervals in two ways."""
    drawn, axes = plt.subplots(figsize=(8.5, 0.9 + 0.42 * len(gaps)))
    places = np.arange(len(gaps))[::-1]
    ways = (
        ("here, the paper's protocol", 0.13, "o", COLOURS["coup"], [gap.protocol for gap in gaps]),
        ("here, worst case on record", -0.13, "s", "black", [gap.worst for gap in gaps]),
    )
    for label, shift, marker, colour, differences in ways:
        rows = [(place + shift, one) for place, one in zip(places, differences, strict=True) if one]
        if rows:
            look: dict[str, Any] = {"fmt": marker, "color": colour, "label": label, "linewidth": None}
            estimates(axes, *zip(*rows, strict=True), sideways=True, capsize=2.5, **look)
    reported = [(gap.reported, place) for gap, place in zip(gaps, places, strict=True) if gap.reported]
    if reported:
        axes.plot(*np.array(reported).T, "D", color=COLOURS["diffpure"], label="the paper")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [gap.what for gap in gaps])
    axes.set_ylim(-0.6, len(gaps) - 0.4)
    axes.grid(visible=False, axis="y")
    claimed = "the claim is that it is positive"
    axes.set_xlabel(f"difference in accuracy (points), paired 95 % interval;\n{claimed}")
    if gaps:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return drawn
