"""Gradients through the paper's networks at their full size, and through those of cifar10-small.

For a GPU. Without one a smoke run (COUP_SMOKE=1) takes small networks, one image and two steps, to see that
all is in place. Weights are random, but for score-small's.
"""

from functools import cache, partial
from typing import Any

import pytest
import test_forward
import test_gradient
import torch
from problems import (
    DEFENCES,
    DEVICE,
    METHODS,
    PRECISIONS,
    REPLAY,
    Problem,
    Run,
    cosines,
    ours,
    precision,
    problem,
    reference,
    room_for,
    take_turns,
)
from torch import Tensor

from coup_lib.paths import is_smoke
from workflow.estimate import FlopCounter

GPU, DIFFPURE = DEVICE.type == "cuda", "adjoint, as DiffPure"
# The paper's steps of 1e-3, so few that the activations of 64 images fit into 80 GB; all of the profile's.
WHOLE = {"full": 100, "small": 20}  # steps of the path
PATHS = {"full": {"t_star": 0.004, "n_steps": 4}, "small": {"t_star": 0.1, "n_steps": 20}}
IMAGES = [("full", 1), ("full", 8), ("full", 64), ("small", 64), ("small", 512)]
if not GPU:
    PATHS, IMAGES = {name: path | {"n_steps": 2} for name, path in PATHS.items()}, [("full", 1), ("small", 1)]
ROUNDS = 3 if GPU else 1
pytestmark = pytest.mark.skipif(not (GPU or is_smoke()), reason="without a GPU only with COUP_SMOKE=1")
COMPARED = 4 if GPU else 1  # images whose gradients are compared with those in float64


@pytest.mark.benchmark(group="full size")
@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize(("name", "images"), IMAGES)
def test_full_size(benchmark: Any, name: str, images: int, defence: str, kind: str) -> None:
    given = problem(name, defence, images=images, **PATHS[name])
    with precision(kind):
        rivals = against_floors(given, defence) | {"product": product(kind)}
        if kind == "float32" and DIFFPURE in METHODS:  # it has no other
            rivals[DIFFPURE] = lambda: METHODS[DIFFPURE](given)
        tried = {method: measured(run) for method, run in rivals.items()}
        few, exact = compared(name, defence)
        found = {"ours": lambda: ours(few, REPLAY), DIFFPURE: lambda: METHODS[DIFFPURE](few)}
        fitting = {method: rivals[method] for method, found in tried.items() if found}
        take_turns(
            benchmark,
            fitting,
            ROUNDS,
            warm_up=0,
            problem=name,
            images=images,
            defence=defence,
            precision=kind,
            n_steps=len(given.noise),
            path=WHOLE[name],
            references={method: f"floor, {method}" for method in fitting if f"floor, {method}" in fitting},
            flop={method: found[0] for method, found in tried.items() if found},
            memory_mib={method: found[1] for method, found in tried.items() if found},
            cosines={
                method: cosines(run(), exact) for method, run in found.items() if method in ("ours", *fitting)
            },
        )


def against_floors(given: Problem, defence: str) -> dict[str, Run]:
    """A purification, its exact gradient by all, half and none of the activations, and the floor of each."""
    kept = {"kept": 1.0, "half kept": 0.5, "replayed": 0.0}
    runs = {"forward": torch.no_grad()(lambda: given.defence.purifier(given.x))}
    runs["floor, forward"] = torch.no_grad()(test_forward.floor(given, defence))
    for method, part in kept.items():
        runs[method] = partial(ours, given, room_for(given, part))
        runs[f"floor, {method}"] = test_gradient.floor(given, defence, part)
    return runs


def product(kind: str) -> Run:
    """A large matrix product, as fast as this machine can be in this precision."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    square = torch.rand(test_gradient.SIDE, test_gradient.SIDE, device=DEVICE, dtype=dtype)
    return lambda: square @ square


def measured(run: Run) -> tuple[int, float | None] | None:
    """(operations, on a GPU peak MiB above what was there) of a run; None where the memory is too small."""
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if GPU else 0
    try:
        with FlopCounter() as counter:
            run()
    except torch.cuda.OutOfMemoryError:
        return None
    return counter.total, (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else None


@cache
def compared(name: str, defence: str) -> tuple[Problem, Tensor]:
    """A few images, and their gradient in float64."""
    few = problem(name, defence, images=COMPARED, **PATHS[name])
    with torch.autocast(DEVICE.type, enabled=False):
        return few, reference(few)
