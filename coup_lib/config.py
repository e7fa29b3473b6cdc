"""Profiles, and the one place where a user's settings are checked."""

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from coup_lib.data import SIZES
from coup_lib.paths import SMOKE_VARIABLE, is_smoke

T = TypeVar("T")

NORM_LABELS = {"linf": "Linf", "l2": "L2"}  # as AutoAttack spells them
NORMS = tuple(NORM_LABELS)
GRADIENTS = ("exact", "first_order", "adjoint", "bpda")


def choice(name: str, value: Any, known: Any) -> Any:
    """`value` if it is one of `known`, else a ValueError that names what was expected and what came."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}; got {value!r}")
    return value


def number(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    """A float in (low, high] from a number or a string such as "0.1", "1e3" or "8/255"."""
    try:
        result = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f'{name}: expected a number or a fraction such as "8/255"; got {value!r}') from None
    if not low < result <= high or result == float("inf"):
        upper = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"{name}: expected a number greater than {low:g}{upper}; got {value!r}")
    return result


def count(name: str, value: Any, high: float = float("inf"), low: int = 1) -> int:
    """A whole number in [low, high]; papermill hands over 1e3 as a float and that is fine."""
    result = number(name, value, low - 1, high)
    if isinstance(value, bool) or result != int(result):
        raise ValueError(f"{name}: expected a whole number; got {value!r}")
    return int(result)


def from_notebook(settings: type[T], namespace: dict[str, Any], own: Sequence[str] = (), **fixed: Any) -> T:
    """Build the dataclass `settings` from a notebook's parameters: `from_notebook(Config, globals())`.

    `own` are parameters of the notebook that are no fields; `fixed` are fields that are not the user's to
    choose here.

    papermill only warns of a `-p` that the notebook does not know and runs with the default. So the
    cells that begin with `# Parameters` (the notebook's own and the one papermill adds) are read for every
    name that they set, and an unknown one is refused. Overrides are echoed.

    Raises:
        ValueError: naming the unknown parameter and the known ones, or what `settings` itself refuses.
    """
    fields = {field.name: field.default for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    fields = {name: default for name, default in fields.items() if name not in fixed}
    given = {name: namespace[name] for name in fields if name in namespace}
    for name in _assigned_names(namespace.get("In", [])):
        if name not in (*fields, *own):
            raise ValueError(
                f"unknown parameter {name!r}; this notebook knows {', '.join(sorted((*fields, *own)))}"
            )
    result = settings(**given, **fixed)
    for name, default in fields.items():
        if name in given and given[name] != default:
            print(f"override: {name} = {given[name]!r} (default {default!r})")
    if is_smoke():
        print(f"{SMOKE_VARIABLE} is set: smallest sizes, the numbers mean nothing")
    return result


def _assigned_names(cells: list[str]) -> list[str]:
    """The names that the parameter cells of an IPython history set, in order."""
    targets: list[ast.expr] = []
    for cell in cells:
        if not cell.lstrip().startswith("# Parameters"):
            continue
        for node in ast.parse(cell).body:
            targets += node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@dataclass(frozen=True)
class Budget:
    """How much work an attack run does; to `report` in `full` is the paper's protocol."""

    n_images: int
    n_iter: int  # APGD and FAB iterations
    eot: int  # noise draws per gradient of APGD-ce and of AutoAttack's rand version
    n_targets: int  # target classes of APGD-t and FAB-t
    square_queries: int


@dataclass(frozen=True)
class Profile:
    """Data, networks and sizes; the code that runs is the same for every profile."""

    dataset: str
    classifiers: tuple[str, ...]  # the first one is the default
    robust_classifiers: dict[str, str]  # the first one's architecture, adversarially trained for each norm
    score: str
    eps: dict[str, float]
    t_star: dict[str, float]
    t_max: float  # the score network knows no later time
    guidance_weight: float
    n_steps: dict[str, int]
    chunk_size: int
    max_batch: int  # images in one network call; EOT draws are batched up to this
    budgets: dict[str, dict[str, Budget]]  # purpose → budget


# What a run is for: a table of the paper; a few defences beside each other; many settings of one; a search
# among many; many attacks.
PURPOSES = ("report", "compare", "sweep", "search", "probe")
BUDGETS = ("smoke", "quick", "full")
SMOKE_STEPS = 3
SMOKE = Budget(n_images=4, n_iter=2, eot=2, n_targets=1, square_queries=5)

PROFILES = {
    "digits": Profile(
        dataset="digits",
        classifiers=("cnn-small", "cnn-large"),
        robust_classifiers={"linf": "cnn-small-linf", "l2": "cnn-small-l2"},
        score="score",
        # 8/255 is invisible to a digit classifier; 0.15 breaks it as 8/255 breaks one of CIFAR-10.
        eps={"linf": 0.15, "l2": 0.5},
        t_star={"linf": 0.1, "l2": 0.075},
        t_max=0.3,
        guidance_weight=1.0,
        n_steps={"linf": 10, "l2": 10},
        chunk_size=128,
        max_batch=1280,
        budgets={
            "report": {
                "smoke": SMOKE,
                "quick": Budget(n_images=128, n_iter=20, eot=5, n_targets=3, square_queries=200),
                "full": Budget(n_images=512, n_iter=100, eot=20, n_targets=9, square_queries=5000),
            },
            "compare": {
                "smoke": SMOKE,
                "quick": Budget(n_images=128, n_iter=10, eot=4, n_targets=3, square_queries=200),
                "full": Budget(n_images=512, n_iter=40, eot=10, n_targets=9, square_queries=2000),
            },
            "sweep": {
                "smoke": SMOKE,
                "quick": Budget(n_images=64, n_iter=10, eot=3, n_targets=3, square_queries=200),
                "full": Budget(n_images=512, n_iter=30, eot=8, n_targets=9, square_queries=2000),
            },
            "search": {
                "smoke": SMOKE,
                "quick": Budget(n_images=48, n_iter=8, eot=3, n_targets=3, square_queries=200),
                "full": Budget(n_images=256, n_iter=20, eot=5, n_targets=9, square_queries=2000),
            },
            "probe": {
                "smoke": SMOKE,
                "quick": Budget(n_images=32, n_iter=20, eot=5, n_targets=3, square_queries=200),
                "full": Budget(n_images=128, n_iter=50, eot=20, n_targets=9, square_queries=2000),
            },
        },
    ),
}


@dataclass(frozen=True)
class Config:
    """The settings of an evaluation. None means the profile's own value; every field is checked on creation.

    Raises:
        ValueError: naming the field, what was expected and what came, before any network is loaded.
    """

    profile: str = "digits"
    budget: str = "quick"
    norm: str = "linf"
    gradient: str = "exact"  # what the adaptive attack of the paper's protocol differentiates with
    eps: Any = None
    n_images: Any = None
    n_iter: Any = None
    eot: Any = None
    n_targets: Any = None
    square_queries: Any = None
    t_star: Any = None
    guidance_weight: Any = None
    n_steps: Any = None
    n_draws: int = 10  # noise draws per image when an attack is scored
    split: str = "test"
    seed: int = 0
    purpose: str = "report"

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        profile = PROFILES[choice("profile", self.profile, PROFILES)]
        choice("purpose", self.purpose, PURPOSES)
        fill("budget", "smoke" if is_smoke() else choice("budget", self.budget, BUDGETS))
        fill("norm", choice("norm", str(self.norm).lower(), NORMS))
        choice("gradient", self.gradient, GRADIENTS)
        choice("split", self.split, SIZES)
        budget = profile.budgets[self.purpose][self.budget]
        budget = dataclasses.replace(budget, n_images=min(budget.n_images, SIZES[self.split]))
        defaults = {name: getattr(profile, name)[self.norm] for name in ("eps", "t_star", "n_steps")}
        defaults |= dataclasses.asdict(budget) | {"guidance_weight": profile.guidance_weight}
        if self.budget == "smoke":
            defaults["n_steps"] = SMOKE_STEPS
        for name, value in defaults.items():
            if getattr(self, name) is None:
                fill(name, value)
        fill("eps", number("eps", self.eps, 0))
        fill("t_star", number("t_star", self.t_star, 1e-5, profile.t_max))
        # Negative weights are a legitimate control: guidance with its sign flipped.
        fill("guidance_weight", number("guidance_weight", self.guidance_weight, -1e3, 1e3))
        fill("n_images", count("n_images", self.n_images, SIZES[self.split]))
        for name in ("n_iter", "eot", "n_targets", "square_queries", "n_steps", "n_draws"):
            fill(name, count(name, getattr(self, name)))
        fill("seed", count("seed", self.seed, 2**31, low=0))

    @property
    def sizes(self) -> Profile:
        """The profile that these settings belong to."""
        return PROFILES[self.profile]

    @property
    def norm_label(self) -> str:
        """The norm as AutoAttack spells it: Linf or L2."""
        return NORM_LABELS[self.norm]
