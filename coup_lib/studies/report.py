"""One page: every number and claim of the paper beside what is measured here, from the records."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from coup_lib.evaluation.protocol import Evaluation, paper_attacks
from coup_lib.evaluation.records import Missing, reading_only
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
SPENDABLE = ("n_images", "n_iter", "eot", "n_draws", "precision")


@dataclass(frozen=True)
class Line:
    """One number or claim: where it stands in the paper, what it says, what is measured here, the verdict.

    reported: in words, or as a number: of an accuracy, or of a difference (None: the paper says "larger").
    here and verdict are under the paper's own protocol; worst and worst_verdict in the worst case on record.
    """

    where: str
    what: str
    reported: str | float | None
    here: Accuracy | Difference | str = NOTHING
    n: int | None = None
    verdict: str = NOTHING
    worst: Accuracy | Difference | str = NOTHING
    worst_verdict: str = NOTHING

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        reported = self.reported
        if isinstance(self.here, Difference):
            reported = "larger" if reported is None else f"{reported:+.2f} points"
        elif isinstance(reported, float):
            reported = f"{reported:.2f}"
        n = NOTHING if self.n is None else f"{self.n:,}"
        row = (self.where, self.what, reported, self.here, n, self.verdict, self.worst, self.worst_verdict)
        return [str(cell) for cell in row]


def claim(where: str, what: str, reported: float | None, better: Right, than: Right, protocol: str) -> Line:
    """A claimed difference by this column, and by the worst case on record where an attack is meant."""
    ours = Difference.of(better[protocol], than[protocol])
    line = Line(where, what, reported, ours, ours.n, ours.verdict)
    if protocol == "clean" or "recorded" not in better:
        return line
    worst = Difference.of(better["recorded"], than["recorded"])
    return replace(line, worst=worst, worst_verdict=worst.verdict)


def level(where: str, what: str, reported: float, right: np.ndarray, worst: np.ndarray | None = None) -> Line:
    """An accuracy of the paper beside ours; levels of other data and networks do not compare."""
    strongest = NOTHING if worst is None else Accuracy.of(worst)
    return Line(where, what, reported, Accuracy.of(right), len(right), LEVEL, strongest)


def levels(where: str, reported: Mapping[str, paper.Reported], results: PerImage, robust: str) -> list[Line]:
    """Accuracy, if the paper gives one, and robustness beside ours, a line each; robust: which column."""
    lines = []
    for name, row in reported.items():
        found, label = results[name], LABELS[name]
        if not math.isnan(row.accuracy):
            lines.append(level(where, f"{label}: accuracy", row.accuracy, found["clean"]))
        worst = found.get("recorded")
        lines.append(level(where, f"{label}: robustness", row.robustness, found[robust], worst))
    return lines


def kept(where: str, what: str, reported: float | str, right: np.ndarray, own: np.ndarray) -> Line:
    """What a defence leaves of the classifier's own accuracy on clean images, beside the paper's."""
    here = Accuracy.kept(right, own) if own.any() else NOTHING
    return Line(where, f"{what}: accuracy, in % of the classifier's own", reported, here, len(own))


def quoted(where: str, rows: Sequence[paper.Reported]) -> list[Line]:
    """Rows that the paper takes from the literature: accuracy and robustness, a line each."""
    return [
        Line(where, f"{row.defence}: {what}", value, verdict=QUOTED)
        for row in rows
        for what, value in (("accuracy", row.accuracy), ("robustness", row.robustness))
    ]


def gain(reported: Mapping[str, paper.Reported], better: str, than: str) -> float:
    """The paper's difference in robustness."""
    return reported[better].robustness - reported[than].robustness


def autoattack(config: Config) -> list[Line]:
    """Table 1 or 2, by the norm of the configuration of notebook 04."""
    where, norm = paper.TITLES[config.norm].split(":")[0], NORM_NAMES[config.norm]
    reported = paper.PURIFIERS[config.norm]
    results = tables.measured(Evaluation(config), paper_attacks(PAPER, config, autoattack=True))
    coup, diffpure = results["coup"], results["diffpure"]
    accuracy = reported["coup"].accuracy - reported["diffpure"].accuracy
    robustness = gain(reported, "coup", "diffpure")
    return [
        *quoted(where, paper.LITERATURE[config.norm]),
        *levels(where, reported, results, "autoattack"),
        claim(where, f"{norm}: COUP − DiffPure, accuracy", accuracy, coup, diffpure, "clean"),
        claim(where, f"{norm}: COUP − DiffPure, AutoAttack", robustness, coup, diffpure, "autoattack"),
    ]


