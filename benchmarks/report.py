"""From pytest-benchmark's JSON to a small committed file; from that to tables, a figure and docs/speed.md.

python -m benchmarks.report build/benchmarks.json    (`make benchmarks`)

What was measured in parts is put together: a row takes the place of the one that was measured before it.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from coup_lib import paths
from coup_lib.defences import LABELS
from coup_lib.files import write_atomically
from coup_lib.paths import ROOT, is_smoke
from coup_lib.reporting import plots
from coup_lib.reporting.tables import markdown

Row = dict[str, Any]
Summary = dict[str, Any]

# What a smoke run measures means nothing and must not take the place of real results.
RESULTS = (ROOT / "build" / "smoke" if is_smoke() else ROOT) / "benchmarks" / "results"
PROBLEMS = {"digits": "digits", "cifar": "CIFAR size"}
FULL_SIZE = {"full": "DDPM++ deep, WRN-28-10", "small": "cifar10-small"}
EXACT = ("kept", "half kept", "replayed")
# What a row was measured on: another measurement of the same takes its place.
SUBJECT = ("problem", "defence", "precision", "activations", "images", "work")
GRADIENTS = 100 * 20  # of an image by APGD-100 with 20 draws each
CLASSIFIERS = {"resnet20": "ResNet-20", "Standard": "WRN-28-10"}
OURS, DIFFPURE = "ours, replayed", "adjoint, as DiffPure"
# Time over that of the bare networks, at most.
FORWARD_GOAL = {"digits": 1.25, "cifar": 1.05}
GRADIENT_GOAL = {"cifar": 1.05}
EXPONENT_GOAL = 1.05


def summary(raw: Mapping[str, Any]) -> Summary:
    """The machine, and what was measured, by group: medians of seconds, quartiles of ratios."""
    groups: dict[str, list[Row]] = {}
    for benchmark in raw["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(_row(benchmark["extra_info"]))
    return {"machine": raw["machine_info"], "groups": groups}


def merged(before: Summary, found: Summary) -> Summary:
    """What was measured before on the same processor or GPU and PyTorch, with what is found now in it."""
    here, there = (
        (made["gpu"] or made["cpu"], made["torch"]) for made in (found["machine"], before["machine"])
    )
    if here != there:
        print(f"measured on {here}; what was measured on {there} leaves the file")
        return found
    groups = dict(before["groups"])
    for name, rows in found["groups"].items():
        groups[name] = [*({_subject(row): row for row in [*groups.get(name, ()), *rows]}).values()]
    return found | {"groups": groups}


def _subject(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in SUBJECT)


def _row(info: Mapping[str, Any]) -> Row:
    raw = ("seconds", "cosines", "reference", "references")
    row = {key: value for key, value in info.items() if key not in raw}
    if seconds := info.get("seconds"):
        row["rounds"] = len(next(iter(seconds.values())))
        row["seconds"] = {name: _short(np.median(values)) for name, values in seconds.items()}
    if reference := info.get("reference"):
        others = {name: values for name, values in seconds.items() if name != reference}
        row["ratio"] = {name: ratio(values, seconds[reference]) for name, values in others.items()}
    if references := info.get("references"):  # each method has its own
        row["ratio"] = {name: ratio(seconds[name], seconds[one]) for name, one in references.items()}
    if cosines := info.get("cosines"):
        row["cosine"] = {name: _mean_and_worst(values) for name, values in cosines.items()}
    return row


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """[quartile, median, quartile] of the ratios within each round."""
    return [_short(value) for value in np.quantile(np.divide(seconds, reference), (0.25, 0.5, 0.75))]


def exponent(seconds: Mapping[str, float]) -> float:
    """The slope of log seconds over log work, by least squares."""
    work = [float(amount) for amount in seconds]
    return float(np.polyfit(np.log(work), np.log(list(seconds.values())), 1)[0])


def _mean_and_worst(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "worst": float(np.min(values))}


def _short(value: Any) -> float:
    return float(f"{value:.4g}")


def _rows(found: Summary, group: str) -> list[Row]:
    return found["groups"].get(group, [])


def floor_table(found: Summary) -> pd.DataFrame:
    """Purifications and their gradients over the network evaluations that they cannot avoid."""
    lines = []
    for group, goals in (("forward", FORWARD_GOAL), ("gradient", GRADIENT_GOAL)):
        for row in _rows(found, group):
            seconds, goal = row["seconds"], goals.get(row["problem"])
            what = "purification" if group == "forward" else f"exact gradient, {row['activations']}"
            lines.append(
                {
                    "networks": PROBLEMS[row["problem"]],
                    "what": f"{LABELS[row['defence']]}: {what}",
                    "precision": row["precision"],
                    "time": duration(seconds["ours"]),
                    "bare networks": duration(seconds["floor"]),
                    "ratio": _with_quartiles(row["ratio"]["ours"]),
                    "goal": f"≤ {goal:.2f}" if goal else "",
                    "of it noise": f"{seconds['noise'] / seconds['ours']:.1%}" if "noise" in seconds else "",
                    "GFLOP/s (of a product's)": _speed(row),
                    "cosine, mean (worst)": _cosine(row, "ours"),
                }
            )
    return pd.DataFrame(lines).set_index("networks").sort_index(kind="stable", ascending=False)


def peer_table(found: Summary) -> pd.DataFrame:
    """One gradient by the ways of the field."""
    lines = []
    for row in _rows(found, "peers"):
        for method, seconds in row["seconds"].items():
            memory = row["memory_mib"].get(method)
            lines.append(
                {
                    "networks": PROBLEMS[row["problem"]],
                    "gradient": f"{LABELS[row['defence']]}: {method}",
                    "time": duration(seconds),
                    f"over {OURS}": "1" if method == OURS else _with_quartiles(row["ratio"][method]),
                    "peak memory": "" if memory is None else f"{memory:,.0f} MiB",
                    "cosine, mean (worst)": _cosine(row, method),
                }
            )
    return pd.DataFrame(lines).set_index("networks")


def second_order_table(found: Summary) -> pd.DataFrame:
    """Hessian-vector products by frozen layers, over PyTorch's own."""
    lines = [
        {
            "classifier": CLASSIFIERS[row["problem"]],
            "images": row["n_images"],
            "threads": row["threads"],
            "frozen layers": duration(row["seconds"]["frozen layers"]),
            "PyTorch's own": duration(row["seconds"]["PyTorch's own"]),
            "ratio": _with_quartiles(row["ratio"]["frozen layers"]),
            "cosine, mean (worst)": _cosine(row, "frozen layers"),
        }
        for row in _rows(found, "second order")
    ]
    return pd.DataFrame(lines).set_index("classifier")


