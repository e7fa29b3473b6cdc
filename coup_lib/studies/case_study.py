"""The case study of Sec. 5.3.1: what the classifier sees along the path from x_adv to the purified image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from coup_lib.checks import in_one_line, number
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config, radius
from coup_lib.evaluation.outcomes import Accuracy, Difference, joint
from coup_lib.evaluation.protocol import Evaluation, Experiment
from coup_lib.evaluation.records import record
from coup_lib.guidance import to_image
from coup_lib.purify import Purified, coup
from coup_lib.reporting import plots
from coup_lib.reporting.plots import COLOURS, PALETTE
from coup_lib.reporting.tables import MISSING

PATHS = {"reverse": "without guidance", "coup": "with guidance"}
GROUPS = {
    "all": "all cases",
    "right": "classifier right on x_adv",
    "wrong": "classifier wrong on x_adv",
}
TREATMENTS = {
    "coup": "guidance (COUP)",
    "flipped": "guidance, sign flipped",
    "brownian": "no guidance, Brownian motion",
}
STATEMENTS = {
    "1": "without guidance, p(y_true) falls and p(y_adv) rises",
    "1b": "without guidance, most of the fall comes suddenly, in the last tenth of the path",
    "2": "with guidance, p(y_true) rises in the first tenth of the path, and more than without",
    "3": "guidance results in correct classification (in more than half of the cases)",
}
PAPER_CASES = 14  # bad cases in the paper's Fig. 2a, CIFAR-10, L∞
EPS_FACTORS = (0.5, 1.0, 1.5)  # multiples of eps that the study is done at
SHOWN_STATES = (0.1, 0.3, 0.6, 0.9)  # of the path, in the image strips
TENTH = 0.1  # the paper speaks of "the very beginning" and of "after 90" of 100 steps


# --- what is measured ---


def follow(defence: Purified, x: Tensor) -> tuple[Tensor, Tensor]:
    """The path without Brownian motion: images (N + 1, n, C, H, W), and p(y|image) as (N + 1, n, K).

    A state on the way is shown to the classifier as it is, the last one clamped, as the purifier hands it on.
    """
    states: list[Tensor] = []
    with torch.no_grad():
        purified = defence.purifier.trajectory(x, lambda i, t, state: states.append(state), brownian=False)
        images = torch.stack([*map(to_image, states[:-1]), purified])
        return images, torch.stack([defence.classifier(image).softmax(1) for image in images])


@dataclass(frozen=True)
class CaseStudy:
    """The n attacked images at one eps, and the paths of the m bad cases among them, in order of index.

    labels (n,): true classes; raw: the bare classifier's on x_adv; y_adv: the reverse SDE's on x_adv, and
        clean: on the clean image, both without Brownian motion.
    right: treatment → share of right decisions on x_adv (n,); 0 or 1 but for "brownian", a mean over draws.
    p_true, p_adv: path → p(label|x_t) and p(y_adv|x_t), (N + 1, m), at `times` (N + 1,).
    strips: arrays for Fig. 1c: "index" (s,), "columns" (c,) times (NaN: the clean image), "images"
        (2, s, c, C, H, W) in 0 to 255, "class" and "confidence" (2, s, c); without and with guidance.
    """

    eps: float
    labels: np.ndarray
    raw: np.ndarray
    y_adv: np.ndarray
    clean: np.ndarray
    right: dict[str, np.ndarray]
    times: np.ndarray
    p_true: dict[str, np.ndarray]
    p_adv: dict[str, np.ndarray]
    strips: dict[str, np.ndarray]

    @property
    def bad(self) -> np.ndarray:
        """Which images the reverse SDE gets wrong without Brownian motion, (n,) bool."""
        return self.right["reverse"] == 0

    def in_group(self, group: str) -> np.ndarray:
        """Which images belong to a group by the bare classifier's verdict on x_adv, (n,) bool."""
        if group == "all":
            return np.ones(len(self.labels), dtype=bool)
        return (self.raw == self.labels) == (group == "right")

    def curves(self, group: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """p_true and p_adv of the group's bad cases, path → (N + 1, cases)."""
        chosen = self.in_group(group)[self.bad]
        both = [{path: p[path][:, chosen] for path in PATHS} for p in (self.p_true, self.p_adv)]
        return both[0], both[1]

    def rescued(self, group: str, treatment: str = "coup") -> np.ndarray:
        """Share of right decisions of each of the group's bad cases."""
        return self.right[treatment][self.bad & self.in_group(group)]

    def broken(self, group: str, treatment: str = "coup") -> np.ndarray:
        """Share of wrong decisions of each of the group's good cases, which the reverse SDE gets right."""
        return 1 - self.right[treatment][~self.bad & self.in_group(group)]

    @property
    def tenth(self) -> int:
        """The steps in a tenth of the path, one at least."""
        return max(1, round(TENTH * (len(self.times) - 1)))


@in_one_line()
def radii(config: Config, eps_factors: Any) -> list[Config]:
    """The configuration at each multiple of its eps, in rising order; one number will do for a list."""
    given = eps_factors if isinstance(eps_factors, list | tuple) else [eps_factors]
    if not given:
        raise ValueError("eps_factors: expected at least one number, got an empty list")
    factors = sorted({number("eps_factors", factor, 0) for factor in given})
    # 12 digits: 1.5 × 0.15 is 0.225, the same record as for that number typed by hand.
    return [replace(config, eps=float(f"{factor * config.eps:.12g}")) for factor in factors]


def experiment(config: Config) -> Experiment:
    """APGD-ce on the reverse SDE, which the study starts from."""
    return Experiment(config, {"reverse": {"adaptive": against("apgd-ce", "reverse", config.gradient)}})


def case_study(config: Config, shown: int = 3) -> CaseStudy:
    """Both paths from the images of the `experiment` at config.eps, `shown` strips of each kind."""
    rows, evaluation = experiment(config).attacks, Evaluation(config)
    source = rows["reverse"]["adaptive"]
    brownian = evaluation.predictions(rows)["reverse"]["adaptive"].right

    name, attack = evaluation.attack_settings(source)
    settings = {
        "attack": attack,
        "target": evaluation.bench.settings("coup"),
        "brownian": False,
        "shown": shown,
        "shown_states": list(SHOWN_STATES),
    }
    found = record(
        config.profile,
        f"case-study-{name}",
        settings,
        lambda: _measure(evaluation, evaluation.x_adv(source), shown),
    )
    return _as_study(config.eps, found["result"], found["arrays"], brownian)


def _measure(evaluation: Evaluation, x_adv: Tensor, shown: int) -> dict[str, Any]:
    """What the record holds: classes per image, the bad cases' curves, the images of the strips."""
    x, labels = evaluation.images.x, evaluation.images.y
    size, config = evaluation.config.setup.max_batch, evaluation.config
    settings = {"t_star": config.t_star, "n_steps": config.n_steps}
    defences: dict[str, Purified] = {name: evaluation.bench.defence(name) for name in PATHS}  # type: ignore[misc]
    defences["flipped"] = coup(
        evaluation.bench.classifier, evaluation.bench.score_network, -config.guidance_weight, **settings
    )

    def along(name: str, images: Tensor) -> Tensor:
        return torch.cat([follow(defences[name], part)[1] for part in images.split(size)], dim=1)

    paths = {name: along(name, x_adv) for name in defences}
    final = {name: path[-1].argmax(1) for name, path in paths.items()}
    raw, adversarial = paths["reverse"][0].argmax(1), final["reverse"]
    bad = (adversarial != labels).nonzero().flatten()
    saved = (final["coup"] == labels)[bad]
    index = torch.cat([bad[saved][:shown], bad[~saved][:shown]])
    values: dict[str, Any] = {
        "labels": labels.tolist(),
        "raw": raw.tolist(),
        "clean": along("reverse", x)[-1].argmax(1).tolist(),
        "final": {name: classes.tolist() for name, classes in final.items()},
        "times": defences["reverse"].purifier.times.tolist(),
    }
    for name in PATHS:
        values[f"p_true_{name}"] = paths[name][:, bad, labels[bad]].cpu().numpy()
        values[f"p_adv_{name}"] = paths[name][:, bad, adversarial[bad]].cpu().numpy()
    return values | _strips(defences, x, x_adv, index)


def _strips(defences: dict[str, Purified], x: Tensor, x_adv: Tensor, index: Tensor) -> dict[str, Any]:
    """Clean image, x_adv, some states and the purified image of the chosen cases, on both paths."""
    times = defences["reverse"].purifier.times
    kept = sorted({0, *(round(share * (len(times) - 1)) for share in SHOWN_STATES), len(times) - 1})
    chosen = index if len(index) else torch.tensor([0])  # networks take no empty batch: walked, not shown
    with torch.no_grad():
        clean = defences["reverse"].classifier(x[chosen]).softmax(1)
    images, p = [], []
    for name in PATHS:
        path, confidence = follow(defences[name], x_adv[chosen])
        images.append(torch.stack([x[chosen], *path[kept]], dim=1))
        p.append(torch.stack([clean, *confidence[kept]], dim=1))
    top = torch.stack(p)[:, : len(index)].max(dim=-1)
    return {
        "strip_index": index.cpu().numpy(),
        "strip_columns": np.array([float("nan"), *times[kept].tolist()]),
        "strip_images": (255 * torch.stack(images)[:, : len(index)].clamp(0, 1)).round().byte().cpu().numpy(),
        "strip_class": top.indices.cpu().numpy(),
        "strip_confidence": top.values.cpu().numpy(),
    }


def _as_study(eps: float, result: dict[str, Any], arrays: dict[str, Any], brownian: np.ndarray) -> CaseStudy:
    labels = np.array(result["labels"])
    right = {name: (np.array(classes) == labels).astype(float) for name, classes in result["final"].items()}
    return CaseStudy(
        eps=eps,
        labels=labels,
        raw=np.array(result["raw"]),
        y_adv=np.array(result["final"]["reverse"]),
        clean=np.array(result["clean"]),
        right=right | {"brownian": brownian},
        times=np.array(result["times"]),
        p_true={name: arrays[f"p_true_{name}"].astype(float) for name in PATHS},
        p_adv={name: arrays[f"p_adv_{name}"].astype(float) for name in PATHS},
        strips={
            name: arrays[f"strip_{name}"] for name in ("index", "columns", "images", "class", "confidence")
        },
    )


# --- what it says of the paper's statements ---


def verdicts(study: CaseStudy, group: str) -> dict[str, str]:
    """Statement → "holds", "does not hold", "is not decided", by 95 % intervals, or "too few cases"."""
    p_true, p_adv = study.curves(group)
    free, guided, tenth = p_true["reverse"], p_true["coup"], study.tenth
    late, before = free[-1 - tenth] - free[-1], free[0] - free[-1 - tenth]
    rescued = study.rescued(group)
    parts = {
        "1": [change(free[-1], free[0]), change(p_adv["reverse"][0], p_adv["reverse"][-1])],
        "1b": [change(np.zeros_like(late), late), change(before, late, most=2)],
        "2": [change(guided[0], guided[tenth]), change(free[tenth], guided[tenth])],
        "3": [change(np.full_like(rescued, 0.5), rescued, most=0.5)],
    }
    return {
        name: joint(filter(None, found)) if all(found) else "too few cases" for name, found in parts.items()
    }


def change(before: np.ndarray, after: np.ndarray, most: float = 1) -> Difference | None:
    """The mean of after - before, in points, none larger than `most`; None for fewer than two cases.

    Its interval is `mean_interval`'s: Student's misses the mean where few cases flip, and those wholly.
    """
    if len(after) < 2:
        return None
    return Difference.of(after, before, most=most)


def measured(study: CaseStudy, group: str) -> dict[str, Accuracy | Difference]:
    """Quantity → share rescued or broken, in percent, or change of the bad cases' mean confidence, in points.

    Confidence changes without and with guidance, in the first tenth and over the whole path. A share of no
    cases and a change of fewer than two are left out.
    """
    found: dict[str, Any] = {}
    for what in ("rescued", "broken"):
        for treatment in TREATMENTS:
            cases = getattr(study, what)(group, treatment)
            found[f"{what} by {treatment}"] = Accuracy.of(cases) if len(cases) else None
    for label, curve in zip(("p(y_true)", "p(y_adv)"), study.curves(group), strict=True):
        for path, words in PATHS.items():
            for span, step in (("first tenth", study.tenth), ("whole path", -1)):
                found[f"{label}, {words}, {span}"] = change(curve[path][0], curve[path][step])
    return {name: one for name, one in found.items() if one}


def numbers(studies: Sequence[CaseStudy]) -> pd.DataFrame:
    """Long form for a CSV: all that is `measured`."""
    return pd.DataFrame(
        [
            {"eps": study.eps, "group": group, "quantity": name} | vars(one)
            for study, group in product(studies, GROUPS)
            for name, one in measured(study, group).items()
        ]
    )


def verdict_table(studies: Sequence[CaseStudy]) -> pd.DataFrame:
    """One row per eps and group: n, shares rescued and broken, and the verdict on each statement."""
    lines = []
    for study, group in product(studies, GROUPS):
        found = measured(study, group)
        cells = {
            "eps": radius(study.eps),
            "Group": GROUPS[group],
            "Bad cases": len(study.rescued(group)),
            "Rescued (%)": str(found.get("rescued by coup", MISSING)),
            "Good cases": len(study.broken(group)),
            "Broken (%)": str(found.get("broken by coup", MISSING)),
        }
        judged = {f"({name})": verdict for name, verdict in verdicts(study, group).items()}
        lines.append(cells | judged)
    return pd.DataFrame(lines).set_index("eps")


def control_table(studies: Sequence[CaseStudy]) -> pd.DataFrame:
    """What guidance does over all cases and images of each eps, beside the two controls.

    The verdict is on the claim that guidance rescues more than Brownian motion does.
    """
    lines = []
    for study in studies:
        found = measured(study, "all")
        over = change(study.rescued("all", "brownian"), study.rescued("all"))
        net = change(study.right["reverse"], study.right["coup"])
        lines.append(
            {
                "eps": radius(study.eps),
                "Images": len(study.labels),
                "Bad cases": int(study.bad.sum()),
                "wrong without attack": int((study.bad & (study.clean != study.labels)).sum()),
                "y_adv seen in x_adv": int((study.bad & (study.raw == study.y_adv)).sum()),
                **{
                    f"Rescued by {label} (%)": str(found.get(f"rescued by {name}", MISSING))
                    for name, label in TREATMENTS.items()
                },
                "Guidance − Brownian motion": f"{over}, **{over.verdict}**" if over else MISSING,
                "Guidance breaks (%)": str(found.get("broken by coup", MISSING)),
                "Accuracy, with − without guidance": str(net or MISSING),
            }
        )
    return pd.DataFrame(lines).set_index("eps")


# --- what is shown ---

TRUE_COLOUR, ADV_COLOUR = PALETTE[0], PALETTE[3]
STYLES: dict[str, Literal["--", "-"]] = {"reverse": "--", "coup": "-"}


def curves_figure(studies: Sequence[CaseStudy]) -> Figure:
    """Fig. 2a: a column per eps, a row per group: mean confidence, and 25–75 % of the guided cases."""
    n, names = len(studies), []
    figure, grid = plt.subplots(2, n, figsize=(1.2 + 2.7 * n, 5.2), sharex=True, sharey=True, squeeze=False)
    for row, group in zip(grid, ("right", "wrong"), strict=True):
        for axes, study in zip(row, studies, strict=True):
            names.append(f"eps = {radius(study.eps)}, n = {len(study.rescued(group))}")
            _curves_panel(axes, study, group)
        row[0].set_ylabel(f"{GROUPS[group]}\nconfidence $p(y\\,|\\,x_t)$".replace("x_adv", "$x_{adv}$"))
    plots.titles(grid.flat, names)
    for axes in grid[-1]:
        axes.set_xlabel("time $t$ along the purification")
        start = studies[0].times[0]
        ticks = axes.set_xticks([start, start / 2, 0], [f"{start:g}", f"{start / 2:g}", "0"])
        ticks[0].label1.set_horizontalalignment("left")  # else it would touch its neighbour's 0
        ticks[-1].label1.set_horizontalalignment("right")
    handles = [
        Line2D([], [], color=colour, linestyle=STYLES[path], label=f"{label}, {PATHS[path]}")
        for colour, label in ((TRUE_COLOUR, "$p(y_{true})$"), (ADV_COLOUR, "$p(y_{adv})$"))
        for path in PATHS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols={1: 1, 2: 2}.get(n, 4), handlelength=2.6)
    return figure


def _curves_panel(axes: Axes, study: CaseStudy, group: str) -> None:
    axes.set(xlim=(study.times[0], 0), ylim=(-0.02, 1.02))
    p_true, p_adv = study.curves(group)
    if not p_true["coup"].size:
        axes.text(0.5, 0.5, "no such case", transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    for curve, colour in ((p_true, TRUE_COLOUR), (p_adv, ADV_COLOUR)):
        edges = np.quantile(curve["coup"], [0.25, 0.75], axis=1)
        plots.band(axes, study.times, curve["coup"].mean(1), edges, STYLES["coup"], colour, linewidth=1.9)
        axes.plot(study.times, curve["reverse"].mean(1), STYLES["reverse"], color=colour, linewidth=1.9)


def strips_figure(study: CaseStudy, classes: Sequence[str]) -> Figure:
    """Fig. 1c: the first rescued and the first other bad cases by index, without and with guidance.

    `classes`: the name of each label.
    """
    saved = study.right["coup"][study.strips["index"]] == 1
    rescued = study.rescued("all") == 1
    parts = {
        "(a) rescued by guidance": (np.flatnonzero(saved), rescued.sum()),
        "(b) not rescued": (np.flatnonzero(~saved), (~rescued).sum()),
    }
    rows = max(1, *(len(places) for places, _ in parts.values()))
    figure = plt.figure(figsize=(9.2, 0.5 + 1.9 * rows))
    figure.set_layout_engine("constrained", h_pad=0.05)  # inches, between a label and the next title
    halves: Any = figure.subfigures(1, 2, wspace=0.04)
    for half, (title, (places, total)) in zip(halves, parts.items(), strict=True):
        which = f"the first {len(places)} of {total} by index" if total else "there is no such case"
        half.suptitle(f"{title}: {which}", x=0.02, ha="left", fontsize=9)
        grid = half.subplots(2 * rows, study.strips["images"].shape[2], squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, place in enumerate(places.tolist()):
            _strip(grid[2 * row : 2 * row + 2], study, place, classes)
    return figure


def _strip(grid: np.ndarray, study: CaseStudy, place: int, classes: Sequence[str]) -> None:
    """Two rows of images of one case: without guidance above, with guidance below."""
    strips, times = study.strips, study.strips["columns"]
    place_in_split = int(strips["index"][place])
    label = int(study.labels[place_in_split])
    on_the_way = [f"{'t = ' if i == 0 else ''}{time:.2g}" for i, time in enumerate(times[2:-1])]
    titles = ["clean", "$x_{adv}$", *on_the_way, "final"]
    for side, path in enumerate(PATHS):
        for column, title in enumerate(titles):
            if side == 0:
                grid[0][column].set_title(title, fontsize=8, pad=2)
            if side == 0 or column > 1:  # both paths begin with the same two images
                axes = grid[side][column]
                image = np.moveaxis(strips["images"][side, place, column], 0, -1).squeeze()
                axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                seen, sure = (strips[name][side, place, column] for name in ("class", "confidence"))
                look = {"color": TRUE_COLOUR if seen == label else ADV_COLOUR, "ha": "center"}
                look["weight"] = "bold" if title == "final" else "normal"
                _write(axes, 0.5, -0.05, f"{classes[seen]}\n{100 * sure:.0f} %", **look)
        _write(grid[side][2], -0.3, 0.95, ("without", "with")[side], rotation=90, color=COLOURS[path])
    _write(grid[1][0], 0, 0.95, f"no. {place_in_split}\ntrue class\n{classes[label]}")


def _write(axes: Axes, x: float, y: float, text: str, **more: Any) -> None:
    """Text whose top is at (x, y) in units of the axes."""
    axes.text(x, y, text, transform=axes.transAxes, va="top", fontsize=8, **more)
