"""What is timed, how rivals take turns, and what memory they take."""

import copy
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.data import load_split
from coup_lib.evaluation.config import device as named_device
from coup_lib.gradients import activation_bytes, solve_with_gradient
from coup_lib.guidance import to_state
from coup_lib.networks.checkpoints import load_network
from coup_lib.networks.precision import products
from coup_lib.networks.zoo import load_classifier, load_score, small_ddpmpp
from coup_lib.paths import is_smoke
from coup_lib.purify import Purified, coup, reverse_only, standard_normal
from coup_lib.score import DISCRETE_LEVELS, NoiseScore

DEVICE = named_device("auto")
DEFENCES = {"reverse": reverse_only, "coup": coup}
PRECISIONS = ("float32", "tf32", "bfloat16") if DEVICE.type == "cuda" else ("float32",)
KEEP, REPLAY = 2**62, 0  # activation budgets: all activations, or none
# Networks of 32×32×3 by name: score (in our weights or random) and classifier (random).
ZOO = {"full": ("ddpmpp-deep", "Standard"), "small": ("score-small", "resnet20")}


@dataclass
class Problem:
    """A defence, images to purify, and a gradient v at the end of the path to be pulled back to them.

    x (B, C, H, W) in [0, 1] under attack; v like x is the cross-entropy's gradient at one end of the path.
    """

    defence: Purified
    x: Tensor
    noise: Tensor  # (N, B, C, H, W)
    v: Tensor

    @property
    def path(self) -> tuple[Any, ...]:
        """(score, sde) of the solver, guided where the defence is."""
        purifier = self.defence.purifier
        return purifier.score, purifier.sde

    @property
    def state(self) -> Tensor:
        """The start of the path."""
        return to_state(self.x)

    @property
    def times(self) -> Tensor:
        """(N + 1,)."""
        return self.defence.purifier.times


def sizes(name: str, *, peers: bool = False) -> dict[str, Any]:
    """Images and path. Peers are timed at their own step, dt = 1e-3."""
    if is_smoke():
        return {"images": 2, "t_star": 0.1, "n_steps": 3}
    if name == "digits":
        return {"images": 64, "t_star": 0.1, "n_steps": 100 if peers else 10}
    return {"images": 64 if DEVICE.type == "cuda" else 8, "t_star": 0.012, "n_steps": 12}


def networks(name: str, image_size: int = 32) -> tuple[nn.Module, nn.Module]:
    """(score, classifier): the trained ones of digits, or random ones for colour images of CIFAR's size."""
    if name == "digits":
        return NoiseScore(load_network("digits", "score")), load_network("digits", "cnn-small")
    if name in ZOO:
        loaders = zip((load_score, load_classifier), ZOO[name], strict=True)
        score, classifier = (load("cifar10", which, trained=False) for load, which in loaders)
        return score, classifier
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score = NoiseScore(small_ddpmpp(image_size=image_size), time_scale=DISCRETE_LEVELS)
    return score, load_classifier("cifar10", "resnet20", trained=False)


def problem(name: str, defence: str, *, images: int, t_star: float, n_steps: int, size: int = 32) -> Problem:
    """Images an FGSM step away from clean or random ones: there the guidance has something to say."""
    score, classifier = (network.to(DEVICE) for network in networks(name, size))
    model = DEFENCES[defence](classifier, score, t_star=t_star, n_steps=n_steps)
    x, y = _images(name, images, size)
    x = (x + 0.15 * _slope(classifier, x, y).sign()).clamp(0, 1)
    noise = standard_normal(torch.arange(images), n_steps + 1, x)[1:]
    with torch.no_grad():
        end = model.purifier(x, seeds=torch.arange(images))
    return Problem(model, x, noise, _slope(classifier, end, y) / 2)


def _images(name: str, images: int, size: int) -> tuple[Tensor, Tensor]:
    if name == "digits":
        found = load_split("digits", "test").first(images)
        return found.x.to(DEVICE), found.y.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(images, 3, size, size, generator=generator)
    return x.to(DEVICE), torch.randint(10, (images,), generator=generator).to(DEVICE)


def _slope(classifier: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(classifier(x), y, reduction="sum"), x)[0]


Run = Callable[[], Any]


def take_turns(
    benchmark: Any, rivals: Mapping[str, Run], rounds: int, *, warm_up: int = 1, **info: Any
) -> None:
    """Time all rivals in every round: where a machine's speed drifts, their ratios do not.

    pytest-benchmark sees whole rounds; each rival's seconds, round by round, go into its extra_info.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def one_round() -> None:
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)

    rounds = min(rounds, 2) if is_smoke() else rounds
    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warm_up)
    timed = {name: values[-rounds:] for name, values in seconds.items()}
    benchmark.extra_info.update(info, device=DEVICE.type, seconds=timed)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Run in float32, with TF32 products, or with bfloat16 in all networks."""
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
    with products(name), autocast:
        yield