def cheaper_table(found: Summary) -> pd.DataFrame:
    """The score network under attack in lower precision."""
    lines = []
    for row in _rows(found, "cheaper"):
        for name, quartiles in row["ratio"].items():
            lines.append(
                {
                    "profile": row["problem"],
                    "attacked by way of": f"{LABELS[row['defence']]}: {name}",
                    "time over float32's": _with_quartiles(quartiles),
                    "cosine, mean (worst)": _cosine(row, name),
                    "robust accuracy": f"{row['robust'][name]:.2f} %",
                    "by way of float32": f"{row['robust']['float32']:.2f} %",
                    "verdicts changed": f"{row['changed'][name]} of {row['n_images']}",
                }
            )
    return pd.DataFrame(lines).set_index("profile")


def cost_table(found: Summary) -> pd.DataFrame:
    """Fitted exponents."""
    lines = {
        row["work"]: {
            "from": min(row["seconds"], key=float),
            "to": max(row["seconds"], key=float),
            "exponent": f"**{exponent(row['seconds']):.2f}**",
            "goal": "−1 at best" if row["work"] == "processes" else f"≤ {EXPONENT_GOAL}",
        }
        for row in _fitted(found)
    }
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("time against")


def _fitted(found: Summary) -> list[Row]:
    """What time was measured against; one core has one number of processes, and there is nothing to fit."""
    return [row for row in _rows(found, "cost") if len(row["seconds"]) > 1]


def share_table(rows: Sequence[Row]) -> pd.DataFrame:
    """Where time goes, in percent."""
    shares = {PROBLEMS.get(row["problem"], row["problem"]): row["shares"] for row in rows}
    return pd.DataFrame(shares).map(lambda value: f"{100 * value:.1f} %").rename_axis("share of the time")


