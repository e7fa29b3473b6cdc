"""One table of accuracies, one long form for CSV files, one table of claims."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from coup_lib import paths
from coup_lib.defences import LABELS
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.outcomes import (
    RULES,
    Accuracy,
    Difference,
    Predictions,
    WorstCase,
    direct,
    transferred,
    worst_of,
)
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import Rows
from coup_lib.files import write_atomically
from coup_lib.reporting import publishing
from coup_lib.reporting.paper import Reported

Right = Mapping[str, np.ndarray]  # column → share of right draws of each image, (n,)
PerImage = dict[str, dict[str, np.ndarray]]  # defence → column → share of right draws of each image, (n,)

COLUMNS = {
    "clean": "Clean accuracy",
    "standard": "AutoAttack standard",
    "rand": "AutoAttack rand",
    "adaptive": "APGD-ce, {gradient}",
    "dlr": "APGD-dlr, {gradient}",
    "first_order": "APGD-ce, first-order",
    "bpda": "APGD-ce, BPDA",
    "from_none": "Transfer from undefended",
    "from_reverse": "Transfer from reverse SDE",
    "transferred": "Worst transfer, per image",
    "worst": "Worst of these attacks, per image",
    "recorded": "Worst case on record, per image",
    "own_standard": "Counted by AutoAttack: standard",
    "own_rand": "Counted by AutoAttack: rand",
    "autoattack": "Counted by AutoAttack: worse of the two",
}
NAMED = {"from_none", "from_reverse"}  # transfers that have a column of their own
MISSING = "–"


def per_image_accuracy(
    columns: Mapping[str, Mapping[Any, Predictions]], recorded: Mapping[str, WorstCase] | None = None
) -> PerImage:
    """Defence → column → share of right draws of each image, (n,); some columns are added.

    "transferred" is the worst of what was made against other defences, which has no column of its own but
    from_none and from_reverse. With `recorded`, from `Evaluation.recorded`, there is "recorded"; otherwise
    "worst", of these attacks alone, for settings that different notebooks attacked to different degrees.

    AutoAttack's two versions are columns on fresh draws: "standard" is an attack, "rand" the worse of APGD-ce
    and APGD-dlr. AutoAttack's own counts, by the single draws that it looked at, stand apart; the paper's
    robustness ("autoattack") is the lower of the two counts.
    """
    result: PerImage = {}
    for defence, row in columns.items():
        found = {name: score.right for name, score in direct(row).items()}
        named = [score for name, score in direct(row).items() if name in NAMED - {f"from_{defence}"}]
        found["transferred"] = worst_of([*named, *transferred(row).values()])
        if recorded is None:
            found["worst"] = worst_of(list(row.values()))
        else:
            found["recorded"] = recorded[defence].right
        if "standard" in row:
            found["rand"] = worst_of([row["adaptive"], row["dlr"]])
            found["own_standard"] = row["standard"].counted
            found["own_rand"] = row["adaptive"].counted_with(row["dlr"])
            found["autoattack"] = min(found["own_standard"], found["own_rand"], key=np.mean)
        result[defence] = found
    return result


def measured(evaluation: Evaluation, attacks: Rows) -> PerImage:
    """What defences leave under their attacks, see `per_image_accuracy`, and in the worst case on record."""
    columns = evaluation.predictions(attacks)
    return per_image_accuracy(columns, evaluation.recorded(columns))


def by_count(
    columns: Mapping[str, Mapping[Any, Predictions]], recorded: Mapping[str, WorstCase], draws: int
) -> PerImage:
    """Defence → way to decide by so many draws → share of right decisions per image, (n,).

    In the worst case on record, and as a control on clean images, where "clean_" begins the name.
    """
    return {
        defence: recorded[defence].decided(draws)
        | {f"clean_{rule}": row["clean"].decided(rule) for rule in RULES}
        for defence, row in columns.items()
    }


def count_headings(draws: int | str) -> dict[str, str]:
    """The columns of `by_count` with their headings."""
    said = {
        "single": "one draw",
        "worst_draw": f"all of {draws} draws",
        "majority": f"majority of {draws}",
        "averaged": f"mean logits of {draws}",
    }
    clean = {f"clean_{rule}": f"Clean: {label}" for rule, label in said.items()}
    return {rule: f"Worst case: {label}" for rule, label in said.items()} | clean


def headings(right: Container[str], config: Config) -> dict[str, str]:
    """Those of `COLUMNS` that are there, in the order of a table, with their headings."""
    gradient = config.gradient.replace("_", "-")
    return {name: label.format(gradient=gradient) for name, label in COLUMNS.items() if name in right}


# --- Accuracies -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a table of accuracies.

    label: its name. right: column → share of right draws of each image, (n,). config: what it was measured
    under. keys: what tells it from other rows in a CSV file. shown: cells before the accuracies.
    """

    label: str
    right: Right
    config: Any  # a `Config`, or the settings of an audit
    keys: Mapping[str, Any]
    shown: Mapping[str, str] = field(default_factory=dict)