def score_call(given: Problem, x: Tensor) -> Tensor:
    """The bare score network, once."""
    score = given.path[0]
    network = getattr(score, "score", score).network
    return network(x, torch.full((len(x),), 50.0 if x.shape[1] == 3 else 0.05, device=x.device))


def classifier_gradient(given: Problem, x: Tensor) -> Tensor:
    """The bare classifier, forward and backward once."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = given.defence.classifier(x)
        return torch.autograd.grad(logits, x, torch.ones_like(logits))[0]


def room_for(given: Problem, kept: float) -> int:
    """Bytes for the activations of this part of the path's steps, and half a step's more."""
    steps, path = len(given.noise), activation_bytes(*given.path, given.state, given.times)
    return round((round(kept * steps) + 0.5) * path / steps)


def ours(given: Problem, budget: int) -> Tensor:
    """coup_lib's exact gradient: vᵀ ∂x_N/∂x_0."""
    x = given.state.requires_grad_()
    end = solve_with_gradient("exact", *given.path, x, given.times, given.noise, budget)
    return torch.autograd.grad(end, x, given.v)[0]


def sdeint(given: Problem) -> Tensor:
    """torchsde's sdeint and plain backpropagation through it: all activations are kept."""
    return _torchsde(given, "sdeint", given.path[0])


def adjoint_frozen(given: Problem) -> Tensor:
    """sdeint_adjoint as DiffPure calls it, but with frozen networks."""
    return _torchsde(given, "sdeint_adjoint", given.path[0])


def adjoint_as_diffpure(given: Problem) -> Tensor:
    """sdeint_adjoint as DiffPure calls it: every parameter of the networks joins the adjoint state."""
    return _torchsde(given, "sdeint_adjoint", unfrozen(given))


def unfrozen(given: Problem) -> nn.Module:
    """The score with trainable weights, a copy that is made once."""
    if not hasattr(given, "_unfrozen"):
        given._unfrozen = copy.deepcopy(given.path[0]).requires_grad_()  # type: ignore[attr-defined]
    return given._unfrozen  # type: ignore[attr-defined]


def _torchsde(given: Problem, solver: str, score: nn.Module) -> Tensor:
    """Euler forward with the grid's step; backward whatever torchsde chooses, as DiffPure leaves it to."""
    import torchsde

    from coup_lib.adjoint import GridBrownian, ReverseSDE

    x, times = given.state.flatten(1).requires_grad_(), given.times
    sde = ReverseSDE(score, given.path[1], float(times[0]), given.x.shape, noisy=True)
    ends = torch.tensor([0.0, float(times[0] - times[-1])])  # where a solver can look at them, as ours does
    path = GridBrownian(times, given.noise, given.state)
    end = getattr(torchsde, solver)(sde, x, ends, bm=path, method="euler", dt=float(times[0] - times[1]))[-1]
    return torch.autograd.grad(end, x, given.v.flatten(1))[0].reshape(given.x.shape)


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "ours, replayed": lambda given: ours(given, REPLAY),
    "ours, kept": lambda given: ours(given, KEEP),
}
if find_spec("torchsde"):
    METHODS |= {
        "sdeint": sdeint,
        "adjoint, frozen": adjoint_frozen,
        "adjoint, as DiffPure": adjoint_as_diffpure,
    }


def reference(given: Problem) -> Tensor:
    """The gradient by plain autograd through every step of the same path, in float64."""
    score, sde = given.path
    x = given.state.double().requires_grad_()
    double = copy.deepcopy(score).double()
    end = solve_with_gradient("exact", double, sde, x, given.times, given.noise.double(), KEEP)
    return torch.autograd.grad(end, x, given.v.double())[0]


def cosines(gradient: Tensor, exact: Tensor) -> list[float]:
    """Of each image; no epsilon, which would hide tiny gradients."""
    a, b = gradient.double().flatten(1), exact.flatten(1)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).tolist()


def peak_mib(name: str, defence: str, method: str, **size: Any) -> float | None:
    """What a method takes at its peak above what was there before: in a fresh process, or on the GPU."""
    if DEVICE.type == "cuda":
        return _peak_mib(name, defence, method, size)
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(_peak_mib, name, defence, method, size).result()


def _peak_mib(name: str, defence: str, method: str, size: dict[str, Any]) -> float | None:
    run = METHODS[method]
    run(problem(name, defence, **size | {"n_steps": 1}))  # all code is loaded
    given = problem(name, defence, **size)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(given)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds is taken from the peak
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kib(status, "VmRSS")
    run(given)
    return (_kib(status, "VmHWM") - before) / 2**10


def _kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))
