"""The search of notebook 08: a guided purifier that keeps its gain under the worst of its attacks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from coup_lib.defences import CANDIDATES, LABELS, PURIFIERS, is_guided
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import (
    Difference,
    Predictions,
    WorstCase,
    direct,
    transferred,
    worst_of,
)
from coup_lib.evaluation.protocol import Evaluation, Experiment
from coup_lib.evaluation.specs import CLEAN, AttackSpec, made_against, with_transfers
from coup_lib.reporting import tables

BASELINE = "reverse"
RIVALS = ("reverse", "diffpure", "coup")
PLAIN = ("reverse", "averaged")  # without guidance; what is made against them is tried on all
WEIGHTS = {"smoke": (1.0,), "quick": (1.0,), "full": (0.5, 1.0, 3.0)}
LOOKING = 8  # iterations of the attack that looks at every draw: half of the others' or fewer
SOURCES = {
    "clean": "Clean",
    "exact": "APGD-ce, exact",
    "first_order": "APGD-ce, first-order",
    "margin": "APGD on the margin, exact",
    "warm": "APGD-ce, first-order, warm start",
    "worst_draw": "Worst draw, first-order",
    "from_none": "Transfer from undefended",
    "from_reverse": "Transfer from reverse SDE",
    "from_diffpure": "Transfer from DiffPure",
}
COLUMNS = SOURCES | {
    "transferred": "Worst other transfer, per image",
    "worst": tables.COLUMNS["worst"],
    "recorded": tables.COLUMNS["recorded"],
}
JUDGED = {"exact": "Each one's own exact attack", "worst": COLUMNS["worst"]}


@dataclass(frozen=True)
class Found:
    """What a setting's attacks found: key → score, and the worst case over those and all others on record.

    Settings are compared by the attacks that they all faced: on record the paper's own faced more.
    """

    scores: dict[Any, Predictions]
    recorded: WorstCase

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """The columns of `COLUMNS`: column → share of right draws per image, (n,)."""
        found = {name: score.right for name, score in direct(self.scores).items()}
        if others := transferred(self.scores):
            found["transferred"] = worst_of([*others.values()])
        found["worst"] = worst_of([*self.scores.values()])
        return found | {"recorded": self.recorded.right}


@dataclass(frozen=True)
class Setting:
    """A defence with its λ (None where there is no guidance)."""

    defence: str
    weight: float | None = None

    def __str__(self) -> str:
        return LABELS[self.defence] + ("" if self.weight is None else f", λ = {self.weight:g}")


def sources(defence: str) -> dict[str, AttackSpec]:
    """The attacks that a defence faces, of the same kinds for every defence, by the names of `SOURCES`.

    "warm" and "worst_draw" go by the gradient that is the stronger one: first-order, but exact where the
    guidance is made from the attacked image.
    """
    undefended = against("apgd-ce", "none")
    stronger = "exact" if defence in PURIFIERS and PURIFIERS[defence].reads_image else "first_order"
    return {
        "clean": CLEAN,
        "exact": against("apgd-ce", defence),
        "first_order": against("apgd-ce", defence, "first_order"),
        "margin": against("apgd-margin", defence),
        "warm": against("apgd-ce", defence, stronger, start=undefended),
        "worst_draw": against("worst-draw", defence, stronger, n_iter=LOOKING),
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


def measure(
    config: Config, chosen: Sequence[Setting], *, lent: Sequence[str] = PLAIN, both_ways: bool = False
) -> dict[Setting, Found]:
    """Every setting against its own set of sources, and against what is made against those in `lent`.

    both_ways: what is made against any setting without guidance is tried on all, and what is made against a
    guided one on those without.
    """
    found: dict[Setting, dict[Any, Predictions]] = {setting: {} for setting in chosen}
    for setting, experiment in experiments(config, chosen, lent=lent, both_ways=both_ways):
        for row in experiment.predictions().values():
            found[setting] |= row
    return {setting: Found(row, _recorded(config, setting, row)) for setting, row in found.items()}


def experiments(
    config: Config, chosen: Sequence[Setting], *, lent: Sequence[str] = PLAIN, both_ways: bool = False
) -> list[tuple[Setting, Experiment]]:
    """What each setting faces, in the order of `measure`; a setting may have several parts."""
    found = []
    plain = [setting for setting in chosen if both_ways and not is_guided(setting.defence)]
    surrogates = (*lent, *(setting.defence for setting in plain))
    for setting in chosen:
        here, defence = at(config, setting), setting.defence
        row = with_transfers({name: sources(name) for name in dict.fromkeys((*surrogates, defence))})[defence]
        found.append((setting, Experiment(here, {defence: row})))
        if is_guided(defence):
            made = made_against(defence, row, str(setting))
            found += [(other, Experiment(here, {other.defence: made})) for other in plain]
    return found


def at(config: Config, setting: Setting) -> Config:
    """The configuration with the setting's λ, if it has one."""
    return config if setting.weight is None else replace(config, guidance_weight=setting.weight)