def full_size_table(found: Summary) -> pd.DataFrame:
    """Purifications and exact gradients of large networks: time, over their floor, and peak memory."""
    lines = [
        _large(row) | {method: _timed(row, method) for method in ("forward", *EXACT)}
        for row in _rows(found, "full size")
    ]
    return pd.DataFrame(lines).set_index("networks")


def full_size_speeds(found: Summary) -> pd.DataFrame:
    """The fastest exact gradient of each row: its speed, and DiffPure's way in float32 beside it."""
    lines, theirs = [], {}
    for row in _rows(found, "full size"):
        if DIFFPURE in row["seconds"]:
            theirs[row["problem"], row["images"], row["defence"]] = row
    for row in _rows(found, "full size"):
        best, other = _fastest(row), theirs.get((row["problem"], row["images"], row["defence"]))
        lines.append(
            _large(row)
            | {
                "exact gradient": f"{best}: {duration(row['seconds'][best])}",
                "TFLOP/s (of a product's)": _teraflops(row, best),
                "DiffPure's adjoint over it": f"{_slower(other, row):.2f}" if other else "",
                "cosine, mean (worst)": _cosine(row, "ours"),
                "its cosine": _cosine(other, DIFFPURE) if other else "",
                "images attacked per hour": f"{_per_hour(row):,.2g}",
            }
        )
    return pd.DataFrame(lines).set_index("networks")


def _large(row: Row) -> Row:
    named = {"networks": FULL_SIZE[row["problem"]], "defence": LABELS[row["defence"]]}
    return named | {"images": row["images"], "steps": row["n_steps"], "precision": row["precision"]}


def _timed(row: Row, method: str) -> str:
    if method not in row["seconds"]:
        return "does not fit"
    memory = row["memory_mib"][method]
    gib = "" if memory is None else f"; {memory / 1024:.1f} GiB"
    return f"{duration(row['seconds'][method])} (**{row['ratio'][method][1]:.2f}**{gib})"


def _fastest(row: Row) -> str:
    return min((method for method in EXACT if method in row["seconds"]), key=row["seconds"].__getitem__)


def _slower(theirs: Row, row: Row) -> float:
    return theirs["seconds"][DIFFPURE] / row["seconds"][_fastest(row)]


def _teraflops(row: Row, method: str) -> str:
    ours, product = (row["flop"][name] / row["seconds"][name] / 1e12 for name in (method, "product"))
    return f"{ours:.3g} ({ours / product:.0%} of {product:.3g})"


def _per_hour(row: Row) -> float:
    whole_path = row["seconds"][_fastest(row)] * row["path"] / row["n_steps"]
    return 3600 * row["images"] / whole_path / GRADIENTS


def table1_table(found: Summary) -> pd.DataFrame:
    """Hours of the paper's Table 1 by counting, and by attacks that were tried beside it."""
    lines = [
        {
            "precision": row["precision"],
            "images": row["n_images"],
            "hours, estimated": f"{row['hours']:,.3g}",
            "tried: estimated, measured": "; ".join(
                f"{LABELS[name]} {duration(expected)}, {duration(row['seconds'][name])}"
                for name, expected in row["expected"].items()
            ),
            "hours at that pace": f"{row['hours'] * _pace(row):,.3g}",
        }
        for row in _rows(found, "table 1")
    ]
    return pd.DataFrame(lines).set_index("precision")


def _pace(row: Row) -> float:
    """Measured over estimated seconds."""
    return sum(row["seconds"].values()) / sum(row["expected"].values())


def duration(seconds: float) -> str:
    """For people: milliseconds below a second."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _with_quartiles(quartiles: Sequence[float]) -> str:
    low, middle, high = quartiles
    return f"**{middle:.2f}** [{low:.2f}, {high:.2f}]"


def _speed(row: Row) -> str:
    """Operations per second, and what share that is of a large matrix product's."""
    if "flop" not in row:
        return ""
    speed = {name: flop / row["seconds"][name] / 1e9 for name, flop in row["flop"].items()}
    return f"{speed['ours']:,.1f} ({speed['ours'] / speed['product']:.0%})"


def _cosine(row: Row, name: str) -> str:
    found = row["cosine"][name] if "cosine" in row else None
    return f"{found['mean']:.4f} ({found['worst']:.4f})" if found else ""


