"""The purifiers' randomness, their settings, and the contract of the wrapped classifier."""

import weakref

import pytest
import torch
from closed_forms import small_problem
from torch import nn

from coup_lib.attacks import Attack
from coup_lib.checks import ROUNDING
from coup_lib.guidance import Guided, to_state
from coup_lib.purify import (
    STRIDE,
    Averaged,
    FixedNoise,
    Purified,
    Purifier,
    StandardNormal,
    Vote,
    coup,
    diffpure,
    reverse_only,
    standard_normal,
)

BUILDERS = {"diffpure": diffpure, "reverse": reverse_only, "coup": coup}


def build(name, n_steps=5, **settings):
    score, classifier, x = small_problem()
    return BUILDERS[name](classifier, score, n_steps=n_steps, **settings), x


def test_a_seed_means_the_same_noise_in_every_precision():
    seeds = torch.tensor([5, 6])
    double = standard_normal(seeds, 3, torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    single = standard_normal(seeds, 3, torch.zeros(2, 1, 4, 4))
    assert torch.equal(double.float(), single)


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 8, 8), (2, 4, 4), (1, 5, 5), (65,), (1, 1, 1), (1, 2, 2), (15,)]
)
@pytest.mark.parametrize("n", [1, 2, 17, 101, 513])
def test_noise_drawn_step_by_step_is_that_of_one_draw(shape, n):
    """PyTorch draws by groups of 16, so that where a draw is broken off decides on the numbers."""
    seeds = torch.tensor([7, 2**40 + 3])
    whole = [torch.randn((n, *shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    noise = StandardNormal(seeds, n, torch.zeros(2, *shape))
    for _ in range(2):
        assert torch.equal(torch.stack([*noise]), torch.stack(whole, dim=1))


def test_a_path_holds_the_noise_of_one_step():
    """Of CIFAR's size; the noise of what was walked is let go, that of what is ahead is not drawn."""
    alive, most = [], 0
    for drawn in StandardNormal(torch.arange(4), 50, torch.zeros(4, 3, 32, 32)):
        alive.append(weakref.ref(drawn))
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 50 and most <= 2


@pytest.mark.parametrize("name", BUILDERS)
def test_the_global_generator_neither_freezes_nor_repeats_the_noise(name):
    defence, x = build(name)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        results.append(defence(x))
        assert torch.equal(torch.rand(3), expected)  # nor is it drawn from
    assert not torch.allclose(*results)


@pytest.mark.parametrize("name", BUILDERS)
def test_reseeding_repeats_the_run(name):
    defence, x = build(name, seed=4)
    first = [defence(x), defence(x)]
    defence.purifier.reseed(4)
    assert torch.equal(torch.stack([defence(x), defence(x)]), torch.stack(first))
    assert not torch.equal(*first)


@pytest.mark.parametrize("name", BUILDERS)
def test_two_purifiers_draw_different_noise_unless_told_otherwise(name):
    (one, x), (other, _) = build(name), build(name)
    assert not torch.allclose(one(x), other(x))
    one.purifier.reseed()
    other.purifier.reseed()
    assert not torch.allclose(one(x), other(x))
    (one, _), (other, _) = build(name, seed=3), build(name, seed=3)
    assert torch.equal(one(x), other(x))


def test_diffpure_starts_from_noise_and_the_others_from_the_image():
    noise, (defence, x) = torch.ones(5, 1, 2, 2, dtype=torch.float64), build("diffpure")
    start = defence.purifier.start(to_state(x), [noise])
    torch.testing.assert_close(start, 0.94711 * to_state(x) + 0.32091 * noise, rtol=1e-4, atol=0)
    for name in ("reverse", "coup"):
        assert torch.equal(build(name)[0].purifier.start(to_state(x), [noise]), to_state(x))


def test_no_brownian_motion_is_deterministic():
    defence, x = build("coup")
    states = []
    ends = [
        defence.purifier.trajectory(x, lambda i, t, state: states.append(state), brownian=False)
        for _ in range(2)
    ]
    assert torch.equal(*ends) and len(states) == 2 * 6


def test_steps_shorter_than_the_end_time_are_refused():
    with pytest.raises(ValueError, match=r"t_star / n_steps > 1e-05; got 0\.001 / 100"):
        build("coup", t_star=1e-3, n_steps=100)


@pytest.mark.parametrize("t_star", [100, 5, 1.01, 1e-5, 0, -0.1, float("nan"), "a lot"])
def test_a_t_star_that_is_no_time_of_the_sde_is_refused(t_star):
    with pytest.raises(
        ValueError, match=rf"^t_star \(DiffPure's 100 is 0\.1 here\): expected .*; got .*{t_star}"
    ):
        build("diffpure", t_star=t_star)
    assert build("diffpure", t_star=1, n_steps=3)[0].purifier.t_star == 1


@pytest.mark.parametrize("n_steps", [0, -1, 2.5, True])
def test_a_number_of_steps_that_is_none_is_refused(n_steps):
    with pytest.raises(ValueError, match=rf"^n_steps: expected .*; got {n_steps}"):
        build("coup", n_steps=n_steps)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e4, None])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match=rf"^guidance_weight: expected .*; got {weight}"):
        build("coup", guidance_weight=weight)