def _recorded(config: Config, setting: Setting, row: dict[str, Predictions]) -> WorstCase:
    return Evaluation(at(config, setting)).recorded({setting.defence: row})[setting.defence]


def best_guided(found: Mapping[Setting, Found]) -> Setting:
    """The guided setting, COUP's own among them, with the highest accuracy under the worst of its sources."""
    return best(found, [setting.defence for setting in found if is_guided(setting.defence)])


def best(found: Mapping[Setting, Found], defences: Collection[str]) -> Setting:
    """The setting of these defences with the highest accuracy under the worst of its sources."""
    possible = [setting for setting in found if setting.defence in defences]
    return max(possible, key=lambda setting: float(found[setting].right["worst"].mean()))


def to_confirm(winner: Setting, weight: float) -> list[Setting]:
    """What is measured on the test split: the winner, the paper's COUP, and the controls of the winner."""
    return list(dict.fromkeys([*controls(winner), Setting("coup", weight), winner]))


def controls(winner: Setting) -> list[Setting]:
    """Without guidance: the baseline, and the winner's own purifier where that is another one.

    What averaging or forward noise does is not guidance's merit.
    """
    return list(dict.fromkeys((Setting(BASELINE), twin(winner))))


def twin(setting: Setting) -> Setting:
    """A guided setting's own purifier without guidance; the baseline of one that has no guidance."""
    if setting.weight is None:
        return Setting(BASELINE)
    same = ("path", "draws", "maximised")
    recipe = PURIFIERS[setting.defence]
    return next(
        Setting(name)
        for name, other in PURIFIERS.items()
        if not other.guidance and all(getattr(other, field) == getattr(recipe, field) for field in same)
    )


# --- what is shown ---


def rows(found: Mapping[Setting, Found], config: Config) -> list[tables.Row]:
    """A row of a table per setting, the one with the best worst case first."""
    return [
        tables.Row(
            str(setting), each.right, config, {"defence": setting.defence, "guidance_weight": setting.weight}
        )
        for setting, each in sorted(found.items(), key=lambda item: -float(item[1].right["worst"].mean()))
    ]


def verdict(found: Mapping[Setting, Found], winner: Setting) -> str:
    """Markdown: paired differences of the winner to its rivals, and whether it keeps a gain over controls."""
    pairs = {
        f"{winner} is more robust than {rival}": (found[winner].right, each.right)
        for rival, each in found.items()
        if rival != winner
    }
    beaten = all(
        Difference.of(found[winner].right["worst"], found[control].right["worst"]).low > 0
        for control in controls(winner)
    )
    closing = (
        f"**On these images {winner} keeps its gain under the worst of these attacks.**"
        if beaten
        else "**No guided purifier of this search is shown to keep a gain under the worst of these attacks.**"
    )
    faced = ", ".join(f"{setting}: {each.recorded.n_sources}" for setting, each in found.items())
    return "\n\n".join(
        [
            tables.claims(pairs, JUDGED),
            closing,
            f"Attacks on record, which are not the same for all: {faced}.",
        ]
    )
