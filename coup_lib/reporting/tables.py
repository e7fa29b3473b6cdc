"""Tables and sentences, made from scores and never typed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from coup_lib import paths
from coup_lib.defences import LABELS
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.outcomes import Accuracy, Difference, Score, WorstCase, lowest, worst_of
from coup_lib.evaluation.specs import OF
from coup_lib.files import write_atomically
from coup_lib.reporting import paper

Shares = dict[str, dict[str, np.ndarray]]

TRANSFERS = {"from_none", "from_reverse"}

COLUMNS = {
    "clean": "Clean accuracy",
    "standard": "AutoAttack standard",
    "rand": "AutoAttack rand",
    "adaptive": "APGD-ce, {gradient}",
    "dlr": "APGD-dlr, {gradient}",
    "first_order": "APGD-ce, first-order",
    "bpda": "APGD-ce, BPDA",
    "from_none": "Transfer from undefended",
    "from_reverse": "Transfer from reverse-only",
    "lent": "Worst of all transfers",
    "worst": "Worst of these attacks, per image",
    "recorded": "Worst case on record, per image",
    "own_standard": "Counted by AutoAttack: standard",
    "own_rand": "Counted by AutoAttack: rand",
    "autoattack": "Counted by AutoAttack: worse of the two",
}


def shares(
    columns: Mapping[str, Mapping[str, Score]], recorded: Mapping[str, WorstCase] | None = None
) -> Shares:
    """Per defence and column the share of right draws of each image, (n,); some columns are added.

    "lent" is the worst of those sources that were made against other defences, which have no column of their
    own but from_none and from_reverse. With `recorded`, from `Evaluation.recorded`, there is "recorded", else
    "worst", of these sources alone: for settings that were not all attacked by the same notebooks.

    AutoAttack's two versions are columns like the others, on fresh draws: "standard" is an attack, "rand" the
    worse of APGD-ce and APGD-dlr. Its own counts, by the single draws that it looked at, stand apart; the
    paper's robustness ("autoattack") is the one with fewer images left.
    """
    result: Shares = {}
    for defence, row in columns.items():
        found = {name: score.right for name, score in row.items() if OF not in name}
        transfers = TRANSFERS - {f"from_{defence}"}
        found["lent"] = worst_of([score for name, score in row.items() if OF in name or name in transfers])
        if recorded is None:
            found["worst"] = worst_of(list(row.values()))
        else:
            found["recorded"] = recorded[defence].right
        if "standard" in row:
            found["rand"] = worst_of([row["adaptive"], row["dlr"]])
            found["own_standard"] = row["standard"].counted
            found["own_rand"] = row["adaptive"].counted * row["dlr"].counted
            found["autoattack"] = lowest([found["own_standard"], found["own_rand"]])
        result[defence] = found
    return result


def robustness_table(results: Shares, config: Config, **more: str) -> pd.DataFrame:
    """One row per defence, "accuracy [95 % interval]" in percent per column; `more` are leading columns."""
    names = column_names(results, config)
    rows = {
        LABELS[defence]: more | {label: str(Accuracy.of(row[name])) for name, label in names.items()}
        for defence, row in results.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Defence, measured here (%)")


def column_names(results: Shares, config: Config) -> dict[str, str]:
    """The columns that these results have, in the order of a table, with their headings."""
    present = next(iter(results.values()))
    gradient = config.gradient.replace("_", "-")
    return {name: label.format(gradient=gradient) for name, label in COLUMNS.items() if name in present}


def numbers(results: Shares, config: Config, **more: str) -> pd.DataFrame:
    """The same in long form for a CSV: one row per defence and column; `more` becomes leading columns."""
    rows = [
        more
        | {"defence": defence, "column": name, "label": label}
        | vars(Accuracy.of(row[name])).copy()
        | {"norm": config.norm, "eps": config.eps, "budget": config.budget}
        for defence, row in results.items()
        for name, label in column_names(results, config).items()
    ]
    return pd.DataFrame(rows)


def reported_table(norm: str) -> pd.DataFrame:
    """The paper's Table 1 (linf) or 2 (l2): its own rows and those it quotes from the literature."""
    return reported_rows(paper.LITERATURE[norm], list(paper.PURIFIERS[norm].values()))


def reported_rows(literature: Sequence[paper.Reported], own: Sequence[paper.Reported]) -> pd.DataFrame:
    """Rows of one of the paper's tables: what it quotes, then what it reports itself."""
    rows = [(row, "quoted by the paper") for row in literature]
    rows += [(row, "reported by the paper") for row in own]
    frame = pd.DataFrame(
        {
            "Defence": [row.defence for row, _ in rows],
            "Accuracy (%)": [f"{row.accuracy:.2f}" for row, _ in rows],
            "Robustness (%)": [f"{row.robustness:.2f}" for row, _ in rows],
            "AttackSpec": [source for _, source in rows],
        }
    )
    return frame.set_index("Defence")


def paper_table(results: Shares, config: Config) -> pd.DataFrame:
    """Accuracy and robustness as the paper counts them: its rows, then ours with n and 95 % interval."""
    measured = pd.DataFrame(
        {
            "Defence": [LABELS[defence] for defence in results],
            "Accuracy (%)": [str(Accuracy.of(row["clean"])) for row in results.values()],
            "Robustness (%)": [str(Accuracy.of(row["autoattack"])) for row in results.values()],
            "AttackSpec": f"measured here, {config.profile}, n = {config.n_images}",
        }
    )
    return pd.concat([reported_table(config.norm), measured.set_index("Defence")])


