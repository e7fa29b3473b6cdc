"""Every guidance, and every defence by name: each against its definition, and their gradients in float64."""

import math

import pytest
import torch
from closed_forms import GaussianMixtureScore, relative_error, small_problem
from torch import nn

from coup_lib import gradients
from coup_lib.defences import (
    CANDIDATES,
    CONTROLS,
    DEFENCES,
    LABELS,
    MAXIMISERS,
    PAPER,
    PURIFIERS,
    RIVALS,
    SWITCH,
    build,
    is_guided,
)
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.guidance import (
    ConfidenceGuided,
    DenoisedGuided,
    DistanceGuided,
    FirstOrder,
    GuidanceInterval,
    Guided,
    PredictionGuided,
    Smoothed,
    to_image,
    to_state,
)
from coup_lib.likelihood import likelihood
from coup_lib.purify import Averaged, ProbabilityFlow, Purifier, coup
from coup_lib.score import ScoreDenoiser
from coup_lib.sde import VPSDE
from coup_lib.solver import solve, step_times, time_grid

SEEDS = torch.tensor([11, 22, 33, 44, 55])
REVERSE = [name for name in PURIFIERS if name not in MAXIMISERS]  # those that run the reverse SDE
GUIDED = [name for name in REVERSE if is_guided(name)]
T = torch.tensor(0.05, dtype=torch.float64)


class Guide(nn.Module):
    """Another smooth classifier than the one that decides."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.weights = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(2 * x.flatten(1) @ self.weights)


def made(name, gradient="exact", n_steps=4, t_star=0.1):
    """(the named defence on the closed-form problem, its images); the grid lies on both sides of SWITCH."""
    score, classifier, x = small_problem()
    guide = Guide() if PURIFIERS[name].robust_guide else classifier
    defence = build(
        PURIFIERS[name],
        classifier,
        score,
        guide,
        guidance_weight=1.5,
        t_star=t_star,
        n_steps=n_steps,
        gradient=gradient,
    )
    return defence, 0.25 + x / 2  # away from the clamp's kink


def state_of(name, x):
    """What the named defence's score is of: states, beside the image where its guidance reads that."""
    state = to_state(x)
    return torch.cat([state, state.flip(0)], 1) if PURIFIERS[name].reads_image else state


def unguided(guided, x, t):
    """The score inside of a guided one, like x: of states, or of states beside an image."""
    state = x[:, :1]
    return torch.cat([guided.score(state, t), -x[:, 1:] / 2], 1)


def input_gradient(defence, x):
    """The gradient of a fixed mixture of logits."""
    x = x.clone().requires_grad_()
    weights = torch.arange(1.0, 4.0, dtype=x.dtype)
    return torch.autograd.grad((defence(x, seeds=SEEDS) * weights).sum(), x)[0]


def by_differences(function, x, step=1e-6):
    """∇ of function, (B, ...) to (B,), pixel by pixel."""
    result = torch.zeros_like(x)
    for place in range(x[0].numel()):
        shift = torch.zeros_like(x).flatten(1)
        shift[:, place] = step
        shift = shift.view_as(x)
        slope = (function(x + shift) - function(x - shift)) / (2 * step)
        result += shift / step * slope[:, None, None, None]
    return result


# --- all of them ---


def test_every_name_has_a_label_of_its_own():
    assert set(LABELS) == set(DEFENCES) == {"none", *PURIFIERS}
    assert len(set(LABELS.values())) == len(LABELS)
    assert sorted((*PAPER, *MAXIMISERS, *CANDIDATES, *CONTROLS, *RIVALS)) == sorted(DEFENCES)
    assert not is_guided("none") and not is_guided("averaged") and is_guided("coup-averaged")


@pytest.mark.parametrize("name", REVERSE)
def test_every_defence_keeps_its_recipe(name):
    """Runs, repeats with its seeds and not without, is frozen, and is made of what the recipe says."""
    recipe, (defence, x) = PURIFIERS[name], made(name)
    logits = defence(x, seeds=SEEDS)
    assert logits.shape == (5, 3) and logits.dtype == torch.float64 and logits.isfinite().all()
    assert torch.equal(defence(x, seeds=SEEDS), logits)
    assert torch.equal(defence(x), defence(x)) == (recipe.path is ProbabilityFlow)
    assert not any(parameter.requires_grad for parameter in defence.parameters())
    assert type(defence.purifier) is recipe.path
    assert isinstance(defence.purifier.score, Guided) == is_guided(name)
    assert getattr(defence, "draws", 1) == recipe.draws
    if recipe.robust_guide:
        assert isinstance(defence.purifier.score.classifier, Guide)


