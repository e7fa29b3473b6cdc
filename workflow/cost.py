"""What the whole paper costs, by counting: `python -m workflow.cost > workflow/cost.md`; nothing is measured.

`coup estimate` measures on a machine how fast that is done.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from coup_lib.evaluation.config import Config
from coup_lib.reporting.tables import markdown
from coup_lib.studies.grids import NOTEBOOKS, grid
from workflow.estimate import Job, jobs, seconds, work

# GFLOP of a call on one image, a multiply-add counting two.
SCORE, CLASSIFIERS = 37.1, {"wrn-28-10": 10.5, "wrn-70-16-dropout": 77.5}
# TFLOP/s of an H100 (SXM) by its data sheet, without sparsity, and the share of it that we assume, not
# measured: between 3 × 3 convolutions of 128 to 640 channels on 32 × 32 pixels these networks have
# normalisations that wait for memory, and the faster the products are, the more of the time goes there.
PEAK = {"float32": 67.0, "tf32": 495.0, "bfloat16": 989.0}
UTILISATION = {"float32": 0.5, "tf32": 0.25, "bfloat16": 0.2}
SUSTAINED = {name: UTILISATION[name] * peak for name, peak in PEAK.items()}
LABELS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
GPUS = (1, 4, 8)
SIZES = (512, 10_000)
NORMS = {"04_autoattack": ("linf", "l2")}  # the others are run at L∞; 06 has both norms in it
PAPER, ALL = "the paper: 01 to 06", "all of them"


def cost(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """TFLOP in the score network and in the classifier, (2,): of an attack, and of scoring what it found."""
    call = np.array([SCORE, CLASSIFIERS.get(job.classifier, CLASSIFIERS["wrn-28-10"])]) / 1000
    attack, scores = work(job, replayed=1)
    return attack * call, scores * call


def planned(name: str, n_images: int) -> Iterable[Job]:
    """The jobs of a notebook of the paper's tier, in the norms in which it is run."""
    for norm in NORMS.get(name, ("linf",)):
        common = {"profile": "cifar10", "budget": "full", "subset": "first", "n_images": n_images}
        settings = [{"norm": norm} | common | given for given in NOTEBOOKS[name].settings]
        for given in settings:
            if given.get("split") == "validation":
                given["n_images"] = min(n_images, 5_000)
        yield from jobs(grid(name, *(Config(**given) for given in settings)))


def table(n_images: int) -> pd.DataFrame:
    """A row for each notebook, and their sums."""
    rows: dict[str, dict[str, float]] = {}
    for name in NOTEBOOKS:
        row = rows[name] = dict.fromkeys(("attacks", "PFLOP", *map(hours, SUSTAINED), "GiB"), 0.0)
        for job in planned(name, n_images):
            n, (attack, scores) = job.n_images, cost(job)
            row["attacks"] += job.makes_images
            row["PFLOP"] += n * (attack + scores).sum() / 1000
            for precision in SUSTAINED:
                row[hours(precision)] += n * seconds(attack, scores, precision, SUSTAINED) / 3600
            row["GiB"] += n * job.makes_images * 3 * 32 * 32 * 4 / 2**30
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")
    frame.loc[PAPER] = frame.loc[:"06_adversarial_training"].sum()
    frame.loc[ALL] = frame.loc[list(NOTEBOOKS)].sum()
    return frame


def hours(precision: str) -> str:
    """The heading of its column."""
    return f"GPU hours, {LABELS[precision]}"


def days(frame: pd.DataFrame) -> pd.DataFrame:
    """Days on several GPUs, of the paper and of all notebooks."""
    rows = {
        f"{what}, {LABELS[precision]}": {
            f"{n} GPU{'s' * (n > 1)}": frame.loc[what, hours(precision)] / 24 / n for n in GPUS
        }
        for what in (PAPER, ALL)
        for precision in SUSTAINED
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("days")


def written(frame: pd.DataFrame) -> str:
    """Markdown."""
    return markdown(frame.map(lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2g}"))


def page() -> str:
    """Markdown."""
    call = CLASSIFIERS["wrn-28-10"]
    assumed = "; ".join(
        f"{LABELS[name]} {SUSTAINED[name]:.0f} ({UTILISATION[name]:.0%} of {peak:g})"
        for name, peak in PEAK.items()
    )
    parts = [
        "# What the whole paper costs",
        "By `python -m workflow.cost > workflow/cost.md`: counted, not measured. Profile `cifar10`, budget "
        "`full`, every notebook at the same number of images (07 and 08 take fewer by default; the "
        "validation split of 03 and 08 has 5,000) and at L∞, 04 at L2, too; 100 steps at L∞ and 75 at L2: "
        "all attacks that the notebooks plan, and 20 fresh "
        "purifications of each image that they found, for every defence that is scored on it.",
        f"GFLOP of a call on one image: DDPM++ deep {SCORE}, WRN-28-10 {call}; a derivative takes as much "
        "again. An exact gradient walks the path twice and back once, guidance is a call and its "
        f"derivative: for COUP 100 × (3 × {SCORE} + 6 × {call}) = {100 * (3 * SCORE + 6 * call):,.0f} GFLOP.",
        f"**The speed is an assumption**, in TFLOP/s, by the data sheet of an H100 (SXM): {assumed}. Hours "
        "go with its inverse; `coup estimate` measures it on a machine. float32 is the "
        "default. `-p precision tf32` is for all that is under attack, `-p precision bfloat16` for the score "
        "network there; what an attack found is scored in float32.",
        "GiB: the adversarial images of every attack, float32.",
    ]
    for n_images in SIZES:
        frame = table(n_images)
        parts += [f"## {n_images:,} images", written(frame), written(days(frame))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