def settings_caption(config: Config, classifiers: Sequence[str], attacks: Sequence[str]) -> str:
    """What stands behind the numbers: images, threat, defence, attack budgets, draws and seed."""
    spent = {"n_images": "images", "n_iter": "iterations", "eot": "EOT draws"}
    if "standard" in attacks:
        spent |= {"n_targets": "target classes", "square_queries": "Square queries"}
    full = config.sizes.budgets["report"]["full"]
    sizes = [f"{getattr(config, name)}/{getattr(full, name)} {what}" for name, what in spent.items()]
    counting = (
        " Counted by AutoAttack, an image is lost once any of the single draws that it looked at is wrong; "
        "the two halves of rand, which are records of their own, looked at one and the same."
        if "rand" in attacks
        else ""
    )
    return (
        f"{config.profile}, {config.split} split, {', '.join(classifiers)}; {NORM_NAMES[config.norm]}, "
        f"eps = {radius(config.eps)}; t* = {config.t_star:g}, N = {config.n_steps}, "
        f"λ = {config.guidance_weight:g}; spent of the paper's protocol: {', '.join(sizes)}; "
        f"{config.seed_label}. Accuracies in % with "
        f"95 % interval, averaged over {config.n_draws} fresh noise draws per image.{counting}"
    )


def undefended_line(results: Shares, config: Config) -> str:
    """Markdown: how much of the undefended classifier the paper's protocol leaves standing."""
    here, paper_says = Accuracy.of(results["none"]["autoattack"]), paper.PURIFIERS[config.norm]["none"]
    return (
        f"AutoAttack leaves the undefended classifier {here} % (the paper's: {paper_says.robustness:.2f} %): "
        "the smaller this number, the more of each row below the first is the defence's own work."
    )


def difference_lines(results: Shares, config: Config, better: str = "coup", than: str = "reverse") -> str:
    """Markdown: for every column the paired difference of two defences, and what it says of the claim."""
    names = column_names(results, config)
    lines = [
        f"Paired difference, {LABELS[better]} − {LABELS[than]}, on the same images and noise "
        f"(n = {config.n_images}; the claim is that it is positive):",
        "",
    ]
    for name, label in names.items():
        difference = Difference.of(results[better][name], results[than][name])
        lines.append(f"- {label}: {difference}: {difference.verdict}")
    return "\n".join(lines)


def claim_lines(results: Shares, config: Config) -> str:
    """Markdown: the verdict under the paper's protocol beside the one in the worst case on record."""
    protocol = "autoattack" if "autoattack" in results["coup"] else "adaptive"
    lines = []
    for rival in ("reverse", "diffpure"):
        there = Difference.of(results["coup"][protocol], results[rival][protocol])
        worst = Difference.of(results["coup"]["recorded"], results[rival]["recorded"])
        reported = paper.PURIFIERS[config.norm]
        gap = reported["coup"].robustness - reported[rival].robustness if rival in reported else None
        says = f"; the paper reports {gap:+.2f}" if gap is not None and protocol == "autoattack" else ""
        lines.append(
            f"*COUP is more robust than {LABELS[rival]}* (n = {config.n_images}, paired 95 % intervals): "
            f"under the paper's protocol this **{there.verdict}** ({there}{says}); "
            f"in the worst case on record per image it **{worst.verdict}** ({worst})."
        )
    return "\n\n".join(lines)


def draws_lines(columns: dict[str, dict[str, Score]], column: str = "adaptive") -> str:
    """Markdown: one attack's images, decided in four ways."""
    lines = [
        "| Images of the adaptive APGD-ce, decided by | the attack's own draw | one fresh draw, on average "
        "| the majority of draws | all draws (the worst) |",
        "|---" * 5 + "|",
    ]
    for defence, row in columns.items():
        score = row[column]
        ways = (score.autoattack, score.mean, score.majority, score.worst_draw)
        lines.append(f"| {LABELS[defence]} | " + " | ".join(map(str, ways)) + " |")
    return "\n".join(lines)


def cosine_lines(cosines: Mapping[str, Any]) -> str:
    """Markdown: the median cosine of each gradient to the exact one, per number of steps."""
    counts = cosines["step_counts"]
    lines = ["| Median cosine to exact | " + " | ".join(f"N = {count}" for count in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for defence in ("reverse", "coup"):
        for gradient, values in cosines[defence].items():
            medians = " | ".join(f"{np.median(cosine):.3f}" for cosine in values)
            lines.append(f"| {LABELS[defence]}, {gradient.replace('_', '-')} | {medians} |")
    return "\n".join(lines)


def warning_lines(warnings: dict[str, Sequence[str]]) -> str:
    """Markdown: what AutoAttack said of each defence."""
    lines = [f"- {LABELS[defence]}: {' '.join(said) or 'none'}" for defence, said in warnings.items()]
    return "\n".join(lines)


def write(
    frame: pd.DataFrame, config: Config, name: str, caption: str, long: pd.DataFrame | None = None
) -> str:
    """Write figures/<profile>/<name>.md (with its caption) and .csv; returns the Markdown."""
    text = write_text(f"{markdown(frame)}\n\n{caption}\n", config, name)
    csv = (frame if long is None else long).to_csv(index=long is None)
    path = paths.FIGURES / config.profile / f"{name}.csv"
    write_atomically(path, lambda temporary: temporary.write_text(csv))
    return text


def write_text(text: str, config: Config, name: str) -> str:
    """Write Markdown to figures/<profile>/<name>.md and return it."""
    folder = paths.FIGURES / config.profile
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.md", lambda temporary: temporary.write_text(text.rstrip() + "\n"))
    return text


def markdown(frame: pd.DataFrame) -> str:
    """The frame, index first, as a Markdown table."""
    head = [frame.index.name or "", *frame.columns]
    body = [[index, *row] for index, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