def ablation(config: Config, classifiers: Sequence[str], fig2b: Spending) -> list[Line]:
    """Fig. 2b, by notebook 02's configuration and classifiers: bars without numbers, so only an order."""
    lines = []
    for place, classifier in zip(PLACES, classifiers, strict=False):
        here = replace(config, **fig2b.get(classifier, {}))
        results = tables.measured(Evaluation(here, classifier), paper_attacks(clean.PURIFIERS, here))
        for than in ("reverse", "diffpure"):
            what = f"{place} classifier: COUP − {LABELS[than]}, APGD-ce"
            lines.append(claim("Fig. 2b", what, None, results["coup"], results[than], "adaptive"))
    return lines


def purification_costs(config: Config, classifiers: Sequence[str]) -> list[Line]:
    """What purification leaves of clean accuracy, by notebook 02's second configuration, beside Table 1."""
    lines = []
    for place, classifier in zip(PLACES, classifiers, strict=False):
        shares = clean.measure(config, classifier)
        for name in ("diffpure", "coup"):
            what, papers = f"{place} classifier, {LABELS[name]}", clean.reported(config, name) or NOTHING
            lines.append(kept("Table 1", what, papers, shares[name], shares[clean.ALONE]))
    return lines


def bpda_table(config: Config) -> list[Line]:
    """Table 3, by the configuration of notebook 05: BPDA with the most EOT draws, a single purification."""
    where, most = "Table 3", bpda.column(max(bpda.checked_counts(None, config)))
    results = bpda.by_rule(bpda.experiment(config).predictions())["single"]
    reported, what = gain(paper.BPDA, "coup", "diffpure"), "L∞: COUP − DiffPure, BPDA + EOT"
    return [
        *quoted(where, paper.BPDA_LITERATURE),
        *levels(where, paper.BPDA, results, most),
        claim(where, what, reported, results["coup"], results["diffpure"], most),
    ]


def combination(configs: dict[str, Config]) -> list[Line]:
    """Fig. 2c: the cross setting, and COUP around adversarially trained classifiers, in every setting."""
    found, crossed, combined = cross.measure(configs), [], []
    alone, behind = paper.TRAINED_THEN_COUP
    for norm, panel in found.items():
        (other,) = set(found) - {norm}
        attack = f"attacked in {NORM_NAMES[norm]}"
        what = f"{attack}: trained for {NORM_NAMES[norm]} − trained for {NORM_NAMES[other]}"
        crossed.append(claim("Fig. 2c", what, None, panel[norm]["none"], panel[other]["none"], "adaptive"))
        for training in found:
            row, trained = panel[training], f"trained for {NORM_NAMES[training]}"
            what = f"{trained}, COUP against {NORM_NAMES[norm]}"
            crossed.append(kept("Fig. 2c", what, NOTHING, row["coup"]["clean"], row["none"]["clean"]))
            what, reported = f"{trained}, {attack}: COUP − alone", behind - alone
            combined.append(claim("Sec. 5.4.1", what, reported, row["coup"], row["none"], "adaptive"))
    return crossed + combined


def hyperparameters(config: Config, t_stars: Sequence[float], weights: Sequence[float]) -> list[Line]:
    """Fig. 4, by the configuration and the lists of notebook 03, on the validation split."""
    values = {"t_star": t_stars, "guidance_weight": weights}
    times, along = (
        sweeps.sweep(config, name, sweeps.values_to_sweep(config, name, given))
        for name, given in values.items()
    )
    verdict, evidence = sweeps.falls(times)
    lines = [Line("Fig. 4a", "accuracy falls as t* grows", "falls", evidence, config.n_images, verdict)]
    t_star, weight = config.t_star, config.guidance_weight
    for where, what, reported, judge in (
        ("Fig. 4a", "too short and too long t* are worse", "inside", partial(sweeps.peaks_inside, times)),
        ("Fig. 4a", "the most robust t*", f"{t_star:g}", partial(sweeps.is_best, times, value=t_star)),
        ("Fig. 4b", "the most robust λ", f"{weight:g}", partial(sweeps.is_best, along, value=weight)),
    ):
        (verdict, here), (worst_verdict, worst) = (judge(column=column) for column in sweeps.JUDGED)
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
    settings = toy.ToySettings()
    flips, prop1, prop2 = (toy.recorded(name, settings) for name in ("label_flips", "prop1", "prop2"))
    n, lines = settings.n_runs, []
    opposite = {"holds": "does not hold", "does not hold": "holds", "is not decided": "is not decided"}
    for index, noise in enumerate(flips["levels"]):
        share = toy_figures.shares(flips, "flipped", index)
        what = f"guidance by a classifier of noise c = {noise:g}"
        free, guided = 100 * share[0].value, 100 * share[-1].value
        here = f"{free:.2f} → {guided:.2f} % of runs at λ = {flips['weights'][-1]:g}"
        reported, verdict = "helpful under small or no noise", toy_figures.rarer(share)
        if noise > 1:  # the paper draws no line between small and high noise
            last = noise == flips["levels"][-1]
            reported, verdict = "untrustworthy when noise is high", opposite[verdict] if last else NOTHING
        lines.append(Line("Fig. 3b", what, reported, here, n, verdict))
    (_, slope), harmed = prop1["slope"], sum(flips["crossed_harmed"][0])
    hypothesis, crossed = f"∂f₀/∂x ≤ {slope:.3g} everywhere", f"{harmed} runs made to cross"
    held = min(prop2["held_printed"])
    said = {True: "holds", False: "does not hold"}
    return [
        *lines,
        Line("Prop. 1", "its hypothesis (ii)", "assumed", hypothesis, None, said[slope >= 0]),
        Line("Prop. 1", "its conclusion, true classifier", "Eq. 7", crossed, n, said[harmed == 0]),
        Line("Prop. 2", "the bound of Eq. 8", "all runs", f"{100 * held:.2f} % of runs", n, said[held == 1]),
    ]