def test_what_is_no_network_is_refused():
    score, classifier, _ = small_problem()
    with pytest.raises(ValueError, match=r"^classifier: expected a torch\.nn\.Module; got function"):
        reverse_only(lambda x: x, score)
    with pytest.raises(ValueError, match=r"^score: expected a torch\.nn\.Module; got function"):
        reverse_only(classifier, lambda x, t: x)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: x.flatten(1)[:, :1], r"shape \(5, 1\)"),
        (lambda x: x[:1].flatten(1), r"shape \(1, 4\)"),
        (lambda x: x, r"shape \(5, 1, 2, 2\)"),
        (lambda x: {"logits": x.flatten(1)}, "dict"),
    ],
)
@pytest.mark.parametrize("builder", [reverse_only, coup])
def test_what_are_no_logits_is_refused(builder, answer, got):
    """Of one class, guidance would be zero without a word."""

    class Classifier(nn.Module):
        def forward(self, x):
            return answer(x)

    score, _, x = small_problem()
    with pytest.raises(
        ValueError, match=rf"^classifier: expected logits \(5, K\) of two classes.*; got {got}"
    ):
        builder(Classifier(), score, n_steps=2)(x)


@pytest.mark.parametrize("seeds", [torch.arange(n) for n in (1, 4, 6)] + [torch.rand(5), [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("kind", [Purified, Averaged])
def test_there_is_one_seed_per_image(kind, seeds):
    score, classifier, x = small_problem()
    got = type(seeds).__name__ if isinstance(seeds, list) else rf"shape \({len(seeds)},\), {seeds.dtype}"
    with pytest.raises(
        ValueError, match=rf"seeds: expected one per image, shape \(5,\), torch.int64; got {got}"
    ):
        kind(classifier, Purifier(score, n_steps=2))(x, seeds)


@pytest.mark.parametrize("name", BUILDERS)
def test_images_lie_in_0_1_but_for_rounding_unless_a_study_says_otherwise(name):
    defence, x = build(name)
    middling = 0.4 * (2 * x - 1)  # of mid contrast, scaled to [-1, 1]
    for wrong in (middling, 1.002 * x / x.max(), x - x.min() - 0.002):
        with pytest.raises(ValueError, match=r"^x: expected values in \[0, 1\]; got "):
            defence(wrong)
        with pytest.raises(ValueError, match=r"^x: expected values in \[0, 1\]; got "):
            defence.purifier.trajectory(wrong, lambda i, t, state: None)
    assert defence((1 + 0.9 * ROUNDING) * x.round()).isfinite().all()
    assert defence(x.round() - 0.9 * ROUNDING).isfinite().all()
    defence.purifier.margin = 0.5
    assert defence(middling).isfinite().all()
    assert build(name)[0].purifier.margin == ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_looked_at(dtype):
    score, classifier, x = small_problem()
    defence = reverse_only(classifier.to(dtype), score.to(dtype), n_steps=2)
    assert defence(x.to(dtype)).shape == (5, 3)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]; got -"):
        defence(-x.to(dtype))


# --- averaging and fixed noise ---


def test_averaged_is_the_mean_of_single_purifications():
    """Of the image's own seed and of others, whose noise is other noise."""
    score, classifier, x = small_problem()
    purifier = Purifier(Guided(score, classifier), n_steps=4)
    single, averaged = Purified(classifier, purifier), Averaged(classifier, purifier, draws=3)
    seeds = torch.tensor([5, 2**62 - 1, 7, 0, 5])  # the second one wraps around
    draws = [single(x, seeds=torch.tensor([(int(s) + k * STRIDE) % 2**62 for s in seeds])) for k in range(3)]
    torch.testing.assert_close(averaged(x, seeds=seeds), sum(draws) / 3, rtol=0, atol=1e-13)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert ((draws[one] - draws[other]).abs().amax(1) > 1e-6).all()
    alone = torch.cat([averaged(x[i : i + 1], seeds=seeds[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, averaged(x, seeds=seeds), rtol=0, atol=1e-13)
    torch.testing.assert_close(Averaged(classifier, purifier, 1)(x, seeds), single(x, seeds))


def test_averaged_draws_fresh_noise_for_every_purification():
    """Without seeds: as many as the purifier's own generator gives, in order."""
    score, classifier, x = small_problem()
    averaged = Averaged(classifier, Purifier(score, n_steps=4), draws=3)
    averaged.purifier.reseed(9)
    logits = averaged(x)
    averaged.purifier.reseed(9)
    singles = classifier(averaged.purifier(x.repeat_interleave(3, dim=0)))
    torch.testing.assert_close(logits, singles.reshape(5, 3, 3).mean(1))
    assert singles.reshape(5, 3, 3).std(1).min() > 0


def test_a_vote_is_the_mean_of_its_draws_probabilities():
    """With its gradient; of a purified classifier by seeds from torch's generator, as an attack sets it."""
    score, classifier, x = small_problem()
    single, x = Purified(classifier, Purifier(Guided(score, classifier), n_steps=4)), x.requires_grad_()
    torch.manual_seed(5)
    draws = [single(x, torch.randint(2**62, (5,))).softmax(1) for _ in range(3)]
    torch.manual_seed(5)
    logits, expected = Vote(single, 3)(x), (sum(draws) / 3).log()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-13)
    slopes = [torch.autograd.grad(each[:, 0].sum(), x)[0] for each in (logits, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


class Coin(nn.Module):
    """Surely right in a call with probability 0.7, of all images at once, else surely wrong."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        right = torch.rand(1, generator=self.generator) < 0.7
        logits = torch.tensor([[50.0, 0.0]] if right else [[0.0, 50.0]])
        return logits.expand(len(x), 2) + 0 * x.flatten(1)[:, :2]


def test_a_vote_is_a_majority():
    """Right with the probability that three or more of five are, 0.83692; every draw is a call of its own."""
    vote, x = Vote(Coin(), 5), torch.rand(2, 1, 2, 2)
    right = torch.stack([vote(x).argmax(1) == 0 for _ in range(2000)]).double()
    assert abs(float(right[:, 0].mean()) - 0.83692) < 4 * (0.837 * 0.163 / 2000) ** 0.5
    found = Attack("apgd-ce", "Linf", 0.1, n_iter=2, eot=2)(Vote(Coin().eval(), 5), x, torch.zeros(2).long())
    assert found.x_adv.shape == x.shape


def test_a_vote_by_probabilities_taken_for_logits_is_told_of():
    _, classifier, x = small_problem()
    with pytest.warns(UserWarning, match="the model of a Vote returns probabilities, not logits"):
        Vote(nn.Sequential(classifier, nn.Softmax(1)).eval(), 2)(x)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.relu, 3), "model: expected a torch.nn.Module"),
        ((Coin(), 0), "draws: expected a whole number of at least 1; got 0"),
    ],
)
def test_a_vote_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Vote(*given)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["diffpure", "coup"])
def test_fixed_noise_is_the_same_for_every_image_and_call(name, draws):
    single, x = build(name)
    defence = Averaged(single.classifier, single.purifier, draws)
    fixed = FixedNoise(defence, seed=3)
    logits = fixed(x)
    torch.manual_seed(1)
    assert torch.equal(fixed(x), logits)
    torch.testing.assert_close(logits, defence(x, seeds=torch.full((5,), 3)), rtol=0, atol=0)
    twins = fixed(x[:1].expand(4, -1, -1, -1))  # one image, one noise, one answer
    torch.testing.assert_close(twins, logits[:1].expand(4, -1), rtol=0, atol=1e-13)
    assert not torch.allclose(FixedNoise(defence, seed=4)(x), logits)
    assert not torch.allclose(defence(x), logits)
    assert len(list(fixed.parameters())) == len(list(defence.parameters())) > 0


def test_fixed_noise_takes_seeds_of_62_bits():
    defence, x = build("coup")
    assert not torch.allclose(FixedNoise(defence, 2**62 - 1)(x), FixedNoise(defence, 2**62 - 2)(x))
