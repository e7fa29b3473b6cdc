"""What an audit does: the attacks that a defence faces, their run, and decisions by many draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_lib.ascent import hidden_states
from coup_lib.attacks import CLASSES
from coup_lib.auditing.probe import Probe
from coup_lib.data import Images
from coup_lib.evaluation.identity import of_images
from coup_lib.evaluation.noise import DECIDE, image_seeds
from coup_lib.evaluation.outcomes import Predictions, most_frequent, worst_case
from coup_lib.evaluation.run import Runner, classes_of, predict
from coup_lib.evaluation.specs import CLEAN, WITHOUT_MODEL, AttackSpec, with_transfers
from coup_lib.outside import TRIED

LONGER = 2  # times as many iterations, to see whether more still find something
LARGER = (2.0, 4.0)  # times eps; beyond these, the radius at which every image can be made grey
COUNTS = (1, 10, 128)  # draws behind a decision
RULES = {
    "worst": "All of N draws",
    "average": "Mean logits of N draws",
    "majority": "Majority of N draws",
}


@dataclass(frozen=True)
class Effort:
    """How much work an audit does. eps_images: of how many images the larger radii are."""

    n_iter: int
    eot: int
    n_targets: int
    square_queries: int
    n_draws: int
    eps_images: int
    counts: tuple[int, ...] = COUNTS


EFFORTS = {
    "smoke": Effort(2, 2, 1, 5, 2, 4, (1, 2, 4)),
    "quick": Effort(20, 5, 3, 500, 10, 64),
    "full": Effort(100, 20, 9, 5000, 10, 256),
}


@dataclass(frozen=True)
class AuditSettings:
    """Threat, effort and place of an audit, as `evaluation.config.Settings` has them."""

    profile: str
    norm: str
    eps: float
    n_images: int
    n_iter: int
    eot: int
    n_targets: int
    square_queries: int
    n_draws: int
    torch_device: torch.device
    max_batch: int
    seed: int
    chunk_size: int = 32
    n_steps: int = 1  # unknown of a defence of one's own; for the estimate of the time left only
    shard: int = 0
    num_shards: int = 1


@dataclass(frozen=True)
class Bench:
    """Defences by name, and what identifies them, as `run.Runner` asks for them.

    models: defence → name of a gradient ("exact" is its own) → module to be attacked. judges: defence → the
    module that decides. identities: defence → gradient → `fingerprint`.
    """

    models: Mapping[str, Mapping[str, nn.Module]]
    judges: Mapping[str, nn.Module]
    identities: Mapping[str, Mapping[str, str]]
    classifier_name: str = "audit"

    def attacked(self, spec: AttackSpec) -> nn.Module:
        """The defence as an attack meets it."""
        if spec.attack in WITHOUT_MODEL:
            return next(iter(self.models.values()))["exact"]
        return self.models[spec.surrogate][spec.gradient]

    def defence(self, name: str) -> nn.Module:
        """The defence itself."""
        return self.judges[name]

    def settings(self, name: str, spec: AttackSpec | None = None) -> dict[str, Any]:
        """What the behaviour of a defence depends on."""
        if spec and spec.attack in WITHOUT_MODEL:
            return {}
        return {"name": name, "sha256": self.identities[name]["exact"]}

    def how_attacked(self, spec: AttackSpec) -> dict[str, Any]:
        """What else an attack's numbers depend on: the module that is differentiated."""
        if spec.attack in WITHOUT_MODEL or spec.gradient == "exact":
            return {}
        return {"gradient_sha256": self.identities[spec.surrogate][spec.gradient]}

    def precision(self, defence: str) -> str:
        """That of an attack on the defence."""
        return "float32"