def likelihood(config: Config) -> list[Line]:
    """Sec. 5.2.1, by the second configuration of notebook 04."""
    where, what = "Sec. 5.2.1", "likelihood maximisation: guided − plain, APGD-ce"
    results, (plain, guided) = likelihood_study.measure(config), MAXIMISERS
    reported = gain(paper.LIKELIHOOD, guided, plain)
    return [
        *levels(where, paper.LIKELIHOOD, results, "bpda"),
        claim(where, what, reported, results[guided], results[plain], "bpda"),
    ]


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
) -> list[Line]:
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

    found: dict[str, Callable[[], list[Line]]] = {
        "Table 1": lambda: autoattack(of("report")),
        "Table 2": lambda: autoattack(of("report", norm="l2")),
        "Table 3": lambda: bpda_table(of("sweep")),
        "clean": lambda: purification_costs(of("clean"), classifiers),
        "Fig. 2b": lambda: ablation(of("report"), classifiers, fig2b),
        "Fig. 2c": lambda: combination({norm: of("sweep", norm=norm) for norm in NORMS}),
        "Sec. 5.2.1": lambda: likelihood(of("compare")),
        "Fig. 2a": lambda: bad_cases(of("compare")),
        "toy": toy_claims,
        "Fig. 4": lambda: hyperparameters(of("sweep", split="validation"), t_stars, weights),
    }
    lines: list[Line] = []
    for part in (part for part in PARTS if part in chosen):
        try:
            with reading_only():
                lines += found[part]()
        except Missing:
            lines.append(Line(part, "not on record: run its notebook first", NOTHING))
            publishing.incomplete(part)
    return lines


def table(lines: Sequence[Line]) -> pd.DataFrame:
    """The lines as a table, one row each; what the paper only quotes comes last."""
    lines = sorted(lines, key=lambda line: line.verdict == QUOTED)
    head = ["Where", "What", "Paper", PROTOCOL, "n", "Verdict", WORST, "Verdict under it"]
    return pd.DataFrame([line.cells for line in lines], columns=head).set_index("Where")


def side_by_side() -> str:
    """Markdown: the paper beside every profile that has a report, here or published; side_by_side.md.

    Only what a profile measures: no quotations, and not the toy analysis, which is the same for all.
    """
    found, captions = [], []
    for name in PROFILES:
        places = [folder / name / "report.csv" for folder in (paths.FIGURES, paths.ROOT / "figures")]
        if written := next((place for place in places if place.exists()), None):
            rows = pd.read_csv(written, keep_default_na=False)
            rows = rows[(rows["Verdict"] != QUOTED) & ~rows["Where"].isin(TOY)]
            rows = rows.set_index(["Where", "What", "Paper"])
            for heading, columns in (
                ("the paper's protocol (n)", [PROTOCOL, "Verdict", "n"]),
                ("worst case on record", [WORST, "Verdict under it"]),
            ):
                cells = rows[columns].agg(lambda row: _cell(*row), axis=1)
                found.append(cells.rename(f"{name}: {heading}"))
            captions.append(written.with_suffix(".md").read_text().strip().split("\n\n")[-1])
    frame = pd.concat(found, axis=1, sort=False).fillna(NOTHING).reset_index().set_index("Where")
    text = "\n\n".join([tables.markdown(frame), *captions])
    path = publishing.note(paths.FIGURES / "side_by_side.md")
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
    return text


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


def figure(lines: Sequence[Line]) -> Figure:
    """What guidance is claimed to gain: the paper's differences, and ours with 95 % intervals in two ways."""
    # That training for a norm helps against attacks in it is no claim about guidance.
    gaps = [line for line in lines if isinstance(line.here, Difference) and line.where != "Fig. 2c"]
    drawn, axes = plt.subplots(figsize=(8.5, 0.9 + 0.42 * len(gaps)))
    places = np.arange(len(gaps))[::-1]
    for label, shift, marker, colour, differences in (
        ("here, the paper's protocol", 0.13, "o", COLOURS["coup"], [gap.here for gap in gaps]),
        ("here, worst case on record", -0.13, "s", "black", [gap.worst for gap in gaps]),
    ):
        rows = [(at + shift, one) for at, one in zip(places, differences, strict=True) if one != NOTHING]
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
