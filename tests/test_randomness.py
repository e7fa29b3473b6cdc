"""Where a network's random numbers come from, set back and begun anew."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from closed_forms import SmoothClassifier, small_problem
from torch import nn

from coup_lib.evaluation.run import predict
from coup_lib.purify import coup
from coup_lib.randomness import alike, begun, restored, sources, states_of

CPU = torch.device("cpu")


class Drawing(nn.Module):
    """A classifier of its input times random numbers between 0.5 and 1.5, which `draw` makes."""

    def __init__(self, draw, **held):
        super().__init__()
        self.net, self.draw = SmoothClassifier().double(), draw
        vars(self).update(held)
        self.eval()

    def forward(self, x):
        drawn = [self.draw() for _ in range(x.numel())]
        return self.net(x * (0.5 + torch.tensor(drawn, dtype=x.dtype).reshape(x.shape)))


def hidden(generator):
    return (nn.ModuleDict(), {"in": [Drawing(None, generator=generator)]})


def of_torch(generator):
    return float(torch.rand((), generator=generator))


SOURCES = {
    "torch": lambda: Drawing(partial(torch.rand, ())),
    "NumPy": lambda: Drawing(np.random.rand),
    "Python": lambda: Drawing(random.random),
    "a generator of torch": lambda: Drawing(partial(of_torch, torch.Generator())),
    "one in a closure": lambda: (lambda own: Drawing(lambda: of_torch(own)))(torch.Generator()),
    "one in a hidden module": lambda: (lambda own: Drawing(lambda: of_torch(own[0]), held=hidden(own[0])))(
        [torch.Generator()]
    ),
    "a method": lambda: Drawing(random.Random().random),
    "a generator of NumPy": lambda: Drawing(np.random.default_rng().random),
    "its older kind": lambda: Drawing(np.random.RandomState().rand),
}


def drawing(name):
    return SOURCES[name]()


@pytest.mark.parametrize("name", SOURCES)
def test_a_replay_draws_the_same_numbers_wherever_they_come_from(name, monkeypatch):
    """A guide's gradient is the same with all activations kept and with every step taken again."""
    score, _, x = small_problem()
    guide, seeds = drawing(name), torch.arange(len(x))
    found = []
    for gib in ("1", "0"):
        monkeypatch.setenv("COUP_ACTIVATIONS", gib)
        image = x.clone().requires_grad_()
        with begun(guide, CPU, 3):
            logits = coup(guide, score, n_steps=4)(image, seeds)
            found.append(torch.autograd.grad(logits.sum(), image)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", SOURCES)
def test_predictions_are_those_of_their_seeds_and_leave_the_sources_alone(name):
    network, (_, _, x) = drawing(name), small_problem()
    network.random = True
    before = states_of(sources(network, CPU))
    seeds = torch.tensor([[1, 2]]).expand(len(x), 2)
    found = predict(network, x, seeds, 640)
    assert alike(before, states_of(sources(network, CPU)))
    network(x)
    assert not alike(before, states_of(sources(network, CPU)))
    assert torch.equal(found, predict(network, x, seeds, 640))
    assert not torch.equal(found[:, 0], found[:, 1])


def test_sources_begin_at_seeds_of_their_own_but_torchs():
    network = nn.Module()
    network.generators = [torch.Generator(), torch.Generator()]
    with begun(network, CPU, 5):
        drawn = [torch.rand(3), *(torch.rand(3, generator=one) for one in network.generators)]
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert len({tuple(one.tolist()) for one in drawn}) == 3


def test_what_is_restored_is_as_it_was_also_after_an_error():
    network = drawing("Python")
    first = random.getstate()
    with pytest.raises(KeyError), restored(sources(network, CPU)):
        random.random()
        raise KeyError
    assert random.getstate() == first
