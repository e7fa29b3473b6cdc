"""Scores from what others' networks answer and were trained on."""

from dataclasses import dataclass

import pytest
import torch
from closed_forms import GaussianMixtureScore, small_problem
from torch import Tensor, nn

from coup_lib.guidance import DenoisedGuided, GuidanceInterval, Guided
from coup_lib.purify import DiffPurePurifier, Purifier
from coup_lib.score import DISCRETE_LEVELS, DenoisedScore, NoiseScore, ScoreDenoiser
from coup_lib.sde import VPSDE
from coup_lib.solver import time_grid

SDE, OTHER = VPSDE(), VPSDE(0.1, 40.0)
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Output:
    """What diffusers' UNet2DModel returns."""

    sample: Tensor


class Network(nn.Module):
    """A noise network that answers as it is told, and keeps its labels."""

    def __init__(self, answer=lambda x: x):
        super().__init__()
        self.answer = answer

    def forward(self, x, labels):
        self.labels = labels
        return self.answer(x)


class Wrapped(nn.Module):
    """Whatever a user puts around her score."""

    def __init__(self, score):
        super().__init__()
        self.inner = score

    def forward(self, x, t):
        return self.inner(x, t)


# --- what a network answers ---


@pytest.mark.parametrize(
    "answer",
    [Output, lambda x: torch.cat([x, 7 + x], dim=1), lambda x: Output(torch.cat([x, 7 + x], dim=1))],
    ids=["an object with a sample", "noise and variances", "both"],
)
def test_the_noise_is_found_in_what_the_network_answers(answer):
    t = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert torch.equal(NoiseScore(Network(answer))(X, t), NoiseScore(Network())(X, t))


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: x[:, :1], r"shape \(2, 1, 4, 4\)"),
        (lambda x: torch.cat([x, x, x], dim=1), r"shape \(2, 9, 4, 4\)"),
        (lambda x: x[:1], r"shape \(1, 3, 4, 4\)"),
        (lambda x: (x,), "tuple"),
    ],
)
def test_an_answer_that_would_be_broadcast_is_refused(answer, got):
    message = rf"expected an answer of its input's shape, \(2, 3, 4, 4\); got {got}"
    t = torch.tensor(0.1, dtype=torch.float64)
    network = Network(answer)
    for score in (NoiseScore(network), DenoisedScore(network), ScoreDenoiser(network)):
        with pytest.raises(ValueError, match=message):
            score(X, t)
    with pytest.raises(ValueError, match=f"^score: {message}"):
        Purifier(Wrapped(network), n_steps=2)(X.sigmoid())
    with pytest.raises(ValueError, match=f"^score: {message}"):
        Guided(network, lambda x: x.flatten(1))(X, t)


@pytest.mark.parametrize("n", [3, 1])
def test_as_many_times_as_images_are_expected(n):
    for score in (NoiseScore(Network()), DenoisedScore(Network())):
        with pytest.raises(ValueError, match=rf"one per image, \(2,\); got shape \({n},\)"):
            score(X, torch.full((n,), 0.1, dtype=torch.float64))


# --- networks trained on discrete steps ---


def test_of_a_discrete_network_the_label_is_a_step_and_the_std_that_steps():
    """On the paper's grid: step k - 1 of 0 … 999 at t = k/1000, with √(1 - ᾱ) after k steps."""
    network, steps = Network(), torch.arange(100, 0, -1, dtype=torch.float64)
    score = NoiseScore(network, n_levels=1000)
    for k, t in zip(steps, time_grid(0.1, 100)[:-1], strict=True):
        std = -X / score(X, t)
        torch.testing.assert_close(network.labels, (k - 1).expand(2), rtol=0, atol=1e-9)
        expected = SDE.discrete_marginal(float(k) / 1000)[1]
        torch.testing.assert_close(std, torch.full_like(std, expected), rtol=1e-9, atol=0)
    score(X.float(), torch.tensor([0.1, 0.0005]))
    assert network.labels.dtype == torch.float32
    torch.testing.assert_close(network.labels, torch.tensor([99.0, 0.0]), rtol=0, atol=1e-4)


def test_what_a_continuous_label_would_tell_a_discrete_network():
    """At t = 0.001 label 0.999 is the second step: its std is 41 % above t's own."""
    network, t = Network(), torch.tensor(0.001, dtype=torch.float64)
    NoiseScore(network, time_scale=DISCRETE_LEVELS)(X, t)
    label = float(network.labels[0])
    assert label == pytest.approx(0.999)
    told = SDE.discrete_marginal((label + 1) / 1000)[1]
    assert told / float(SDE.std(t)) == pytest.approx(1.41, abs=0.01)
    NoiseScore(network, n_levels=1000)(X, t)
    told = SDE.discrete_marginal((float(network.labels[0]) + 1) / 1000)[1]
    assert told == pytest.approx(0.01) and abs(told / float(SDE.std(t)) - 1) < 0.05


