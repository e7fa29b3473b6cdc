from dataclasses import replace

import pytest
import torch
from torch import nn

from training import fit as fitting
from training.fit import KernelMuon, Recipe, Stopped, average_into, fit

RECIPE = Recipe(steps=12, batch=8, lr=0.1, decay=0.9, weight_decay=0.0, seed=3)


class Killed(BaseException):
    """What a kill looks like from inside."""


def line():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))


def kernels():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.SiLU(), nn.Conv2d(5, 2, 1))


def images_loss(network, generator):
    return network(torch.rand(4, 2, 6, 6, generator=generator)).square().mean()


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


@pytest.mark.parametrize("muon_lr", [None, 0.02])
@pytest.mark.parametrize("score", [None, away])
@pytest.mark.parametrize("dies", [1, 4, 9, 12])
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, monkeypatch, dies, score, muon_lr):
    monkeypatch.setattr(fitting, "SAVE_EVERY", -1)  # at every step
    state, recipe = tmp_path / "state.pt", replace(RECIPE, every=2, muon_lr=muon_lr)

    def network():
        return nn.Sequential(*line(), nn.Linear(1, 1))

    undisturbed = fit(network(), loss_until(), recipe, score)
    with pytest.raises(Killed):
        fit(network(), loss_until(dies), recipe, score, state)
    resumed = fit(network(), loss_until(), recipe, score, state)
    assert torch.equal(numbers(resumed), numbers(undisturbed))
    # Done is done: asked again, it takes no step.
    again = fit(network(), loss_until(dies=1), recipe, score, state)
    assert torch.equal(numbers(again), numbers(undisturbed))


def test_who_watches_can_stop_it_and_the_same_run_goes_on(tmp_path):
    state, recipe = tmp_path / "state.pt", replace(RECIPE, every=2)
    undisturbed = fit(line(), loss_until(), recipe, away)
    with pytest.raises(Stopped, match="after 5 of 12 steps"):
        fit(line(), loss_until(), recipe, away, state, watch=lambda step: step == 5)
    resumed = fit(line(), loss_until(dies=8), recipe, away, state, watch=lambda step: False)
    assert torch.equal(numbers(resumed), numbers(undisturbed))
    curve = torch.load(state, weights_only=True)["curve"]
    assert [step for step, _ in curve] == [2, 4, 6, 8, 10, 12]


def test_a_compiled_network_is_trained_as_itself_and_returned_without_its_program(monkeypatch):
    compiled, compile_it = [], nn.Module.compile

    def eager(network):  # the same operations: PyTorch's fused ones differ in the last digits
        compiled.append(network)
        compile_it(network, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    network = kernels()
    best = fit(network, images_loss, replace(RECIPE, muon_lr=0.02, compiled=True))
    assert compiled == [network] and best._compiled_call_impl is None
    assert torch.equal(numbers(best), numbers(fit(kernels(), images_loss, replace(RECIPE, muon_lr=0.02))))


def test_the_state_of_another_run_is_refused(tmp_path):
    state = tmp_path / "state.pt"
    fit(line(), loss_until(), RECIPE, state=state)
    with pytest.raises(ValueError, match=r"state\.pt: expected .*steps=13.* got one with .*steps=12"):
        fit(line(), loss_until(), replace(RECIPE, steps=13), state=state)


def test_muon_moves_every_kernel_but_the_last_by_a_nearly_orthogonal_matrix():
    before, one_step = kernels(), replace(RECIPE, steps=1, decay=0.0)
    after = fit(kernels(), images_loss, replace(one_step, muon_lr=0.02))
    adam = fit(kernels(), images_loss, one_step)
    moved = (after[0].weight - before[0].weight).detach().flatten(1)
    # The first of 100 steps of warming up; Muon's five iterations end between 0.68 and 1.13.
    singular = torch.linalg.svdvals(moved) / (0.02 / 100)
    assert ((singular > 0.6) & (singular < 1.2)).all()
    assert torch.equal(after[2].weight, adam[2].weight) and torch.equal(after[0].bias, adam[0].bias)
    assert not torch.equal(after[0].weight, adam[0].weight)


def test_muon_sees_a_kernel_as_pytorchs_own_sees_the_matrix():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().reshape(6, 36).clone())
    ours = KernelMuon([kernel], lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        slope = torch.randn(6, 36)
        kernel.grad, matrix.grad = slope.view_as(kernel), slope.clone()
        ours.step()
        theirs.step()
        assert torch.equal(kernel.flatten(1), matrix)


def test_the_average_of_lowest_score_is_returned():
    seen = []

    def score(network):
        seen.append((away(network), numbers(network)))
        return seen[-1][0]

    best = fit(line(), loss_until(), replace(RECIPE, every=1), score)
    assert len(seen) == RECIPE.steps
    lowest = min(range(len(seen)), key=lambda i: seen[i][0])
    assert 0 < lowest < len(seen) - 1
    assert torch.equal(numbers(best), seen[lowest][1])


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16; got 'half'"):
        replace(RECIPE, precision="half")


def test_average_into_averages_weights_and_copies_statistics():
    kept, new = line(), line()
    kept[0].weight.data.fill_(1.0)
    new[0].weight.data.fill_(2.0)
    new[1].running_mean.fill_(5.0)
    average_into(kept, new, 0.75)
    assert kept[0].weight.item() == 1.25
    assert kept[1].running_mean.item() == 5.0