def attacks(
    name: str, gradients: Sequence[str], found: Probe, settings: AuditSettings, *, states: bool = False
) -> dict[str, tuple[str, AttackSpec]]:
    """Column → (label, attack) of all that a defence faces by itself.

    Args:
        name: of the defence.
        gradients: names of those it has beside its own.
        states: it shows those of its path, see `ascent.hidden_states`.
    """
    more: dict[str, Any] = {} if found.random else {"eot": 1}  # without noise one draw tells all
    small = {CLASSES["apgd-dlr"]: "dlr"}
    losses = [loss for fewest, loss in small.items() if found.classes >= fewest] + ["margin"]
    row = {"clean": ("clean images", CLEAN), "noise": ("random noise", AttackSpec("noise", name))}
    if not found.error:
        row |= {
            "fgsm": ("FGSM (one step)", AttackSpec("fgsm", name, **more)),
            "ce": ("APGD-ce", AttackSpec("apgd-ce", name, **more)),
            "long": (
                f"APGD-ce, {LONGER} × iterations",
                AttackSpec("apgd-ce", name, n_iter=LONGER * settings.n_iter, **more),
            ),
        }
        for place, loss in enumerate(losses, start=1):  # restarts: another loss from another seed
            spec = AttackSpec(f"apgd-{loss}", name, seed=settings.seed + place, **more)
            row[loss] = f"APGD-{loss}", spec
        if found.random:
            row["single"] = "APGD-ce, one draw a gradient", AttackSpec("apgd-ce", name, eot=1)
            row["kept"] = "APGD-ce, kept by all draws", AttackSpec("kept", name)
            row["em"] = "EM selection of draws", AttackSpec("em", name)
        if states:
            row["steps"] = "APGD-ce and per-step losses", AttackSpec("per-step", name)
        row["low"] = "APGD-ce, low frequencies", AttackSpec("low-frequency", name, **more)
        row["standard"] = "AutoAttack standard", AttackSpec("standard", name)
    for gradient in gradients:
        label = gradient.replace("_", "-") if gradient != "bpda" else "BPDA"
        for loss in ("ce", "margin"):
            spec = AttackSpec(f"apgd-{loss}", name, gradient, **more)
            row[f"{gradient}-{loss}"] = f"APGD-{loss}, {label}", spec
    return row | {"square": ("Square (black box)", AttackSpec("square", name))}


LOCAL = ("clean", "noise", "fgsm", "single", "standard")  # not tried on others: stronger ones stand beside


@dataclass(frozen=True)
class Measured:
    """What an audit has measured, per defence.

    labels: column → what the attack is called. rows: column or `Transfer` → predictions. eps: radius → the
    share of right draws of each image, (n,), under APGD-ce. decided: (images, rule, N) → likewise, by N draws
    each; the images are "clean" or "attacked", the latter each image's worst. outside: attack outside the
    ball → likewise; no part of any worst case. hidden: defences without per-step losses.
    """

    labels: dict[str, dict[str, str]]
    rows: dict[str, dict[Any, Predictions]]
    eps: dict[str, dict[float, np.ndarray]]
    decided: dict[str, dict[tuple[str, str, int], np.ndarray]]
    outside: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    hidden: Sequence[str] = ()


def measure(
    bench: Bench,
    probes: Mapping[str, Probe],
    images: Images,
    settings: AuditSettings,
    effort: Effort,
    *,
    outside: bool = False,
    verbose: bool = True,
) -> Measured:
    """Run the whole protocol, or read back what of it is on record; outside: leave the ball, too."""
    hidden = [name for name in probes if hidden_states(bench.models[name]["exact"])]
    faced = {
        name: attacks(name, [*bench.models[name]][1:], found, settings, states=name not in hidden)
        for name, found in probes.items()
    }
    labels = {name: {key: label for key, (label, _) in row.items()} for name, row in faced.items()}
    own = {name: {key: spec for key, (_, spec) in row.items()} for name, row in faced.items()}
    lent = {key for row in own.values() for key in row if key not in LOCAL}
    specs = with_transfers(own, sorted(lent))
    runner = _runner(bench, images, settings, verbose=verbose)
    rows = runner.predictions(specs)
    eps = _by_radius(
        bench, rows, own, images, replace(settings, n_images=min(effort.eps_images, len(images)))
    )
    decided = {
        name: _decided(runner, name, specs[name], rows[name], effort.counts)
        for name, found in probes.items()
        if found.random
    }
    beyond = _outside(bench, probes, images, settings) if outside else {}
    return Measured(labels, rows, eps, decided, beyond, hidden)


def _runner(bench: Bench, images: Images, settings: AuditSettings, *, verbose: bool) -> Runner:
    return Runner(settings, bench, lambda: images, dict, verbose=verbose)


