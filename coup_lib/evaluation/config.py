"""The settings of a run, and the one place where they are checked."""

import ast
import dataclasses
import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from coup_lib.ascent import largest_radius
from coup_lib.attacks import NORM_LABELS, NORMS
from coup_lib.checks import choice, count, in_one_line, meant, number, yes_or_no
from coup_lib.data import SHAPES, SPLITS, split_size, subsets
from coup_lib.evaluation.profiles import BUDGETS, PROFILES, PURPOSES, SMOKE_STEPS, Profile
from coup_lib.gradients import GRADIENTS
from coup_lib.networks.precision import PRECISIONS
from coup_lib.networks.zoo import check_classifier
from coup_lib.paths import SMOKE_VARIABLE, is_smoke
from coup_lib.solver import time_grid

T = TypeVar("T")

NORM_NAMES = {"linf": "L∞", "l2": "L2"}  # as people do
# What parameters are called in the paper and elsewhere.
OTHER_NAMES = {
    "lambda": "guidance_weight",
    "λ": "guidance_weight",
    "weight": "guidance_weight",
    "t": "t_star",
    "t*": "t_star",
    "ε": "eps",
    "epsilon": "eps",
    "n": "n_images",
    "N": "n_steps",
    "iterations": "n_iter",
    "steps": "n_steps",
}


def radius(eps: float) -> str:
    """eps in words: "8/255" where that is shorter than its decimals."""
    return min(f"{eps:g}", f"{round(255 * eps, 6):g}/255", key=len)


def device(name: str) -> torch.device:
    """The device of this name, "auto" being the first GPU or else the CPU.

    ValueError for an unknown name, or a GPU that this machine does not have.
    """
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(found[1] if len(found) > 1 and found[1] != "mps" else "cpu")
    known = ("auto", *found, *(["cuda"] if torch.cuda.is_available() else []))
    return torch.device(choice("device", name, known))


@in_one_line()
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
        if name not in (*fields, *own, "publish"):
            known = sorted((*fields, *own, "publish"))
            listed = f"this notebook knows {', '.join(known)}{meant(OTHER_NAMES.get(name, name), known)}"
            raise ValueError(f"unknown parameter {name!r}; {listed}")
    result = settings(**given, **fixed)
    told = any(isinstance(value, settings) for value in namespace.values())  # by an earlier configuration
    for name, default in fields.items():
        if name in given and given[name] != default and not told:
            print(f"override: {name} = {given[name]!r} (default {default!r})")
    yes_or_no("publish", namespace.get("publish", False))
    if is_smoke():
        print(f"{SMOKE_VARIABLE} is set: smallest sizes, the numbers mean nothing")
    return result


@in_one_line()
def check_names(lines: list[str]) -> list[str]:
    """The lines of a cell, unless a parameter in it has a name that Python cannot read.

    An input transformer of IPython: `get_ipython().input_transformers_cleanup.append(check_names)`. What
    papermill writes for `-p lambda 2` would else end in a SyntaxError, before `from_notebook` is asked.

    Raises:
        ValueError: naming the unknown parameter, and the one that it may be meant for.
    """
    cell = "".join(lines)
    if cell.startswith("# Parameters"):
        try:
            ast.parse(cell)
        except SyntaxError as error:
            name = lines[(error.lineno or 1) - 1].split("=")[0].strip()
            if keyword.iskeyword(name) or not name.isidentifier():
                known = [field.name for field in dataclasses.fields(Config)]
                near = meant(OTHER_NAMES.get(name, name), known)
                raise ValueError(f"unknown parameter {name!r}{near}") from None
    return lines


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


