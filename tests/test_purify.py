"""The purifiers' randomness and the contract of the wrapped classifier."""

import pytest
import torch
from closed_forms import small_problem

from coup_lib.guidance import to_state
from coup_lib.purify import coup, diffpure, reverse_only, standard_normal

BUILDERS = {"diffpure": diffpure, "reverse": reverse_only, "coup": coup}


def build(name, n_steps=5, **settings):
    score, classifier, x = small_problem()
    return BUILDERS[name](classifier, score, n_steps=n_steps, **settings), x


@pytest.mark.parametrize("name", BUILDERS)
def test_a_seed_means_the_same_noise_in_any_batch_and_order(name):
    defence, x = build(name)
    seeds = torch.tensor([11, 22, 33, 44, 55])
    whole = defence.purifier(x, seeds)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(defence.purifier(x[order], seeds[order]), whole[order], rtol=0, atol=1e-14)
    alone = torch.cat([defence.purifier(x[i : i + 1], seeds[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-14)


def test_a_seed_means_the_same_noise_in_every_precision():
    seeds = torch.tensor([5, 6])
    double = standard_normal(seeds, 3, torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    single = standard_normal(seeds, 3, torch.zeros(2, 1, 4, 4))
    assert torch.equal(double.float(), single)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_global_generator_neither_freezes_nor_repeats_the_noise(name):
    defence, x = build(name)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(defence(x))
    assert not torch.allclose(*results)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_purifier_leaves_the_global_generator_alone(name):
    defence, x = build(name)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    defence(x)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_reseeding_repeats_the_run(name):
    defence, x = build(name, seed=4)
    first = [defence(x), defence(x)]
    defence.purifier.reseed(4)
    assert torch.equal(torch.stack([defence(x), defence(x)]), torch.stack(first))
    assert not torch.equal(*first)


def test_no_weight_is_no_guidance_bit_for_bit():
    guided, x = build("coup", guidance_weight=0.0)
    plain, _ = build("reverse")
    assert torch.equal(guided(x, seeds=torch.arange(5)), plain(x, seeds=torch.arange(5)))


def test_diffpure_starts_from_noise_and_the_others_from_the_image():
    noise, (defence, x) = torch.ones(5, 1, 2, 2, dtype=torch.float64), build("diffpure")
    start = defence.purifier.start(to_state(x), noise)
    torch.testing.assert_close(start, 0.94711 * to_state(x) + 0.32091 * noise, rtol=1e-4, atol=0)
    for name in ("reverse", "coup"):
        assert torch.equal(build(name)[0].purifier.start(to_state(x), noise), to_state(x))


def test_no_brownian_motion_is_deterministic():
    defence, x = build("coup")
    states = []
    ends = [
        defence.purifier.trajectory(x, lambda i, t, state: states.append(state), brownian=False)
        for _ in range(2)
    ]
    assert torch.equal(*ends) and len(states) == 2 * 6


def test_a_short_path_is_the_identity():
    for name in BUILDERS:
        defence, x = build(name, t_star=2e-5, n_steps=1)
        assert float((defence.purifier(x) - x).abs().max()) < 0.02


@pytest.mark.parametrize("name", BUILDERS)
def test_networks_are_frozen_and_in_eval_mode(name):
    defence, x = build(name)
    assert not defence.classifier.training and not defence.purifier.score.training
    assert not any(parameter.requires_grad for parameter in defence.parameters())
    assert defence(x).shape == (5, 3)
    assert not defence(x).requires_grad


def test_steps_shorter_than_the_end_time_are_refused():
    with pytest.raises(ValueError, match=r"t_star / n_steps > 1e-05; got 0\.001 / 100"):
        build("coup", t_star=1e-3, n_steps=100)


@pytest.mark.parametrize("n", [1, 4, 6])
def test_there_is_one_seed_per_image(n):
    defence, x = build("coup")
    with pytest.raises(ValueError, match=rf"seeds: expected one per image, shape \(5,\); got \({n},\)"):
        defence(x, seeds=torch.arange(n))