def rows(
    results: Mapping[str, Mapping[Any, np.ndarray]],
    config: Config,
    shown: Mapping[str, str] | None = None,
    **keys: Any,
) -> list[Row]:
    """One row per defence, by the defence's label; shown and keys are those of `Row`."""
    return [
        Row(LABELS[defence], right, config, keys | {"defence": defence}, shown or {})
        for defence, right in results.items()
    ]


def accuracies(
    found: Sequence[Row], names: Mapping[str, str], title: str = "Defence, measured here (%)"
) -> pd.DataFrame:
    """One line per row, "accuracy [95 % interval]" in percent per column; names: column → heading."""
    lines = [
        {title: row.label, **row.shown}
        | {
            label: str(Accuracy.of(row.right[name])) if name in row.right else MISSING
            for name, label in names.items()
        }
        for row in found
    ]
    return pd.DataFrame(lines).set_index(title)


def long_form(found: Sequence[Row], names: Mapping[str, str]) -> pd.DataFrame:
    """One line per row and column, with the accuracy, its interval, n and the threat."""
    return pd.DataFrame(
        [
            {**row.keys, "column": name, "label": label}
            | vars(Accuracy.of(row.right[name]))
            | {"norm": row.config.norm, "eps": row.config.eps, "budget": row.config.budget}
            for row in found
            for name, label in names.items()
            if name in row.right
        ]
    )


def write_accuracies(
    found: Sequence[Row],
    name: str,
    caption: str,
    names: Mapping[str, str] | None = None,
    title: str = "Defence, measured here (%)",
) -> str:
    """Write the table of accuracies and its long form, see `write`; names: by default `headings`."""
    config = found[0].config
    names = names or headings(found[0].right, config)
    return write(accuracies(found, names, title), config, name, caption, long_form(found, names))


def beside_paper(
    quoted: Iterable[Reported], reported: Iterable[Reported], measured: Sequence[Row], robustness: str
) -> pd.DataFrame:
    """One of the paper's tables: what it quotes, what it reports, and ours with n and 95 % interval.

    robustness: the column that stands for the paper's robustness.
    """

    def said(row: Reported, source: str) -> list[str]:
        accuracy = MISSING if np.isnan(row.accuracy) else f"{row.accuracy:.2f}"
        return [row.defence, accuracy, f"{row.robustness:.2f}", source]

    lines = [said(row, "quoted by the paper") for row in quoted]
    lines += [said(row, "reported by the paper") for row in reported]
    for row in measured:
        clean, robust = (Accuracy.of(row.right[name]) for name in ("clean", robustness))
        source = ", ".join(
            [f"measured here, {row.config.profile}, n = {row.config.n_images}", *row.shown.values()]
        )
        lines.append([row.label, str(clean), str(robust), source])
    frame = pd.DataFrame(lines, columns=["Defence", "Accuracy (%)", "Robustness (%)", "Source"])
    return frame.set_index("Defence")


# --- Claims -----------------------------------------------------------------------------------------------


def coup_claims(
    results: Mapping[str, Right], reported: Mapping[str, Reported] | None = None, where: str = ""
) -> dict[str, tuple[Right, Right]]:
    """Claim → (COUP's columns, the rival's), for `claims`.

    reported: the paper's rows, of which the claims quote the difference. where: begins every claim.
    """
    reported, found = reported or {}, {}
    for rival in ("reverse", "diffpure"):
        gap = reported["coup"].robustness - reported[rival].robustness if rival in reported else None
        says = "" if gap is None else f" (the paper reports {gap:+.2f})"
        found[f"{where}COUP is more robust than {LABELS[rival]}{says}"] = results["coup"], results[rival]
    return found