class Settings(Protocol):
    """What the engine (`run`, `specs`) asks of settings; `Config` has it of a profile, an audit of its own.

    profile: whose records these are, or the absolute path of a folder of one's own for them. chunk_size:
    images attacked together; a killed run loses no more. max_batch: the most images in one network call.
    """

    @property
    def profile(self) -> str: ...
    @property
    def norm(self) -> str: ...
    @property
    def eps(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def n_images(self) -> int: ...
    @property
    def n_iter(self) -> int: ...
    @property
    def n_targets(self) -> int: ...
    @property
    def n_steps(self) -> int: ...
    @property
    def n_draws(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def num_shards(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def torch_device(self) -> torch.device: ...


@dataclass(frozen=True)
class Config:
    """The settings of an evaluation. None means the profile's own value; every field is checked on creation.

    Raises:
        ValueError: naming the field, what was expected and what came, before any network is loaded.
    """

    profile: str = "digits"
    budget: str = "quick"
    norm: str = "linf"
    classifier: Any = None  # of the profile, or the name of any RobustBench model for its data set
    subset: Any = None  # of the test images
    device: str = "auto"  # "auto" is a GPU where there is one; "cpu", "cuda", "cuda:1"
    precision: str = "float32"  # of the score network while it is attacked; one of precision.PRECISIONS
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
    n_draws: Any = None  # noise draws per image when an attack is scored
    split: str = "test"
    seed: int = 0
    purpose: str = "report"
    shard: int = 0  # which of num_shards processes this is that share the work; results do not depend on it
    num_shards: int = 1

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        profile = PROFILES[choice("profile", self.profile, PROFILES)]
        choice("purpose", self.purpose, PURPOSES)
        choice("budget", self.budget, BUDGETS)
        fill("budget", "smoke" if is_smoke() else self.budget)
        fill("norm", choice("norm", str(self.norm).lower(), NORMS))
        choice("gradient", self.gradient, GRADIENTS)
        device(self.device)  # refuses an unknown one
        choice("precision", self.precision, PRECISIONS)
        choice("split", self.split, SPLITS)
        if self.subset is None:
            fill("subset", profile.subset)
        choice("subset", self.subset, subsets(profile.dataset))
        available = split_size(profile.dataset, self.split, self.subset)
        budget = profile.budgets[self.purpose][self.budget]
        budget = dataclasses.replace(budget, n_images=min(budget.n_images, available))
        defaults: dict[str, Any] = {"classifier": profile.classifiers[0]}
        defaults |= {name: getattr(profile, name)[self.norm] for name in ("eps", "t_star", "n_steps")}
        defaults |= dataclasses.asdict(budget) | {"guidance_weight": profile.guidance_weight}
        del defaults["bpda_eot"]  # several at once, notebook 05's own
        if self.budget == "smoke":
            defaults["n_steps"] = SMOKE_STEPS
        for name, value in defaults.items():
            if getattr(self, name) is None:
                fill(name, value)
        check_classifier(profile.dataset, self.classifier)
        fill("eps", number("eps", self.eps, 0, largest_radius(self.norm, SHAPES[profile.dataset])))
        fill("t_star", number("t_star", self.t_star, 1e-5, profile.t_max))
        # Negative weights are a legitimate control: guidance with its sign flipped.
        fill("guidance_weight", number("guidance_weight", self.guidance_weight, -1e3, 1e3))
        fill("n_images", count(f"n_images of the {self.split} split", self.n_images, available))
        for name in ("n_iter", "eot", "n_targets", "square_queries", "n_steps", "n_draws"):
            fill(name, count(name, getattr(self, name)))
        time_grid(self.t_star, self.n_steps)  # refuses steps that are too short
        fill("seed", count("seed", self.seed, 2**31, low=0))
        fill("num_shards", count("num_shards", self.num_shards))
        fill("shard", count("shard", self.shard, self.num_shards - 1, low=0))

    def __str__(self) -> str:
        """What a notebook says of its settings, in a line."""
        sizes = f"{self.n_images} images of the {self.split} split"
        threat = f"{NORM_NAMES[self.norm]}, eps = {radius(self.eps)}"
        defence = f"t* = {self.t_star:g}, λ = {self.guidance_weight:g}, {self.n_steps} steps"
        return f"{self.profile}, budget {self.budget}: {sizes}; {threat}; {self.classifier}; {defence}"

    @property
    def torch_device(self) -> torch.device:
        """Where networks and images are."""
        return device(self.device)

    @property
    def setup(self) -> Profile:
        """The profile that these settings belong to."""
        return PROFILES[self.profile]

    @property
    def chunk_size(self) -> int:
        """Images attacked together."""
        return self.setup.chunk_size

    @property
    def max_batch(self) -> int:
        """The most images in one network call."""
        return self.setup.max_batch

    @property
    def norm_label(self) -> str:
        """The norm as AutoAttack spells it: Linf or L2."""
        return NORM_LABELS[self.norm]

    @property
    def seed_label(self) -> str:
        """For captions: the seed, and how attacks computed the score network if not plainly in float32."""
        lowered = self.precision != "float32"
        return f"seed {self.seed}" + f"; attacked through a score network in {self.precision}" * lowered