def cost_figure(found: Summary) -> Figure:
    """Time against work, both over those of the least work, on logarithmic axes; the fits in the legend."""
    figure, axes = plt.subplots(figsize=(5.2, 4.2))
    for row, marker, colour in zip(_fitted(found), "osD^v", plots.PALETTE, strict=False):
        work, seconds = np.array(sorted((float(key), value) for key, value in row["seconds"].items())).T
        slope = f"{exponent(row['seconds']):.2f}".replace("-", "−")
        label = f"{row['work']}, {work[0]:,.0f} to {work[-1]:,.0f}: exponent {slope}"
        axes.plot(work / work[0], seconds / seconds[0], f"{marker}-", color=colour, label=label)
    axes.plot([1, 16], [1, 16], color="black", linewidth=0.8, linestyle="--", label="proportional", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="work, over the least", ylabel="time, over that of the least")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    return figure


# Groups → heading, caption and what is shown, where any of the groups was measured.
SECTIONS: dict[tuple[str, ...], tuple[str, str, Callable[[Summary], str]]] = {
    ("forward", "gradient"): (
        "Over the bare networks",
        "*bare networks*: N calls of the score network, for COUP also N times the classifier forward and "
        "backward. For a gradient these, of the steps whose activations are not kept, and all forward and "
        "backward again, a Hessian-vector product counting as two gradients of the classifier. *digits*: the "
        "trained networks; *CIFAR size*: a DDPM++ of width 16 and a ResNet-20, random weights, 32×32×3.",
        lambda found: markdown(floor_table(found)),
    ),
    ("peers",): (
        "Beside the ways of the field",
        "One network, Brownian path, batch and pulled-back vector for all, dt = 1e-3. *adjoint*: "
        "torchsde's `sdeint_adjoint` by Euler, its backward solver left at the default, as there; "
        "*as DiffPure*: with all parameters in the adjoint state. *sdeint*: backpropagated, all "
        "activations kept. Peak memory is what a method takes above what its process had before.",
        lambda found: markdown(peer_table(found)),
    ),
    ("full size",): (
        "Large networks",
        "DDPM++ deep and WRN-28-10 as the paper's, random weights, a few steps of the path, dt = 1e-3; "
        "`cifar10-small`: its score network and a ResNet-20, its whole path. In brackets the ratio to the "
        "network calls that cannot be avoided, and peak memory. *half kept*: the activations of half of the "
        "steps, the other half is replayed. DiffPure's adjoint runs in float32, as there. *images attacked "
        "per hour*: by APGD-100 with 20 draws a gradient on the whole path.",
        lambda found: f"{markdown(full_size_table(found))}\n\n{markdown(full_size_speeds(found))}",
    ),
    ("table 1",): (
        "The paper's Table 1 on this machine",
        "Estimated by `coup estimate --profile cifar10 --budget full 04_autoattack`. Tried: PGD with the "
        "exact gradient on a few images, its time by the same count beside it; *at that pace* the estimate "
        "is multiplied by what the attacks took over what they should have taken.",
        lambda found: markdown(table1_table(found)),
    ),
    ("second order",): (
        "Second derivatives",
        "A Hessian-vector product of log max p, as the exact gradient of COUP needs one a step, random "
        "weights, 32×32×3: by convolutions and batch norms that know that their weights are frozen "
        "(`coup_lib.hessian`), and by PyTorch's own second derivatives. Measured with as many threads as "
        "the table says.",
        lambda found: markdown(second_order_table(found)),
    ),
    ("cheaper",): (
        "A cheaper score network under attack",
        "Exact gradients by trained networks, the score network in lower precision (`-p precision "
        "bfloat16`; tf32 on a GPU), on validation images. What APGD-ce finds is scored in float32, by "
        "ten draws; a verdict is that of their majority.",
        lambda found: markdown(cheaper_table(found)),
    ),
    ("cost",): (
        "Cost against work",
        "Exact gradients of COUP; for processes, an attack on it that they share.",
        lambda found: f"![Cost against work]({_device(found)}_cost.png)\n\n{markdown(cost_table(found))}",
    ),
    ("profile",): (
        "Where the time goes",
        "",
        lambda found: "\n\n".join(
            [
                _notebook(found),
                "Its attacks and scores, by Python's profiler:",
                markdown(share_table(_rows(found, "profile"))),
                "One exact gradient of COUP, by PyTorch's:",
                markdown(share_table(_rows(found, "kernels"))),
            ]
        ),
    ),
}