def radii(shape: Sequence[int], norm: str, eps: float) -> list[float]:
    """Radii beyond eps, up to the one at which every image of this shape can be made grey."""
    grey = 0.5 if norm == "linf" else 0.5 * float(np.prod(shape)) ** 0.5
    return [factor * eps for factor in LARGER if factor * eps < grey] + [max(grey, eps)]


def _by_radius(
    bench: Bench,
    rows: Mapping[str, Mapping[Any, Predictions]],
    own: Mapping[str, Mapping[str, AttackSpec]],
    images: Images,
    settings: AuditSettings,
) -> dict[str, dict[float, np.ndarray]]:
    """Defence → radius → the share of right draws of the first images, under APGD-ce by its own gradient."""
    n, faced = settings.n_images, {name: {"ce": row["ce"]} for name, row in own.items() if "ce" in row}
    found = {
        name: {0.0: rows[name]["clean"].right[:n], settings.eps: rows[name]["ce"].right[:n]} for name in faced
    }
    for radius in radii(images.x.shape[1:], settings.norm, settings.eps) if faced else []:
        at = _runner(bench, images, replace(settings, eps=radius), verbose=False)
        for name, row in at.predictions(faced).items():
            found[name][radius] = row["ce"].right
    return found


def _outside(
    bench: Bench, probes: Mapping[str, Probe], images: Images, settings: AuditSettings
) -> dict[str, dict[str, np.ndarray]]:
    """Defence with a gradient → attack outside the ball → the share of right draws of each image, (n,)."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name, one in probes.items() if not one.error}
    for (kind, reach), label in TRIED.items():
        at = _runner(bench, images, replace(settings, eps=reach), verbose=False)
        for name, row in at.predictions({name: {label: AttackSpec(kind, name)} for name in found}).items():
            found[name][label] = row[label].right
    return found


def _decided(
    runner: Runner,
    name: str,
    specs: Mapping[Any, AttackSpec],
    row: Mapping[Any, Predictions],
    counts: Sequence[int],
) -> dict[tuple[str, str, int], np.ndarray]:
    """(images, rule, N) → the share of right decisions of each image, (n,), by fresh draws."""
    source, attacked = worst_case([*row.values()]).source, runner.images.x.clone()
    for place, spec in enumerate(specs.values()):
        chosen = torch.from_numpy(source == place)
        if chosen.any():
            attacked[chosen] = runner.x_adv(spec)[chosen]
    found: dict[tuple[str, str, int], np.ndarray] = {}
    for kind, x in (("clean", runner.images.x), ("attacked", attacked)):
        drawn, y = _many_draws(runner, name, x, counts), runner.images.y.cpu().numpy()
        for n in counts:
            votes = np.array(drawn["classes"])[:, : max(counts) // n * n].reshape(len(y), -1, n)
            ruled = {
                "worst": (votes == y[:, None, None]).all(2),
                "majority": most_frequent(votes) == y[:, None],
                "average": np.array(drawn[f"average_{n}"]) == y[:, None],
            }
            found |= {(kind, rule, n): right.mean(1) for rule, right in ruled.items()}
    return found


def _many_draws(runner: Runner, name: str, x: Tensor, counts: Sequence[int]) -> dict[str, Any]:
    """The record of a defence's decisions on images x by many draws, and by the mean logits of N of them."""
    most, config = max(counts), runner.config

    def compute(place: int) -> dict[str, Any]:
        part = x[place : place + config.chunk_size]
        seeds = image_seeds(config.seed, DECIDE, range(place, place + len(part)), most)
        logits = predict(runner.bench.defence(name), part, seeds, runner.batch.most)
        groups = {n: logits[:, : most // n * n].unflatten(1, (-1, n)).mean(2) for n in counts}
        averages = {f"average_{n}": classes_of(group).tolist() for n, group in groups.items()}
        return {"classes": classes_of(logits).tolist(), **averages}

    settings: dict[str, Any] = {"target": runner.bench.settings(name), "counts": [*counts]}
    settings |= {"images": of_images(Images(x, runner.images.y)), "seed": config.seed}
    return runner.record(f"decisions-{name}", settings, compute).finish()["result"]
