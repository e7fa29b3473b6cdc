"""The search of notebook 08: a guided purifier that keeps its gain under the worst of its attacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coup_lib.defences import CANDIDATES, LABELS, PURIFIERS, is_guided
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Accuracy, Difference, Score, WorstCase, worst_of
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import CLEAN, OF, AttackSpec, made_against, with_transfers
from coup_lib.reporting.plots import COLOURS, MARKERS, PALETTE, bars

BASELINE = "reverse"
RIVALS = ("reverse", "diffpure", "coup")
PLAIN = ("reverse", "averaged")  # without guidance; what is made against them is tried on all
WEIGHTS = {"smoke": (1.0,), "quick": (1.0,), "full": (0.5, 1.0, 3.0)}
SOURCES = {
    "clean": "Clean",
    "exact": "APGD-ce, exact",
    "first_order": "APGD-ce, first-order",
    "margin": "APGD on the margin, exact",
    "warm": "APGD-ce, first-order, warm start",
    "from_none": "Transfer from undefended",
    "from_reverse": "Transfer from reverse-only",
    "from_diffpure": "Transfer from DiffPure",
}
COLUMNS = SOURCES | {
    "lent": "Worst of all other transfers",
    "worst": "Worst of these attacks, per image",
    "recorded": "Worst case on record, per image",
}


@dataclass(frozen=True)
class Found:
    """What a setting's attacks found: name → score, and the worst case over those and all others on record.

    Settings are compared by the attacks that they all faced: on record the paper's own faced more.
    """

    scores: dict[str, Score]
    recorded: WorstCase


@dataclass(frozen=True)
class Setting:
    """A defence with its λ (None where there is no guidance)."""

    defence: str
    weight: float | None = None

    def __str__(self) -> str:
        return LABELS[self.defence] + ("" if self.weight is None else f", λ = {self.weight:g}")


def sources(defence: str) -> dict[str, AttackSpec]:
    """The same set of attackers for every defence, by the names of `SOURCES`."""
    undefended = against("apgd-ce", "none")
    return {
        "clean": CLEAN,
        "exact": against("apgd-ce", defence),
        "first_order": against("apgd-ce", defence, "first_order"),
        "margin": against("apgd-margin", defence),
        "warm": against("apgd-ce", defence, "first_order", start=undefended),
        "from_none": undefended,
        "from_reverse": against("apgd-ce", "reverse"),
        "from_diffpure": against("apgd-ce", "diffpure"),
    }


def settings(weights: Sequence[float]) -> list[Setting]:
    """The rivals and every candidate; each that is guided at every weight."""
    return [
        Setting(defence, weight)
        for defence in (*RIVALS, *CANDIDATES)
        for weight in (weights if is_guided(defence) else [None])
    ]


def scores(config: Config, chosen: Sequence[Setting], *, both_ways: bool = False) -> dict[Setting, Found]:
    """Every setting against its own set of sources, and against what is made against `PLAIN` ones.

    both_ways: what is made against any setting without guidance is tried on all, and what is made against a
    guided one on those without.
    """
    found: dict[Setting, dict[str, Score]] = {setting: {} for setting in chosen}
    plain = [setting for setting in chosen if both_ways and not is_guided(setting.defence)]
    lenders = (*PLAIN, *(setting.defence for setting in plain))
    for setting in chosen:
        defence, evaluation = setting.defence, _evaluation(config, setting)
        row = with_transfers({name: sources(name) for name in dict.fromkeys((*lenders, defence))})[defence]
        found[setting] |= evaluation.scores({defence: row})[defence]
        if is_guided(defence):
            made = made_against(defence, row, str(setting))
            for other in plain:
                found[other] |= evaluation.scores({other.defence: made})[other.defence]
    return {setting: Found(row, _recorded(config, setting, row)) for setting, row in found.items()}


def _evaluation(config: Config, setting: Setting) -> Evaluation:
    return Evaluation(config if setting.weight is None else replace(config, guidance_weight=setting.weight))


def _recorded(config: Config, setting: Setting, row: dict[str, Score]) -> WorstCase:
    return _evaluation(config, setting).recorded({setting.defence: row})[setting.defence]


def worst(found: Mapping[Setting, Found]) -> dict[Setting, np.ndarray]:
    """The share of right draws per image (n,) against the worst of the attacks here."""
    return {setting: worst_of(list(each.scores.values())) for setting, each in found.items()}


def shares(found: Found) -> dict[str, np.ndarray]:
    """The columns of `COLUMNS` of one setting: name → share of right draws per image (n,)."""
    row = found.scores
    own = {name: score.right for name, score in row.items() if OF not in name}
    lent = worst_of([score for name, score in row.items() if OF in name])
    return own | {"lent": lent, "worst": worst_of(list(row.values())), "recorded": found.recorded.right}


def best_guided(found: Mapping[Setting, Found]) -> Setting:
    """The guided setting, COUP's own among them, with the highest accuracy under the worst of its sources."""
    left = worst(found)
    guided = [setting for setting in found if is_guided(setting.defence)]
    return max(guided, key=lambda setting: float(left[setting].mean()))


def to_confirm(winner: Setting, weight: float) -> list[Setting]:
    """What is measured on the test split: the winner, the paper's COUP, and the controls of the winner."""
    return list(dict.fromkeys([*controls(winner), Setting("coup", weight), winner]))