def page(found: Summary) -> str:
    """All tables of one device, with their captions and the command that makes them."""
    parts = [
        f"# Benchmarks on {_device(found)}",
        f"{machine(found)}. Medians over rounds in which the competitors take turns; ratios are taken "
        "within a round, [quartiles] beside them. Cosines are to the float64 gradient by plain autograd.",
        "Command: `make benchmarks`, on an idle machine.",
    ]
    for groups, (heading, caption, shown) in SECTIONS.items():
        if rows := [row for group in groups for row in _rows(found, group)]:
            parts += [f"## {heading}", *[caption] * bool(caption), shown(found)]
            if groups[0] in ("peers", "full size") and not any(DIFFPURE in row["seconds"] for row in rows):
                parts.append("torchsde was not there, so its ways are missing.")
    return "\n\n".join(parts)


def machine(found: Summary) -> str:
    """What all of it was measured on."""
    made = found["machine"]
    return (
        f"{made['cpu']}, {made['cores']} cores, {made['threads']} threads, {made['gpu'] or 'no GPU'}; "
        f"PyTorch {made['torch']}, Python {made['python']}, {made['system']}"
    )


def _device(found: Summary) -> str:
    return "gpu" if found["machine"]["gpu"] else "cpu"


def _notebook(found: Summary) -> str:
    """Images per second of the whole notebook, and the operations of a Hessian-vector product."""
    lines = []
    for row in _rows(found, "notebook"):
        speeds = {name: row["n_images"] / seconds for name, seconds in row["seconds"].items()}
        before = f" ({speeds['before']:.2f} before)" if "before" in speeds else ""
        lines.append(
            f"A whole `04_autoattack` on {row['n_images']} digits, start and figures included: "
            f"{speeds['now']:.2f} images per second{before}."
        )
    for row in _rows(found, "operations"):
        counts = ", ".join(f"{name} {value:.1f} GFLOP" for name, value in row["gflop"].items())
        lines.append(f"Of one image and step on a WRN-28-10: {counts}.")
    return " ".join(lines)


def paragraph(summaries: Mapping[str, Summary]) -> str:
    """For docs/speed.md: each device's results, and which device there are none of."""
    parts = [_sentences(found) for found in summaries.values()]
    return "\n\n".join(parts + ([] if "gpu" in summaries else ["Not measured on a GPU."]))


def _sentences(found: Summary) -> str:
    """One for each group that was measured, then the table of lower precision."""
    said = [say(found) for group, say in SAID.items() if _rows(found, group)]
    listed = "\n".join(f"- {point}" for point in said if point)
    table = f"\n\n{markdown(_cheaper(found))}" if _rows(found, "cheaper") else ""
    return f"Measured on {machine(found)}.\n\n{listed}{table}"


def _overhead(found: Summary) -> str:
    if not _rows(found, "forward"):
        return ""
    forward = {name: _highest(found, "forward", name) for name in PROBLEMS}
    return (
        f"**Overhead.** A purification takes at most {forward['digits']:.2f} times as long as the network "
        f"calls in it on digits, {forward['cifar']:.2f} times at CIFAR's size; an exact gradient, "
        f"with room for all activations or for none, at most "
        f"{_highest(found, 'gradient', 'cifar'):.2f} times at CIFAR's size."
    )


def _diffpure(found: Summary) -> str:
    peers = {(row["problem"], row["defence"]): row for row in _rows(found, "peers")}
    if any(DIFFPURE not in row["seconds"] for row in peers.values()):
        return ""
    slower = {defence: peers["cifar", defence]["ratio"][DIFFPURE][1] for defence in ("reverse", "coup")}
    theirs = [peers["digits", defence]["cosine"][DIFFPURE]["mean"] for defence in slower]
    own = min(peers["digits", defence]["cosine"][OURS]["worst"] for defence in slower)
    return (
        f"**DiffPure's adjoint** takes {slower['reverse']:.2f} times as long as our exact gradient for the "
        f"reverse SDE and {slower['coup']:.2f} times for COUP, at CIFAR's size. On the trained networks of "
        f"digits its mean cosine to the gradient in float64 is {theirs[0]:.2f} and {theirs[1]:.2f}; ours is "
        f"{own:.4f} in the worst case."
    )


