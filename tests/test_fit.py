import pytest
import torch
from one_thread import one_thread  # noqa: F401 (a fixture for all of this file)
from torch import nn

from coup_lib import fit as fitting
from coup_lib.fit import average_into, fit

SETTINGS = {"seed": 3, "steps": 12, "lr": 0.1, "decay": 0.9, "weight_decay": 0.0}


class Killed(BaseException):
    """What a kill looks like from inside."""


def line():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))


def loss_until(dies=None):
    """Chance from the generator alone; at the `dies`-th call the process is killed."""
    calls = 0

    def loss(network, generator):
        nonlocal calls
        calls += 1
        if calls == dies:
            raise Killed
        x = torch.rand(8, 1, generator=generator)
        return (network(x) - 2 * x).square().mean()

    return loss


def away(network):
    """Lowest somewhere in the middle of the run."""
    return float(network[0].weight.detach().abs())


def numbers(network):
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


@pytest.mark.parametrize("score", [None, away])
@pytest.mark.parametrize("dies", [1, 4, 9, 12])
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, monkeypatch, dies, score):
    monkeypatch.setattr(fitting, "SAVE_EVERY", -1)  # at every step
    undisturbed = fit(line(), loss_until(), score, every=2, **SETTINGS)
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fit(line(), loss_until(dies), score, every=2, state=state, **SETTINGS)
    resumed = fit(line(), loss_until(), score, every=2, state=state, **SETTINGS)
    assert torch.equal(numbers(resumed), numbers(undisturbed))
    # Done is done: asked again, it takes no step.
    again = fit(line(), loss_until(dies=1), score, every=2, state=state, **SETTINGS)
    assert torch.equal(numbers(again), numbers(undisturbed))


def test_the_state_of_another_run_is_refused(tmp_path):
    state = tmp_path / "state.pt"
    fit(line(), loss_until(), state=state, **SETTINGS)
    with pytest.raises(ValueError, match=r"state\.pt: expected .*'steps': 13.* got one with .*'steps': 12"):
        fit(line(), loss_until(), state=state, **SETTINGS | {"steps": 13})


def test_the_average_of_lowest_score_is_returned():
    seen = []

    def score(network):
        seen.append((away(network), numbers(network)))
        return seen[-1][0]

    best = fit(line(), loss_until(), score, every=1, **SETTINGS)
    assert len(seen) == SETTINGS["steps"]
    lowest = min(range(len(seen)), key=lambda i: seen[i][0])
    assert 0 < lowest < len(seen) - 1
    assert torch.equal(numbers(best), seen[lowest][1])


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16; got 'half'"):
        fit(line(), loss_until(), precision="half", **SETTINGS)


def test_average_into_averages_weights_and_copies_statistics():
    kept, new = line(), line()
    kept[0].weight.data.fill_(1.0)
    new[0].weight.data.fill_(2.0)
    new[1].running_mean.fill_(5.0)
    average_into(kept, new, 0.75)
    assert kept[0].weight.item() == 1.25
    assert kept[1].running_mean.item() == 5.0
