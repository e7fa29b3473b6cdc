"""What the whole paper costs, by counting: `python workflow/cost.py > workflow/cost.md`; nothing is measured.

`python -m coup_lib.estimate` measures it on a machine, one notebook's batch at a time.
"""

from collections.abc import Iterable

import pandas as pd

from coup_lib.config import Config
from coup_lib.defences import MAXIMISERS, is_guided, purifications
from coup_lib.estimate import NOTEBOOKS, jobs
from coup_lib.evaluate import Job
from coup_lib.tables import markdown

# GFLOP of one image, a multiply-add counting two: the call, with its derivative in the image, and for
# classifiers the gradient of the confidence and that with its Hessian-vector product.
SCORE = {"call": 37.1, "derivative": 74.8}
CLASSIFIERS = {"wrn-28-10": (10.5, 21.0, 41.9), "wrn-70-16-dropout": (77.5, 155.0, 310.0)}
SUSTAINED = 100.0  # TFLOP/s, about a fifth of what one large GPU of 2022 does in bfloat16, a half in TF32
MAXIMISER_STEPS = 5
SIZES = (512, 10_000)
NORM = {"02_ablation": ("linf",), "03_sweeps": ("linf",), "06_adversarial_training": ("linf",)}


def teraflop(job: Job, defence: str, gradient: str | None) -> float:
    """Of one purification and decision, or with a gradient of that."""
    call, confidence, curvature = CLASSIFIERS.get(job.classifier, CLASSIFIERS["wrn-28-10"])
    decision = call if gradient is None else confidence
    if defence == "none":
        return decision / 1000
    steps = MAXIMISER_STEPS if defence in MAXIMISERS else job.config.n_steps
    step = SCORE["call"] + (confidence if is_guided(defence) else 0)
    if gradient not in (None, "bpda"):  # a replay: forward again, and back
        step += SCORE["derivative"]
        if is_guided(defence):
            step += confidence if gradient == "first_order" else curvature
    return purifications(defence) * (steps * step + decision) / 1000


def cost(job: Job) -> float:
    """TFLOP of an attack and of scoring what it found, for one image."""
    gradients, forwards = job.calls
    source, gradient = job.source.defence, job.source.gradient
    attack = gradients * teraflop(job, source, gradient) + forwards * teraflop(job, source, None)
    scores = sum(2 * job.config.n_draws * teraflop(job, target, None) for target in job.targets)
    return attack + scores


def planned(name: str, n_images: int) -> Iterable[Job]:
    """The jobs of a notebook of the paper's tier, in the norms in which it is run."""
    for norm in NORM.get(name, ("linf", "l2")):
        common = {"profile": "cifar10", "budget": "full", "subset": "first", "n_images": n_images}
        settings = [{"norm": norm} | common | given for given in NOTEBOOKS[name].settings]
        for given in settings:
            if given.get("split") == "validation":
                given["n_images"] = min(n_images, 5_000)
        yield from jobs(name, *(Config(**given) for given in settings))


def table(n_images: int) -> pd.DataFrame:
    """A row for each notebook, and their sum."""
    rows = {}
    for name in NOTEBOOKS:
        found = list(planned(name, n_images))
        petaflop = sum(job.config.n_images * cost(job) for job in found) / 1000
        attacks = [job for job in found if job.makes_images]
        stored = sum(job.config.n_images for job in attacks) * 3 * 32 * 32 * 4 / 2**30
        rows[name] = {
            "attacks": len(attacks),
            "PFLOP": petaflop,
            "GPU hours": petaflop * 1000 / SUSTAINED / 3600,
            "GiB": stored,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")
    frame.loc["the paper: 01 to 06"] = frame.loc[:"06_adversarial_training"].sum()
    frame.loc["all of them"] = frame.loc[list(NOTEBOOKS)].sum()
    return frame.map(lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2g}")


def page() -> str:
    """Markdown."""
    call, confidence, curvature = CLASSIFIERS["wrn-28-10"]
    coup = SCORE["call"] + SCORE["derivative"] + confidence + curvature
    parts = [
        "# What the whole paper costs",
        "By `python workflow/cost.py > workflow/cost.md`: counted, not measured. Profile `cifar10`, budget "
        "`full`, every notebook at the same number of images (07 and 08 take fewer by default), 100 steps at "
        "L∞ and 75 at L2: all attacks that the notebooks plan, and 20 fresh purifications of each image that "
        "they found, for every defence that is scored on it.",
        f"GFLOP of one image: a call of DDPM++ deep {SCORE['call']}, with its derivative "
        f"{SCORE['derivative']}; WRN-28-10 {call}, the gradient of its confidence {confidence}, with a "
        f"Hessian-vector product {curvature}. An exact gradient walks the path twice and back once: for COUP "
        f"100 × {coup:.1f} GFLOP.",
        f"GPU hours at {SUSTAINED:.0f} TFLOP/s sustained; at another speed they go with its inverse. GiB: "
        "the adversarial images of every attack, float32.",
    ]
    for n_images in SIZES:
        parts += [f"## {n_images:,} images", markdown(table(n_images))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