@pytest.mark.parametrize("name", MAXIMISERS)
@pytest.mark.parametrize("gradient", ["exact", "first_order", "bpda"])
def test_likelihood_maximisation_is_made_around_the_same_networks(name, gradient):
    defence, x = made(name, gradient)
    score, classifier, _ = small_problem()
    weight = 1.5 if is_guided(name) else 0.0
    by_hand = likelihood(classifier, ScoreDenoiser(score), weight, gradient=gradient)
    assert torch.equal(defence(x, seeds=SEEDS), by_hand(x, seeds=SEEDS))
    assert torch.equal(input_gradient(defence, x), input_gradient(by_hand, x))


@pytest.mark.parametrize("name", REVERSE)
def test_exact_gradients_are_central_differences(name, monkeypatch):
    """Twice: with all activations kept, and with every step replayed."""
    defence, x = made(name)
    weights = torch.arange(1.0, 4.0, dtype=x.dtype)
    numeric = by_differences(lambda x: (defence(x, seeds=SEEDS) * weights).sum(1), x)
    for budget in (2**30, 0):
        monkeypatch.setattr(gradients.solve_with_gradient, "__defaults__", (budget,))
        assert relative_error(input_gradient(defence, x), numeric) < 1e-6


@pytest.mark.parametrize("name", GUIDED)
def test_first_order_holds_the_guidance_and_nothing_else(name):
    """Against autograd through a solver whose guidance is detached by hand; the values do not change."""
    guided = made(name)[0].purifier.score
    sde, times, x = VPSDE(), time_grid(0.1, 6), small_problem()[2]

    class Detached(nn.Module):
        def forward(self, x, t):
            return unguided(guided, x, t) + (guided(x, t) - unguided(guided, x, t)).detach()

    ends = {}
    for way, score in (("ours", FirstOrder(guided)), ("by hand", Detached()), ("exact", guided)):
        state = state_of(name, x).requires_grad_()
        end = solve(score, sde, state, times)
        ends[way] = end.detach(), torch.autograd.grad(end, state, torch.ones_like(end))[0]
    torch.testing.assert_close(ends["ours"][0], ends["exact"][0], rtol=0, atol=1e-14)
    assert relative_error(ends["ours"][1], ends["by hand"][1]) < 1e-12
    assert relative_error(ends["ours"][1], ends["exact"][1]) > 1e-4  # there is something to hold


@pytest.mark.parametrize("name", PURIFIERS)
def test_inference_mode_changes_nothing_but_that_nothing_is_differentiated(name):
    defence, x = made(name)
    expected = defence(x, seeds=SEEDS)
    with torch.inference_mode():
        assert torch.equal(defence(x, seeds=SEEDS), expected)
        inside = x.clone()
        assert torch.equal(defence(inside, seeds=SEEDS), expected)
        if name in GUIDED:  # a score is of use in another sampler, too
            guided, t = defence.purifier.score, T.clone()
            scored = guided(state_of(name, inside), t)
    assert torch.equal(defence(inside, seeds=SEEDS), expected)
    if name in GUIDED:
        assert torch.equal(guided(state_of(name, x), T), scored)


@pytest.mark.parametrize("name", GUIDED)
def test_no_weight_is_no_guidance(name):
    recipe = PURIFIERS[name]
    score, classifier, x = small_problem()
    state = state_of(name, x)
    guided = recipe.guidance(score, classifier, 0.0)
    for t in (0.01, 0.05):
        t = torch.tensor(t, dtype=torch.float64)
        assert torch.equal(guided(state, t), unguided(guided, state, t))


# --- guidance ---


def test_settings_of_candidates_are_checked():
    score, classifier, _ = small_problem()
    for times in ((0.5, 0.1), (-0.1, 0.1), (0, 30), (30, 100)):  # the last in DiffPure's unit
        with pytest.raises(ValueError, match=r"low, high: expected 0 <= low <= high <= 1; got"):
            GuidanceInterval(Guided(score, classifier), *times)
    for make in (
        lambda: Smoothed(classifier, 0.1, draws=0),
        lambda: Averaged(classifier, Purifier(score), 0),
    ):
        with pytest.raises(ValueError, match="draws: expected a whole number of at least 1; got 0"):
            make()