def controls(winner: Setting) -> list[Setting]:
    """Without guidance: the baseline, and the winner's own purifier where that is another one.

    What averaging or forward noise does is not guidance's merit.
    """
    recipe = PURIFIERS[winner.defence]
    twin = next(
        name
        for name, other in PURIFIERS.items()
        if not other.guidance and (other.forward_noise, other.draws) == (recipe.forward_noise, recipe.draws)
    )
    return [Setting(name) for name in dict.fromkeys((BASELINE, twin))]


# --- what is shown ---


def table(found: Mapping[Setting, Found]) -> pd.DataFrame:
    """One row per setting, best worst case first, "accuracy [95 % interval]" in percent per column."""
    rows = {str(setting): shares(row) for setting, row in found.items()}
    cells = {
        name: {label: str(Accuracy.of(row[column])) for column, label in COLUMNS.items()}
        for name, row in sorted(rows.items(), key=lambda item: -float(item[1]["worst"].mean()))
    }
    return pd.DataFrame.from_dict(cells, orient="index").rename_axis("Purifier (%)")


def numbers(found: Mapping[Setting, Found]) -> pd.DataFrame:
    """The same in long form for a CSV."""
    rows = [
        {"defence": setting.defence, "guidance_weight": setting.weight, "source": name}
        | vars(Accuracy.of(right))
        for setting, row in found.items()
        for name, right in shares(row).items()
    ]
    return pd.DataFrame(rows)


def search_figure(found: Mapping[Setting, Found]) -> Figure:
    """Every setting's accuracy under exact, first-order and worst-of-sources attacks, best at the top."""
    left = worst(found)
    order = sorted(found, key=lambda setting: float(left[setting].mean()))
    figure, axes = plt.subplots(figsize=(8.2, 0.8 + 0.27 * len(order)))
    marks = (
        ("first_order", "first-order attack", ">", PALETTE[4]),
        ("exact", "exact attack", "<", PALETTE[0]),
    )
    for name, label, marker, colour in marks:
        accuracies = [found[setting].scores[name].mean.value for setting in order]
        axes.plot(accuracies, range(len(order)), marker, color=colour, markersize=5, label=label, alpha=0.8)
    values, errors = bars([left[setting] for setting in order])
    axes.errorbar(
        values,
        range(len(order)),
        xerr=errors,
        fmt="o",
        color="black",
        capsize=2.5,
        label="worst of these",
    )
    baseline = Accuracy.of(left[Setting(BASELINE)]).value
    axes.axvline(baseline, color=COLOURS[BASELINE], linewidth=1.2, zorder=0)
    axes.text(baseline, len(order) - 0.4, LABELS[BASELINE], color=COLOURS[BASELINE], ha="center", va="bottom")
    axes.set_yticks(range(len(order)), [str(setting) for setting in order])
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel(f"accuracy (%), n = {len(left[order[0]])}, 95 % interval")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.04), ncols=3)
    return figure


def confirm_figure(found: Mapping[Setting, Found]) -> Figure:
    """The confirmed settings: a group per source, a marker per setting, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(9.5, 4.0))
    looks = {name: (COLOURS[name], MARKERS[name]) for name in RIVALS} | {"averaged": (PALETTE[5], "p")}
    offsets = np.linspace(-0.24, 0.24, len(found))
    for offset, (setting, row) in zip(offsets, found.items(), strict=True):
        columns = shares(row)
        right = [columns[name] for name in COLUMNS]
        colour, marker = looks.get(setting.defence, (PALETTE[3], "^"))
        axes.errorbar(
            np.arange(len(COLUMNS)) + offset,
            *bars(right),
            fmt=marker,
            color=colour,
            label=str(setting),
            markersize=5,
            capsize=2.5,
        )
    wrapped = [fill(label, 12, break_on_hyphens=False) for label in COLUMNS.values()]
    axes.set_xticks(range(len(COLUMNS)), wrapped, fontsize="small")
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    for edge in range(1, len(COLUMNS)):
        axes.axvline(edge - 0.5, color="0.88", linewidth=0.8, zorder=0)
    axes.set(xlim=(-0.5, len(COLUMNS) - 0.5), ylim=(0, 102))
    axes.set_ylabel(f"accuracy (%), n = {len(right[0])}, 95 % interval")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=4)
    return figure


def verdict_lines(found: Mapping[Setting, Found], winner: Setting) -> str:
    """Markdown: paired differences of the winner to its rivals, by these attacks and by exact ones."""
    left = worst(found)
    lines = []
    for rival in found:
        if rival == winner:
            continue
        difference = Difference.of(left[winner], left[rival])
        exact = Difference.of(found[winner].scores["exact"].right, found[rival].scores["exact"].right)
        lines.append(
            f"- *{winner}* is more robust than *{rival}*: under the worst of these attacks this "
            f"**{difference.verdict}** ({difference}); under each one's own exact attack it "
            f"**{exact.verdict}** ({exact})."
        )
    beaten = all(Difference.of(left[winner], left[rival]).low > 0 for rival in controls(winner))
    closing = (
        f"**On these images {winner} keeps its gain under the worst of these attacks.**"
        if beaten
        else "**No guided purifier of this search is shown to keep a gain under the worst of these attacks.**"
    )
    if PURIFIERS[winner.defence].robust_guide:
        closing += (
            f" The guide of “{winner}” was adversarially trained in the norm of the attack: it is not a "
            "defence that assumes nothing of the attack. What that classifier keeps when it decides "
            "itself is in notebook 06."
        )
    faced = ", ".join(f"{setting}: {each.recorded.n_sources}" for setting, each in found.items())
    lines += ["", f"Attacks on record, which are not the same for all: {faced}."]
    return "\n".join([f"n = {len(left[winner])}, paired 95 % intervals:", "", *lines, "", closing])
