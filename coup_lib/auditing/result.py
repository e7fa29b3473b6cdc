"""What an audit found: verdicts, tables, warnings, a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coup_lib.auditing.page import html_page
from coup_lib.auditing.probe import Probe
from coup_lib.auditing.protocol import AuditSettings, Measured
from coup_lib.auditing.signs import Sign, signs, strongest_of
from coup_lib.checks import choice
from coup_lib.evaluation.config import NORM_NAMES, radius
from coup_lib.evaluation.outcomes import (
    Accuracy,
    Difference,
    Transfer,
    WorstCase,
    direct,
    transferred,
    worst_case,
    worst_of,
)
from coup_lib.files import write_atomically
from coup_lib.reporting.plots import PALETTE, picture, points, use_style
from coup_lib.reporting.tables import Row, accuracies, by_count, count_headings, long_form, markdown

WORST = "worst case"
LOOKS = "osDXp^vP*<>"  # markers, in the order of the defences
ALTERNATIVE = "Accuracy of every defence under every attack, and against the radius"
CAPTION = (
    "Accuracies in % with 95 % intervals, of one fresh draw that no attack has seen. The worst case takes "
    "each image's worst attack, chosen by other draws than those that are reported; its interval is for what "
    "these attacks leave, and a stronger one may leave less. Of its own attacks are all that see the defence "
    "and random noise; AutoAttack's images are scored like all others, not by its own count."
)
DECIDED = (
    "A defender may draw N times, and take the mean of the logits or the majority; an attacker may submit "
    "again, so that all N draws have to be right. Each way under the worst of the attacks that were scored "
    "by N draws: for the larger N, the strongest one and the one on the vote. Clean images are the control: "
    "what falls there falls unattacked."
)
OUTSIDE = (
    "Filters and flows, each within a reach of its own. The radius does not bound them, so none of them is "
    "counted in a worst case or a verdict; a defence without a gradient is left out."
)


@dataclass(frozen=True)
class Audit:
    """What an audit found. All accuracies are of one fresh draw, in percent, with 95 % intervals.

    probes: defence → what was found out beforehand. measured: every attack's outcome. folder: of the records,
    and where `save` writes.
    """

    probes: Mapping[str, Probe]
    measured: Measured
    settings: AuditSettings
    folder: Path

    @cached_property
    def worst(self) -> dict[str, WorstCase]:
        """Defence → each image under the attack that is worst for it."""
        return {name: worst_case([*row.values()]) for name, row in self.measured.rows.items()}

    @cached_property
    def signs(self) -> list[Sign]:
        """Every sign of gradient masking, and what else there is to know."""
        found = self.measured
        return [
            sign
            for name, row in found.rows.items()
            for sign in signs(name, self.probes[name], row, _labels(found, name), found.eps.get(name, {}))
        ]

    @property
    def warnings(self) -> list[str]:
        """The signs in words."""
        return [str(sign) for sign in self.signs]

    def masked(self, name: str) -> bool:
        """Whether a defence shows any sign of gradient masking."""
        return any(sign.masking for sign in self.signs if sign.defence == name)

    def verdict(self, name: str) -> str:
        """What is known of a defence's robustness, in one or two sentences."""
        accuracy, row = Accuracy.of(self.worst[name].right), self.measured.rows[name]
        labels = _labels(self.measured, name)
        best = strongest_of([*row], {key: score.selection for key, score in row.items()})
        text = (
            f"**{name}**: robust accuracy at most {accuracy.value:.1f} % [{accuracy.low:.1f}, "
            f"{accuracy.high:.1f}] ({self.threat}; the worst of {len(row) - 1} attacks on each image; the "
            f"strongest one, {labels[best]}, leaves {100 * row[best].right.mean():.1f} %)."
        )
        if row[best].right.mean() < self.worst[name].right.mean():
            text += (
                " Chosen by other draws than are reported, the worst attacks may leave a little more than it."
            )
        if self.probes[name].changed:
            text += " This is no bound: its answers change with use, and another copy of it may do worse."
        if self.probes[name].error:
            text += f" It has no gradient of its own, so this rests on {_instead(self.measured, name)}."
        shown = [sign.name for sign in self.signs if sign.defence == name and sign.masking]
        return f"{text} Signs of gradient masking: {'; '.join(shown) or 'none'}."

    @property
    def threat(self) -> str:
        """The norm, the radius and the number of images."""
        settings = self.settings
        return f"{NORM_NAMES[settings.norm]}, eps = {radius(settings.eps)}, n = {settings.n_images}"

    def table(self) -> pd.DataFrame:
        """One row per defence: clean, under its own attacks, transfers, AutoAttack, and in the worst case."""
        rows = []
        for name, row in self.measured.rows.items():
            own = [score for key, score in direct(row).items() if key != "clean"]
            right = {"Clean": row["clean"].right, "Its own attacks": worst_of(own)}
            if lent := [*transferred(row).values()]:
                right["Transfers"] = worst_of(lent)
            if "standard" in row:
                right["AutoAttack standard"] = row["standard"].right
            right["Worst case"] = self.worst[name].right
            rows.append(Row(name, right, self.settings, {"defence": name}))
        names = ("Clean", "Its own attacks", "Transfers", "AutoAttack standard", "Worst case")
        found = accuracies(rows, dict(zip(names, names, strict=True)), "Accuracy (%)")
        return found.assign(n=self.settings.n_images)

    def attacks(self) -> pd.DataFrame:
        """One row per attack and for the worst case, one column per defence."""
        return accuracies(_rows(self), _headings(self)).T.rename_axis("Accuracy (%) under")

    def decisions(self) -> pd.DataFrame:
        """Random defences, decided by N draws: in the worst case, and on clean images."""
        rows: list[Row] = []
        settings = self.settings
        for n, columns in ((settings.n_draws, self.measured.rows), (settings.many_draws, self.measured.many)):
            faced = {name: columns[name] for name in self.measured.many}
            worst = {name: worst_case([*row.values()]) for name, row in faced.items()}
            rows += [
                Row(name, right, settings, {"defence": name}, {"N": str(n)})
                for name, right in by_count(faced, worst, n).items()
            ]
        title = "Decided by N draws (%)"
        return accuracies(rows, count_headings("N"), title) if rows else pd.DataFrame()

    def outside(self) -> pd.DataFrame:
        """One row per attack outside the ball, one column per defence, if they were asked for."""
        found = [Row(name, right, self.settings, {}) for name, right in self.measured.outside.items()]
        head = {label: label for row in found[:1] for label in row.right}
        return accuracies(found, head).T.rename_axis("Accuracy outside the ball (%)")

    def claim(self, better: str, than: str) -> str:
        """The verdict on "better is more robust than …", by the paired difference of the worst cases.

        ValueError for a defence that was not audited.
        """
        for name in (better, than):
            choice("defence", name, self.worst)
        found = Difference.of(self.worst[better].right, self.worst[than].right)
        return f"{better} is more robust than {than}: **{found.verdict}** ({found}; {self.threat})"

    @property
    def claims(self) -> list[str]:
        """The `claim` that the first defence is more robust than each of the others."""
        first, *others = self.worst
        return [self.claim(first, other) for other in others]

    def figure(self) -> Figure:
        """Accuracy under every attack, and against the radius."""
        return _figure(self)

    def text(self) -> str:
        """The whole audit in Markdown: verdicts, tables and warnings; the figure is audit.png beside it."""
        return _text(self)

    def save(self) -> Path:
        """Write audit.md, audit.csv, audit.png and audit.html into the folder; the path of the last one."""
        text, png = self.text(), picture(self.figure(), ALTERNATIVE).data
        files = {
            "audit.md": text.encode(),
            "audit.csv": long_form(_rows(self), _headings(self)).to_csv(index=False).encode(),
            "audit.png": png,
            "audit.html": html_page(text, {"audit.png": png}).encode(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(self.folder / name, partial(Path.write_bytes, data=content))
        return self.folder / "audit.html"


def _rows(audit: Audit) -> list[Row]:
    """Every defence under its attacks and in the worst case; the columns are what attacks are called."""
    rows = []
    for name, row in audit.measured.rows.items():
        right = {label: row[key].right for key, label in _labels(audit.measured, name).items()}
        right[WORST] = audit.worst[name].right
        rows.append(Row(name, right, audit.settings, {"defence": name}))
    return rows


def _headings(audit: Audit) -> dict[str, str]:
    """All columns: own attacks, those that were made against others, the worst case, clean images."""
    called = {key: label for name in audit.worst for key, label in _labels(audit.measured, name).items()}
    clean = called.pop("clean")
    order = sorted(called, key=lambda key: isinstance(key, Transfer))
    return {label: label for label in [*(called[key] for key in order), WORST, clean]}


def _figure(audit: Audit) -> Figure:
    use_style()
    labels, rows = [*_headings(audit)], _rows(audit)
    figure, (under, larger) = plt.subplots(
        1, 2, figsize=(9.5, 1.2 + 0.24 * len(labels)), width_ratios=(3, 2), layout="constrained"
    )
    for place, (row, offset) in enumerate(zip(rows, np.linspace(-0.25, 0.25, len(rows)), strict=True)):
        name, marker = row.label, LOOKS[place % len(LOOKS)]
        look: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "markersize": 4.5}
        places = [labels.index(label) + offset for label in row.right]
        points(under, places, [*row.right.values()], sideways=True, fmt=marker, label=name, **look)
        by_radius = audit.measured.eps.get(name, {})
        if by_radius:
            places = np.arange(len(by_radius)) + 0.3 * offset
            points(larger, places, [*by_radius.values()], fmt=f"{marker}-", **look)
            ticks = [radius(value) for value in by_radius]
            larger.set_xticks(range(len(ticks)), ticks)
    under.axhspan(len(labels) - 2.5, len(labels) - 1.5, color="#fff3c4", zorder=-1)
    under.set_yticks(range(len(labels)), labels)
    under.set(xlim=(-2, 102), ylim=(len(labels) - 0.5, -0.5))
    under.set_xlabel(f"accuracy (%), one draw, n = {audit.settings.n_images}, 95 % interval")
    under.grid(visible=False, axis="y")
    larger.set(ylim=(-2, 102), ylabel="accuracy (%), 95 % interval")
    tried = {len(right) for by_radius in audit.measured.eps.values() for right in by_radius.values()}
    larger.set_xlabel(f"{NORM_NAMES[audit.settings.norm]} radius, under APGD-ce, n = {max(tried, default=0)}")
    figure.legend(loc="outside upper center", ncols=min(len(rows), 4))
    return figure


def _text(audit: Audit) -> str:
    parts = ["# Audit", *map(audit.verdict, audit.worst), *audit.claims, markdown(audit.table())]
    parts += [f"{audit.threat}. {CAPTION}", f"![{ALTERNATIVE}](audit.png)"]
    parts += ["## Warnings", "\n".join(f"- {text}" for text in audit.warnings or ["none"])]
    parts += ["## Every attack", markdown(audit.attacks())]
    if audit.measured.hidden:
        names = ", ".join(audit.measured.hidden)
        parts += [f"Left out: per-step losses, which take a path whose states are shown, of {names}."]
    if audit.measured.many:
        parts += ["## Decisions by several draws", DECIDED, markdown(audit.decisions())]
    if audit.measured.outside:
        parts += ["## Outside the ball", f"n = {audit.settings.n_images}. {OUTSIDE}"]
        parts += [markdown(audit.outside())]
    return "\n\n".join(parts) + "\n"


def _instead(measured: Measured, name: str) -> str:
    """What attacked a defence without a gradient."""
    others = [key.removesuffix("-ce") for key in measured.labels[name] if key.endswith("-ce")]
    shown = [f"the gradient called {gradient}" for gradient in others] + ["a black box"]
    borrowed = ["what others' gradients found"] if transferred(measured.rows[name]) else []
    return " and on ".join([", on ".join(shown), *borrowed])


def _labels(measured: Measured, name: str) -> dict[Any, str]:
    """Column or transfer of a defence's row → what the attack is called."""
    return {
        key: f"{measured.labels[key.surrogate][key.column]}, made against {key.surrogate}"
        if isinstance(key, Transfer)
        else measured.labels[name][key]
        for key in measured.rows[name]
    }