@pytest.mark.parametrize("way", [coup, likelihood])
def test_a_guide_that_gives_probabilities_is_told_of_once(way, recwarn):
    score, classifier, x = small_problem()
    guide = nn.Sequential(classifier, nn.Softmax(1))
    defence = way(guide, score if way is coup else ScoreDenoiser(score), 1.0, n_steps=2)
    for _ in range(2):
        defence(x)
    assert [str(one.message) for one in recwarn] == [
        "the guide returns probabilities, not logits: guidance by them is weak"
    ]


def test_denoised_guidance_is_by_the_denoised_image():
    """Tweedie's formula on one Gaussian has a closed form; the gradient goes through it."""
    _, classifier, x = small_problem()
    mean, spread, sde, state = torch.full((1, 4), 0.2, dtype=torch.float64), 0.3, VPSDE(), to_state(x)
    guided = DenoisedGuided(GaussianMixtureScore(mean, spread), classifier, 2.0)
    m, variance = sde.mean_coeff(T), sde.std(T) ** 2
    gain = m * spread**2 / (m**2 * spread**2 + variance)  # E[x_0 | x_t] = μ + gain (x_t - m μ)

    def denoised(state):
        return 0.2 + gain * (state - m * 0.2)

    torch.testing.assert_close(guided.denoised(state, T), denoised(state))

    def log_confidence(state):
        return classifier(to_image(denoised(state))).softmax(1).amax(1).log()

    torch.testing.assert_close(
        guided.guidance(state, T), 2 * by_differences(log_confidence, state), rtol=1e-6, atol=1e-8
    )


def test_confidence_guidance_is_the_plain_one_times_the_confidence():
    score, classifier, x = small_problem()
    state = to_state(x)
    fading, plain = ConfidenceGuided(score, classifier, 2.0), Guided(score, classifier, 2.0)
    p = classifier(x).softmax(1).amax(1)[:, None, None, None]
    torch.testing.assert_close(fading.guidance(state, T), p * plain.guidance(state, T))


@pytest.mark.parametrize(
    ("t", "low", "high", "always"),
    [(0.05, False, True, True), (0.02, True, False, True), (0.03, True, True, True)],
)
def test_between_guides_between_its_times_only(t, low, high, always):
    score, classifier, x = small_problem()
    guided, state, t = Guided(score, classifier, 2.0), to_state(x), torch.tensor(t, dtype=torch.float64)
    for switched, on in (
        (GuidanceInterval(guided, high=0.03), low),
        (GuidanceInterval(guided, low=0.03), high),
        (GuidanceInterval(guided), always),
    ):
        expected = guided.guidance(state, t) if on else torch.zeros_like(state)
        assert torch.equal(switched.guidance(state, t), expected)
        assert torch.equal(switched(state, t), score(state, t) + expected)


@pytest.mark.parametrize("t_star", PROFILES["digits"].t_star.values())
@pytest.mark.parametrize("n_steps", [10, 20, 50, 100])
def test_every_step_is_at_low_or_high_noise_in_every_precision(t_star, n_steps):
    """A switch on a point of the grid would fall to one side in float32 and to the other in float64."""
    times, sides = time_grid(t_star, n_steps), []
    for dtype in (torch.float32, torch.float64):
        steps = [float(t) for t, _ in step_times(times, dtype, times.device)]
        sides.append([t < SWITCH for t in steps])
        assert min(abs(t - SWITCH) for t in steps) > 1e-5
    assert sides[0] == sides[1] and set(sides[0]) == {True, False}


def test_low_and_high_noise_share_out_the_guidance():
    """On any step one of them is COUP's score and the other has no guidance."""
    score, classifier, x = small_problem()
    state, coup = to_state(x), Guided(score, classifier, 1.5)
    scores = {name: made(name)[0].purifier.score for name in ("low-noise", "high-noise")}
    for t in time_grid(0.1, 10)[:-1]:
        guiding, resting = ("low-noise", "high-noise") if t < SWITCH else ("high-noise", "low-noise")
        torch.testing.assert_close(scores[guiding](state, t), coup(state, t))
        torch.testing.assert_close(scores[resting](state, t), score(state, t))


