"""The exact gradient against the network evaluations that it cannot avoid, and against the field's ways."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from problems import (
    DEFENCES,
    DEVICE,
    METHODS,
    PRECISIONS,
    Problem,
    classifier_gradient,
    cosines,
    ours,
    peak_mib,
    precision,
    problem,
    reference,
    room_for,
    score_call,
    sizes,
    take_turns,
)
from torch import Tensor, nn

from coup_lib.gradients import steps_kept
from coup_lib.guidance import gradient_of, log_confidence
from coup_lib.hessian import FrozenLayers
from coup_lib.networks.wideresnet import wrn_28_10
from coup_lib.networks.zoo import load_classifier
from coup_lib.paths import is_smoke
from workflow.estimate import FlopCounter

KEPT = {"kept": 1.0, "three quarters kept": 0.75, "half kept": 0.5, "a quarter kept": 0.25, "replayed": 0.0}
ROUNDS = {"digits": 21, "cifar": 5}
SIDE = 8192 if DEVICE.type == "cuda" else 1024  # of a matrix product, as fast as this machine can be
PEER_ROUNDS = {"digits": 5, "cifar": 4}
IMAGES = {"resnet20": 1, "Standard": 1} if is_smoke() else {"resnet20": 16, "Standard": 1}


def floor(given: Problem, defence: str, kept: float) -> Callable[[], None]:
    """The evaluations of the forward pass, of the steps whose activations are kept only once, and backward.

    A Hessian-vector product takes twice the operations of the classifier's gradient that it is made of.
    """

    def run() -> None:
        steps = len(given.noise)
        for step in range(steps):
            again = step >= round(kept * steps)
            if again:
                with torch.no_grad():
                    score_call(given, given.x)
            x = given.state.requires_grad_()
            torch.autograd.grad(score_call(given, x), x, given.v)
            if defence == "coup":
                for _ in range(3 if again else 2):
                    classifier_gradient(given, given.x)

    return run


@pytest.mark.benchmark(group="gradient")
@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("activations", KEPT)
@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("name", ROUNDS)
def test_gradient(benchmark: Any, name: str, defence: str, activations: str, kind: str) -> None:
    size, kept = sizes(name), KEPT[activations]
    given = problem(name, defence, **size)
    with precision(kind):
        budget = room_for(given, kept)
        walked_once = steps_kept("exact", *given.path, given.state, given.times, budget)
    assert walked_once == round(kept * len(given.noise))  # what the floor counts
    square = torch.rand(SIDE, SIDE, device=DEVICE)
    rivals = {
        "ours": lambda: ours(given, budget),
        "floor": floor(given, defence, kept),
        "product": lambda: square @ square,
    }
    exact = reference(given)
    with precision(kind):
        with FlopCounter() as counter:
            pulled = ours(given, budget)
        take_turns(
            benchmark,
            rivals,
            ROUNDS[name],
            problem=name,
            defence=defence,
            activations=activations,
            precision=kind,
            reference="floor",
            flop={"ours": counter.total, "product": 2 * SIDE**3},
            cosines={"ours": cosines(pulled, exact)},
            size=size,
        )


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("name", PEER_ROUNDS)
def test_peers(benchmark: Any, name: str, defence: str) -> None:
    size = sizes(name, peers=True)
    given = problem(name, defence, **size)
    exact = reference(given)
    found = {method: cosines(run(given), exact) for method, run in METHODS.items()}
    measured = (
        list(METHODS)[: 1 if is_smoke() else None] if name == "cifar" else []
    )  # digits take next to nothing
    memory = {method: peak_mib(name, defence, method, **size) for method in measured}
    take_turns(
        benchmark,
        {method: lambda run=run: run(given) for method, run in METHODS.items()},
        PEER_ROUNDS[name],
        problem=name,
        defence=defence,
        reference="ours, replayed",
        cosines=found,
        memory_mib=memory,
        size=size,
    )


@pytest.mark.benchmark(group="operations")
def test_hessian_vector_product(benchmark: Any) -> None:
    """Floating-point operations of the guidance by a WRN-28-10, and of its derivative, for one image."""
    classifier, x = wrn_28_10().eval().requires_grad_(False), torch.zeros(1, 3, 32, 32)

    def count() -> dict[str, float]:
        state, found = x.clone().requires_grad_(), {}
        with FlopCounter() as counter:
            guidance = gradient_of(lambda x: log_confidence(classifier, x), state)
            found["guidance"] = counter.total
            torch.autograd.grad(guidance, state, x)
        found["guidance and its derivative"] = counter.total
        return {name: operations / 1e9 for name, operations in found.items()}

    benchmark.extra_info.update(device=DEVICE.type, gflop=benchmark.pedantic(count))


@pytest.mark.benchmark(group="second order")
@pytest.mark.parametrize("name", IMAGES)
def test_frozen_layers(benchmark: Any, name: str) -> None:
    """A Hessian-vector product of log max p, by frozen layers and by PyTorch's own second derivatives."""
    classifier = load_classifier("cifar10", name, trained=False).to(DEVICE)
    x, v = torch.randn(2, IMAGES[name], 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rivals = {
        "frozen layers": lambda: hessian_vector_product(classifier, x, v, FrozenLayers()),
        "PyTorch's own": lambda: hessian_vector_product(classifier, x, v, nullcontext()),
    }
    exact = hessian_vector_product(copy.deepcopy(classifier).double(), x.double(), v.double(), nullcontext())
    take_turns(
        benchmark,
        rivals,
        15,
        problem=name,
        n_images=len(x),
        threads=torch.get_num_threads(),
        reference="PyTorch's own",
        cosines={method: cosines(run(), exact.flatten(1)) for method, run in rivals.items()},
    )


def hessian_vector_product(
    classifier: nn.Module, x: Tensor, v: Tensor, layers: AbstractContextManager[Any]
) -> Tensor:
    """Of log max p at the states x, with v like x."""
    x = x.clone().requires_grad_()
    with layers:
        slope = torch.autograd.grad(log_confidence(classifier, x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(slope, x, v)[0]
