"""What an audit does: the attacks that a defence faces, their run, and decisions by many draws."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from coup_lib.ascent import hidden_states, largest_radius
from coup_lib.attacks import CLASSES
from coup_lib.auditing.probe import Probe
from coup_lib.auditing.signs import strongest_of
from coup_lib.data import Images
from coup_lib.evaluation.outcomes import Predictions
from coup_lib.evaluation.profiles import FULL, QUICK_DIGITS, SMOKE, Budget
from coup_lib.evaluation.progress import foretell
from coup_lib.evaluation.run import Runner
from coup_lib.evaluation.specs import CLEAN, WITHOUT_MODEL, AttackSpec, Rows, with_transfers
from coup_lib.outside import TRIED

LONGER = 2  # times as many iterations, to see whether more still find something
LARGER = (2.0, 4.0)  # times eps; beyond these, the radius at which every image can be made grey
AUDITS = {  # budget → effort; what it says of images is not for audits
    "smoke": SMOKE,
    "quick": replace(QUICK_DIGITS["report"], square_queries=500),
    "full": FULL["report"],
}
Ask = Callable[..., dict[str, dict[Any, Predictions]]]  # of attacks by row, and what is other in the settings
VOTE = "vote"  # the gradient of a defence that votes
MANY_DRAWS = {"smoke": 4, "quick": 128, "full": 128}  # the most behind a decision


@dataclass(frozen=True, kw_only=True)
class AuditSettings(Budget):
    """Effort, threat and place of an audit, as `evaluation.config.Settings` has them."""

    profile: str
    budget: str
    norm: str
    eps: float
    torch_device: torch.device
    max_batch: int
    seed: int
    chunk_size: int = 32
    n_steps: int = 1  # unknown of a defence of one's own, and without effect
    shard: int = 0
    num_shards: int = 1

    @property
    def many_draws(self) -> int:
        """The most draws that are behind a decision."""
        return MANY_DRAWS[self.budget]


@dataclass(frozen=True)
class Prepared:
    """A defence that is ready to be attacked.

    attacked: name of a gradient ("exact" is its own) → module. judge: the module that decides. identities:
    gradient → hash, as of `identity.of_content`. seconds: that a decision on an image took.
    """

    probe: Probe
    attacked: Mapping[str, nn.Module]
    judge: nn.Module
    identities: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Defences by name, as `run.Runner` asks for them."""

    defences: dict[str, Prepared]
    classifier_name: str = "audit"

    def attacked(self, spec: AttackSpec) -> nn.Module:
        """The defence as an attack meets it."""
        if spec.attack in WITHOUT_MODEL:
            return next(iter(self.defences.values())).attacked["exact"]
        return self.defences[spec.surrogate].attacked[spec.gradient]

    def defence(self, name: str) -> nn.Module:
        """The defence itself."""
        return self.defences[name].judge

    def settings(self, name: str, spec: AttackSpec | None = None) -> dict[str, Any]:
        """What the behaviour of a defence depends on."""
        if spec and spec.attack in WITHOUT_MODEL:
            return {}
        return {"name": name, "sha256": self.defences[name].identities["exact"]}

    def how_attacked(self, spec: AttackSpec) -> dict[str, Any]:
        """What else an attack's numbers depend on: the module that is differentiated."""
        if spec.attack in WITHOUT_MODEL or spec.gradient == "exact":
            return {}
        return {"gradient_sha256": self.defences[spec.surrogate].identities[spec.gradient]}

    def precision(self, defence: str) -> str:
        """That of an attack on the defence."""
        return "float32"

    def cost(self, defence: str, n_steps: int) -> float:
        """The seconds of a decision on an image."""
        return self.defences[defence].seconds if defence in self.defences else 0.0


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
        if found.random:
            label = f"APGD-ce on the vote of {settings.n_draws}"
            row[VOTE] = label, AttackSpec("apgd-ce", name, VOTE, eot=1)
        row["standard"] = "AutoAttack standard", AttackSpec("standard", name)
    for gradient in (gradient for gradient in gradients if gradient != VOTE):
        label = gradient.replace("_", "-") if gradient != "bpda" else "BPDA"
        for loss in ("ce", "margin"):
            spec = AttackSpec(f"apgd-{loss}", name, gradient, **more)
            row[f"{gradient}-{loss}"] = f"APGD-{loss}, {label}", spec
    return row | {
        "square": ("Square (black box)", AttackSpec("square", name)),
        "rays": ("RayS (decisions alone)", AttackSpec("rays", name, **more)),
    }


LOCAL = ("clean", "noise", "fgsm", "single", "standard")  # not tried on others: stronger ones stand beside