def _full_size(found: Summary) -> str:
    """Of COUP by the paper's networks, at the most images measured."""
    rows = [row for row in _rows(found, "full size") if (row["problem"], row["defence"]) == ("full", "coup")]
    most = max(row["images"] for row in rows)
    rows = [row for row in rows if row["images"] == most]
    theirs = next((row for row in rows if DIFFPURE in row["seconds"]), None)
    said = []
    for row in rows:
        best = _fastest(row)
        floor, slower = (
            row["ratio"][best][1],
            f", DiffPure's adjoint {_slower(theirs, row):.2f} ×" if theirs else "",
        )
        said.append(f"{row['precision']} {floor:.2f} × its floor, {_teraflops(row, best)} TFLOP/s{slower}")
    listed = "; ".join(said)
    return f"**Large networks.** Exact gradients of COUP by DDPM++ deep and WRN-28-10, n = {most}: {listed}."


def _table1(found: Summary) -> str:
    said = (f"{row['precision']} {row['hours'] * _pace(row):,.3g}" for row in _rows(found, "table 1"))
    return f"**The paper's Table 1**, in hours at the pace of an attack that was tried: {', '.join(said)}."


def _second_order(found: Summary) -> str:
    ratios = " and ".join(
        f"{row['ratio']['frozen layers'][1]:.2f} ({CLASSIFIERS[row['problem']]})"
        for row in _rows(found, "second order")
    )
    return (
        f"**Second derivatives.** With frozen layers a Hessian-vector product takes {ratios} times as "
        "long as with PyTorch's own."
    )


def _growth(found: Summary) -> str:
    costs = ", ".join(f"{row['work']} {exponent(row['seconds']):.2f}" for row in _fitted(found))
    return (
        f"**Growth.** Time is a power of the work. The exponents: {costs}. An exponent of 1 is proportional, "
        "-1 is a perfect speed-up."
    )


SAID: dict[str, Callable[[Summary], str]] = {
    "gradient": _overhead,
    "peers": _diffpure,
    "full size": _full_size,
    "table 1": _table1,
    "second order": _second_order,
    "cost": _growth,
    "notebook": lambda found: f"**End to end.** {_notebook(found)}",
    "cheaper": lambda found: (
        "**Lower precision** of the attacked score network is off by default. What it saves, and how many "
        "images are classified otherwise (in float32, by the majority of ten draws) in the end:"
    ),
}


def _cheaper(found: Summary) -> pd.DataFrame:
    """What lower precision saves, and how often it changes a verdict."""
    rows = [
        {
            "profile": row["problem"],
            "attacked defence": LABELS[row["defence"]],
            "score network": name,
            "time over float32's": f"{ratio[1]:.2f}",
            "verdicts changed": f"{row['changed'][name]} of {row['n_images']}",
        }
        for row in _rows(found, "cheaper")
        for name, ratio in row["ratio"].items()
    ]
    return pd.DataFrame(rows).set_index("profile")


def _highest(found: Summary, group: str, problem: str) -> float:
    """The highest median ratio to the floor in float32, of either defence, with activations kept or not."""
    rows = [row for row in _rows(found, group) if row["problem"] == problem]
    return max(row["ratio"]["ours"][1] for row in rows if row["precision"] == "float32")


def write(summaries: Mapping[str, Summary]) -> None:
    """figures/benchmarks: a page and a figure for each device, and what docs/speed.md shows."""
    plots.use_style()
    for name, found in summaries.items():
        if _fitted(found):
            figure = cost_figure(found)
            plots.save(figure, "benchmarks", f"{name}_cost", "Seconds of purifications and gradients")
        _write(paths.FIGURES / "benchmarks" / f"{name}.md", page(found))
    _write(paths.FIGURES / "benchmarks" / "summary.md", paragraph(summaries))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text.rstrip() + "\n"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Reduce raw JSONs, where any is given, and render all that is committed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, nargs="*", help="what pytest-benchmark saved")
    for raw in parser.parse_args(arguments).raw:
        found = summary(json.loads(raw.read_text()))
        file = RESULTS / f"{_device(found)}.json"
        found = merged(json.loads(file.read_text()), found) if file.exists() else found
        _write(file, json.dumps(found, indent=1, ensure_ascii=False))
    write({path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))})


if __name__ == "__main__":
    main()