@pytest.mark.parametrize("sde", [SDE, OTHER])
@pytest.mark.parametrize("n_levels", [1000, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_std_is_that_of_the_chain_and_in_between_it_rises(sde, n_levels, dtype):
    steps = torch.arange(n_levels + 1, dtype=dtype)
    expected = [sde.discrete_marginal(float(step) / n_levels, n_levels)[1] for step in steps]
    std = sde.discrete_std(steps / n_levels, n_levels)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(std, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=1e-12)
    between = sde.discrete_std((steps[:-1] + 0.5) / n_levels, n_levels)
    far = std[1:] < 0.99  # nearer to 1 float32 may have no number in between
    assert (std[:-1] < between)[far].all() and (between < std[1:])[far].all()


@pytest.mark.parametrize("settings", [{"n_levels": 0}, {"n_levels": 1.5}, {"time_scale": 0}])
def test_settings_of_a_noise_score_are_checked(settings):
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))}: expected a "):
        NoiseScore(Network(), **settings)


# --- whose SDE ---


def of(sde):
    """Every way to wrap a score of this SDE."""
    classifier, score = nn.Flatten(), NoiseScore(Network(), sde)
    guided = Guided(score, classifier)
    return {
        "alone": score,
        "of a denoiser": DenoisedScore(Network(), sde),
        "guided": guided,
        "guided by what is denoised": DenoisedGuided(score, classifier),
        "guided at some times": GuidanceInterval(guided),
        "wrapped twice": Wrapped(Wrapped(guided)),
    }


@pytest.mark.parametrize("name", of(SDE))
@pytest.mark.parametrize("kind", [Purifier, DiffPurePurifier])
def test_another_sde_than_the_scores_is_refused(name, kind):
    message = r"^sde: expected that of the score, VPSDE\(.*beta_max={}.*; got VPSDE\(.*beta_max={}.*"
    for own, given in ((SDE, OTHER), (OTHER, SDE)):
        with pytest.raises(ValueError, match=message.format(own.beta_max, given.beta_max)):
            kind(of(own)[name], sde=given)
        assert kind(of(own)[name], sde=own).sde == own
        assert kind(of(own)[name]).sde == own  # its score's, where none is given


def test_a_score_that_says_nothing_is_taken_at_its_word():
    silent = Wrapped(Network())
    assert Purifier(silent).sde == SDE and Purifier(silent, sde=OTHER).sde == OTHER
    guided = Guided(silent, nn.Flatten())
    assert guided.sde is None and Purifier(guided, sde=OTHER).sde == OTHER
    with pytest.raises(ValueError, match=r"^sde: expected that of the score"):
        Purifier(DenoisedGuided(silent, nn.Flatten()), sde=OTHER)  # it denoises by the paper's


def test_a_denoiser_has_no_sde_but_the_score_that_it_is_of():
    """What is in there is another matter: a denoiser knows levels of noise and no times."""
    denoiser = ScoreDenoiser(NoiseScore(Network(), OTHER))
    assert denoiser.sde == OTHER
    assert Purifier(DenoisedScore(denoiser, SDE)).sde == SDE
    with pytest.raises(ValueError, match=r"^sde: expected that of the score"):
        ScoreDenoiser(NoiseScore(Network(), OTHER), SDE)


def test_parts_of_two_sdes_are_refused():
    class Sum(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.parts = nn.ModuleList(parts)

    with pytest.raises(ValueError, match=r"^score: expected parts of one SDE; got VPSDE.* and VPSDE"):
        Purifier(Sum(NoiseScore(Network(), OTHER), NoiseScore(Network())))


def test_denoised_guidance_uses_the_scores_own_sde():
    """Tweedie's formula with another SDE is another image."""
    score, classifier, x = small_problem()
    assert isinstance(score, GaussianMixtureScore)
    score.sde = OTHER
    state, t = 2 * x - 1, torch.tensor(0.1, dtype=torch.float64)
    expected = (state + OTHER.std(t) ** 2 * score(state, t)) / OTHER.mean_coeff(t)
    torch.testing.assert_close(DenoisedGuided(score, classifier).denoised(state, t), expected)
