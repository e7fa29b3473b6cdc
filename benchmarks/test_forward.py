"""A purification against the network evaluations that it cannot avoid."""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import (
    DEFENCES,
    PRECISIONS,
    Problem,
    classifier_gradient,
    precision,
    problem,
    score_call,
    sizes,
    take_turns,
)

from coup_lib.purify import StandardNormal

ROUNDS = {"digits": 41, "cifar": 9}


def floor(given: Problem, defence: str) -> Callable[[], None]:
    """N score calls, and for COUP the classifier N times forward and backward."""

    def run() -> None:
        x = given.state
        for _ in range(len(given.noise)):
            score_call(given, x)
            if defence == "coup":
                classifier_gradient(given, given.x)

    return run


@pytest.mark.benchmark(group="forward")
@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("defence", DEFENCES)
@pytest.mark.parametrize("name", ROUNDS)
def test_forward(benchmark: Any, name: str, defence: str, kind: str) -> None:
    size = sizes(name)
    given = problem(name, defence, **size)
    noise = StandardNormal(torch.arange(len(given.x)), len(given.noise) + 1, given.x)
    rivals = {
        "ours": lambda: given.defence.purifier(given.x),
        "floor": floor(given, defence),
        "noise": lambda: deque(noise, maxlen=0),
    }
    with torch.no_grad(), precision(kind):
        take_turns(
            benchmark,
            rivals,
            ROUNDS[name],
            problem=name,
            defence=defence,
            precision=kind,
            reference="floor",
            size=size,
        )
