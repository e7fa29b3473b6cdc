"""Attacks as data: which attack, against which defence, by which gradient, with which budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from coup_lib.attacks import NAMES
from coup_lib.checks import choice, count
from coup_lib.evaluation.config import Settings
from coup_lib.evaluation.outcomes import Transfer

# What of a budget an attack spends, beside the images and the threat; the others iterate.
SPENT = {
    "clean": (),
    "noise": (),
    "fgsm": ("eot",),
    "square": ("square_queries",),
    "rays": ("eot", "square_queries"),
    "standard": ("n_iter", "n_targets", "square_queries"),
}
ITERATED = ("n_iter", "eot")
WITHOUT_MODEL = ("clean", "noise")
WITHOUT_GRADIENT = (*WITHOUT_MODEL, "square", "rays")


@dataclass(frozen=True)
class AttackSpec:
    """An attack on a surrogate, the defence that it sees and differentiates.

    attack: by the names of `attacks.Attack`. surrogate: a defence's name; images may be tried on others.
    gradient: of the surrogate, by name. n_iter, eot, n_steps, guidance_weight and seed, where given, take the
    place of the configuration's: n_steps that of the path under attack (a coarser one may stand in for the
    true one), seed that of attack and surrogate. fixed_noise: the surrogate draws the same noise every time.
    start: an attack from whose images this one begins.

    Raises:
        ValueError: for an unknown name, or a number out of its range.
    """

    attack: str
    surrogate: str
    gradient: str = "exact"
    n_iter: int | None = None
    eot: int | None = None
    n_steps: int | None = None
    seed: int | None = None
    fixed_noise: bool = False
    start: "AttackSpec | None" = None
    guidance_weight: float | None = None

    def __post_init__(self) -> None:
        choice("attack", self.attack, NAMES)
        for name in ("n_iter", "eot", "n_steps"):
            if getattr(self, name) is not None:
                count(name, getattr(self, name))
        if self.attack in WITHOUT_GRADIENT:
            object.__setattr__(self, "gradient", "exact")
        if self.attack in WITHOUT_MODEL:
            object.__setattr__(self, "surrogate", "none")

    def __str__(self) -> str:
        if self.attack in WITHOUT_MODEL:
            return self.attack
        said = [f"{self.attack} on {self.surrogate}"]
        said += [self.gradient] if self.attack not in WITHOUT_GRADIENT else []
        named = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        named |= {"fixed_noise": None, "start": None}
        said += [f"{name} {value}" for name, value in named.items() if value is not None]
        said += ["fixed noise"] if self.fixed_noise else []
        said += [f"from {self.start}"] if self.start else []
        return ", ".join(said)

    @property
    def path(self) -> dict[str, float]:
        """What it has of its own of the path under attack, number of steps and λ, by the settings' names."""
        own = {"n_steps": self.n_steps, "guidance_weight": self.guidance_weight}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def spends(self) -> tuple[str, ...]:
        """What of a budget the attack spends, by the names of `Settings`."""
        return SPENT.get(self.attack, ITERATED)

    def budget(self, config: Settings) -> dict[str, int]:
        """What it spends, its own numbers before the configuration's."""
        own = {name: getattr(self, name, None) for name in self.spends}
        return {name: value or getattr(config, name) for name, value in own.items()}

    def calls(self, config: Settings) -> tuple[int, int]:
        """(gradients, forward passes without one) of the surrogate, per image."""
        spent = self.budget(config)
        gradients, forwards = spent.get("n_iter", 1) * spent.get("eot", 0), spent.get("square_queries", 0)
        if self.attack == "standard":
            gradients = config.n_iter * (1 + 2 * config.n_targets)
        if self.attack in WITHOUT_GRADIENT:
            gradients = 0
        return (0, gradients + forwards) if self.gradient == "bpda" else (gradients, forwards)


CLEAN = AttackSpec("clean", "none")
Rows = Mapping[str, Mapping[Any, AttackSpec]]  # target → column → attack whose images it faces


def with_transfers(
    rows: Mapping[str, Mapping[str, AttackSpec]], names: Sequence[str] = ()
) -> dict[str, dict[Any, AttackSpec]]:
    """Every target also on the images made against the others: target → key → attack.

    An attacker is free to try these images too. The key of an attack on another target is a `Transfer`.

    names: the columns that are transferred, by default all.
    """
    made: dict[Transfer, AttackSpec] = {}
    for target, row in rows.items():
        chosen = {name: spec for name, spec in row.items() if name in (names or row)}
        made |= made_against(target, chosen, target)
    return {
        target: {**row, **{key: spec for key, spec in made.items() if spec not in row.values()}}
        for target, row in rows.items()
    }


def made_against(target: str, row: Mapping[Any, AttackSpec], surrogate: str) -> dict[Transfer, AttackSpec]:
    """Those attacks of a row that see this target, by the keys under which they are transferred."""
    return {
        Transfer(surrogate, name): spec
        for name, spec in row.items()
        if spec.surrogate == target and spec.attack not in WITHOUT_MODEL
    }