def judged(protocol: str) -> dict[str, str]:
    """The two columns that a claim is judged by: the paper's protocol, and the worst case on record."""
    how = "counted by AutoAttack" if protocol == "autoattack" else "APGD-ce"
    return {protocol: f"The paper's protocol, {how}", "recorded": COLUMNS["recorded"]}


def claims(pairs: Mapping[str, tuple[Right, Right]], names: Mapping[str, str]) -> str:
    """Markdown: per claim and column the verdict, and the paired difference that it rests on.

    Args:
        pairs: claim → (what is said to be more accurate, than what), on the same images.
        names: column → heading.
    """
    lines, n = {}, 0
    for claim, (better, than) in pairs.items():
        found = {label: Difference.of(better[name], than[name]) for name, label in names.items()}
        n = next(iter(found.values())).n
        lines[claim] = {label: f"**{one.verdict}** ({one})" for label, one in found.items()}
    frame = pd.DataFrame.from_dict(lines, orient="index").rename_axis("Claim")
    return f"{markdown(frame)}\n\nn = {n}; paired differences with 95 % intervals."


def attack_claims(rows: Mapping[str, Right], claim: str, more: str, less: str, heading: str) -> str:
    """Markdown, see `claims`: of each defence, by its name, the attack `more` leaves more than `less`."""
    pairs = {
        f"{name}: {claim}": ({"left": right[more]}, {"left": right[less]}) for name, right in rows.items()
    }
    return claims(pairs, {"left": heading})


# --- Captions and files -----------------------------------------------------------------------------------

SPENT = {
    "n_images": "images",
    "n_iter": "iterations",
    "eot": "EOT draws",
    "n_targets": "target classes",
    "square_queries": "Square queries",
}
APGD = ("n_images", "n_iter", "eot")


def caption(
    *configs: Config, classifiers: Iterable[str] = (), spent: Iterable[str] = APGD, note: str = ""
) -> str:
    """What stands behind the numbers: images, threats, defence, attack budgets, draws and seed.

    Args:
        configs: that differ in their threat alone.
        classifiers: by default the configuration's.
        spent: the parts of the budget, out of `SPENT`, that the attacks take.
    """
    config, full = configs[0], configs[0].setup.budgets["report"]["full"]
    threats = " and ".join(
        f"{NORM_NAMES[one.norm]}, eps = {radius(one.eps)}; t* = {one.t_star:g}" for one in configs
    )
    sizes = [f"{getattr(config, name)}/{getattr(full, name)} {SPENT[name]}" for name in spent]
    return (
        f"{config.profile}, {config.split} split, {', '.join(classifiers or [config.classifier])}; "
        f"{threats}, N = {config.n_steps}, λ = {config.guidance_weight:g}; spent of the paper's protocol: "
        f"{', '.join(sizes)}; {config.seed_label}. Accuracies in % with 95 % interval, averaged over "
        f"{config.n_draws} fresh noise draws per image. {note}"
    ).rstrip()


def write(
    frame: pd.DataFrame, config: Config, name: str, caption: str, long: pd.DataFrame | None = None
) -> str:
    """Write figures/<profile>/<name>.md (with its caption) and .csv; returns the Markdown."""
    write_text((frame if long is None else long).to_csv(index=long is None), config, name, ".csv")
    return write_text(f"{markdown(frame)}\n\n{caption}\n", config, name)


def write_text(text: str, config: Config, name: str, suffix: str = ".md") -> str:
    """Write a text to figures/<profile>/<name><suffix> and return it."""
    folder = paths.FIGURES / config.profile
    folder.mkdir(parents=True, exist_ok=True)
    path = publishing.note(folder / f"{name}{suffix}", config)
    write_atomically(path, lambda temporary: temporary.write_text(text.rstrip() + "\n"))
    return text


def markdown(frame: pd.DataFrame) -> str:
    """The frame, index first, as a Markdown table."""
    head = [frame.index.name or "", *frame.columns]
    body = [[index, *row] for index, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