def test_smoothed_is_the_mean_probability_over_fixed_noise():
    _, classifier, x = small_problem()
    smoothed = Smoothed(classifier, std=0.2, draws=3, seed=5)
    noise = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(5)).double()
    by_hand = sum(classifier(x + 0.2 * draw).softmax(1) for draw in noise) / 3
    logits = smoothed(x)
    torch.testing.assert_close(logits.softmax(1), by_hand)
    torch.testing.assert_close(logits - math.log(3), by_hand.log())
    assert torch.equal(smoothed(x[2:4]), logits[2:4])  # the same noise in whatever batch
    torch.testing.assert_close(Smoothed(classifier, std=0.0)(x).softmax(1), classifier(x).softmax(1))


# --- guidance that reads the attacked image, and the probability flow ---


def test_guidance_by_distance_is_the_slope_of_the_distance():
    """To the image noised to the same time, in the mean over that noise; by the schedule of GDMP."""
    score, classifier, x = small_problem()
    pair, sde = state_of("gdmp", x), VPSDE()
    mean, std = sde.mean_coeff(T), sde.std(T)

    def closeness(state):
        return -(state - mean * pair[:, 1:]).square().flatten(1).sum(1) / 2

    slope = std / mean * by_differences(closeness, pair[:, :1])
    torch.testing.assert_close(DistanceGuided(score, classifier, 3.0).guidance(pair, T), 3 * slope)


def test_guidance_to_the_prediction_is_the_slope_of_the_agreement():
    score, classifier, x = small_problem()
    pair = state_of("prediction", x)
    said = classifier(to_image(pair[:, 1:])).softmax(1)

    def agreement(state):
        return (said * classifier(to_image(state)).log_softmax(1)).sum(1)

    found = PredictionGuided(score, classifier, 2.0).guidance(pair, T)
    torch.testing.assert_close(found, 2 * by_differences(agreement, pair[:, :1]), rtol=1e-6, atol=1e-8)


def test_by_distance_the_exact_gradient_follows_the_image_and_the_first_order_one_does_not():
    """On one Gaussian all is linear: two factors, of the state and of the image, step by step."""
    _, classifier, x = small_problem()
    mean, spread, weight, sde = torch.zeros(1, 4, dtype=torch.float64), 0.3, 20.0, VPSDE()
    guided, x = DistanceGuided(GaussianMixtureScore(mean, spread), classifier, weight), 0.25 + x / 2
    slopes = {}
    for gradient in ("exact", "first_order"):
        purifier, given = Purifier(guided, n_steps=5, gradient=gradient), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(purifier(given, SEEDS).sum(), given)
        exact, total = gradient == "exact", 1.0
        for t, dt in step_times(purifier.times, x.dtype, x.device):
            beta, m, std = sde.beta(t), sde.mean_coeff(t), sde.std(t)
            own = -1 / (m**2 * spread**2 + std**2) - exact * weight * std / m
            total = total * (1 + dt * beta * (0.5 + own)) + exact * dt * beta * weight * std
        torch.testing.assert_close(slope, total * torch.ones_like(slope))
        slopes[gradient] = float(total)
    assert slopes["exact"] > 1.1 * slopes["first_order"]  # nearer to the image that the attacker moves


def test_the_probability_flow_of_a_gaussian_has_a_closed_form():
    """The distance to the mean shrinks as the standard deviation does; Euler's error halves with the step."""
    x = small_problem()[2]
    mean, spread, sde, errors = torch.full((1, 4), 0.2, dtype=torch.float64), 0.3, VPSDE(), []
    for n_steps in (200, 400):
        purifier = ProbabilityFlow(GaussianMixtureScore(mean, spread), n_steps=n_steps)
        purifier.clamp = False
        start, end = purifier.times[0], purifier.times[-1]
        (m, s), (m_end, s_end) = ((sde.mean_coeff(t), sde.std(t)) for t in (start, end))
        ratio = ((m_end**2 * spread**2 + s_end**2) / (m**2 * spread**2 + s**2)).sqrt()
        expected = to_image(0.2 * m_end + ratio * (to_state(x) - 0.2 * m))
        errors.append(float((purifier(x) - expected).abs().max()))
    assert errors[0] < 2e-3 and errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_the_flow_takes_no_guidance_that_reads_the_image():
    score, classifier, _ = small_problem()
    with pytest.raises(ValueError, match=r"^score: expected no guidance that reads the image"):
        ProbabilityFlow(PredictionGuided(score, classifier))