@dataclass(frozen=True)
class Measured:
    """What an audit has measured, per defence.

    labels: column → what the attack is called. rows: column or `Transfer` → predictions. eps: radius → the
    share of right draws of each image, (n,), under APGD-ce. many: of random defences, column → predictions by
    `AuditSettings.many_draws`, on clean images, under the strongest attack, and under that on the vote.
    outside: attack outside the ball → share of right draws (n,); in no worst case. hidden: defences without
    per-step losses.
    """

    labels: dict[str, dict[str, str]]
    rows: dict[str, dict[Any, Predictions]]
    eps: dict[str, dict[float, np.ndarray]]
    many: dict[str, dict[Any, Predictions]]
    outside: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    hidden: Sequence[str] = ()


def measure(
    bench: Bench, images: Images, settings: AuditSettings, *, outside: bool = False, verbose: bool = True
) -> Measured:
    """Run the whole protocol, or read back what of it is on record; outside: leave the ball, too."""
    hidden = [name for name, one in bench.defences.items() if hidden_states(one.attacked["exact"])]
    faced = {
        name: attacks(name, [*one.attacked][1:], one.probe, settings, states=name not in hidden)
        for name, one in bench.defences.items()
    }
    labels = {name: {key: label for key, (label, _) in row.items()} for name, row in faced.items()}
    own = {name: {key: spec for key, (_, spec) in row.items()} for name, row in faced.items()}
    lent = {key for row in own.values() for key in row if key not in LOCAL}
    specs = with_transfers(own, sorted(lent))

    def runner(**changed: Any) -> Runner:
        return Runner(replace(settings, **changed), bench, lambda: images, dict, verbose=verbose)

    def ask(rows: Rows, **changed: Any) -> dict[str, dict[Any, Predictions]]:
        part = ", ".join(f"{name} = {value:.4g}" for name, value in changed.items())
        return runner(**changed).predictions(rows, part)

    larger, n = radii(images.x.shape[1:], settings.norm, settings.eps), max(2, len(images) // 2)
    by_radius = {name: {"ce": row["ce"]} for name, row in own.items() if "ce" in row}
    left = runner().left(specs)
    for radius in larger:
        left |= runner(eps=radius, n_images=n).left(by_radius)
    if left and verbose:
        foretell(left, 1.0, settings.torch_device)
    rows = ask(specs)
    return Measured(
        labels,
        rows,
        eps=_by_radius(ask, rows, by_radius, [settings.eps, *larger], n),
        many=ask(_voted_on(bench, rows, specs), n_draws=settings.many_draws),
        outside=_outside(bench, ask) if outside else {},
        hidden=hidden,
    )


def radii(shape: Sequence[int], norm: str, eps: float) -> list[float]:
    """Radii beyond eps, up to the one at which every image of this shape can be made grey."""
    grey = 0.5 * largest_radius(norm, shape)
    return [factor * eps for factor in LARGER if factor * eps < grey] + [max(grey, eps)]


def _by_radius(
    ask: Ask,
    rows: Mapping[str, Mapping[Any, Predictions]],
    faced: Rows,
    every: Sequence[float],
    n: int,
) -> dict[str, dict[float, np.ndarray]]:
    """Defence → radius → the share of right draws of the first n images under APGD-ce, its own gradient."""
    eps, *larger = every
    found = {name: {0.0: rows[name]["clean"].right[:n], eps: rows[name]["ce"].right[:n]} for name in faced}
    for radius in larger if faced else []:
        for name, row in ask(faced, eps=radius, n_images=n).items():
            found[name][radius] = row["ce"].right
    return found


def _outside(bench: Bench, ask: Ask) -> dict[str, dict[str, np.ndarray]]:
    """Defence with a gradient → attack outside the ball → the share of right draws of each image, (n,)."""
    found: dict[str, dict[str, np.ndarray]] = {
        name: {} for name, one in bench.defences.items() if not one.probe.error
    }
    for (kind, reach), label in TRIED.items():
        faced = {name: {label: AttackSpec(kind, name)} for name in found}
        for name, row in ask(faced, eps=reach).items():
            found[name][label] = row[label].right
    return found


def _voted_on(bench: Bench, rows: Mapping[str, Mapping[Any, Predictions]], specs: Rows) -> Rows:
    """The fewer attacks on random defences that are decided by many draws, too."""
    faced = {}
    for name, row in specs.items():
        if bench.defences[name].probe.random:
            strongest = strongest_of([*row], {key: rows[name][key].selection for key in row})
            faced[name] = {key: row[key] for key in ("clean", strongest, VOTE) if key in row}
    return faced
