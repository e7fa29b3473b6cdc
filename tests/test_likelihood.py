"""Likelihood maximisation against closed forms, torch.optim and finite differences, in float64."""

import pytest
import torch
from closed_forms import Dropping, GaussianMixtureScore, SmoothClassifier, relative_error, small_problem
from torch import nn

from coup_lib import likelihood as module
from coup_lib.guidance import Guided, gradient_of, log_confidence, to_image, to_state
from coup_lib.likelihood import PER_PIXEL, LikelihoodMaximiser, adam_step, denoising_error, likelihood
from coup_lib.purify import FixedNoise
from coup_lib.score import ScoreDenoiser

SEEDS = torch.tensor([11, 22, 33, 44, 55])
GRADIENTS = module.LIKELIHOOD_GRADIENTS


def problem(dtype=torch.float64):
    """(denoiser, classifier, images (5, 1, 2, 2) away from the clamp)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator) * 0.5
    x = 0.3 + 0.4 * torch.rand(5, 1, 2, 2, generator=generator)
    return (
        ScoreDenoiser(GaussianMixtureScore(means.to(dtype), 0.3)),
        SmoothClassifier().to(dtype),
        x.to(dtype),
    )


UNIT = 4 * PER_PIXEL  # a λ that weighs log-confidence as much as the mean over these images' four pixels


def build(guided=False, **settings):
    denoiser, classifier, x = problem()
    settings = {"guidance_weight": UNIT} | settings
    return LikelihoodMaximiser(denoiser, classifier if guided else None, **settings), x


def gaussian(mean=0.0, std=0.3):
    """The denoiser of N(mean, std²) pixels: mean + std²/(std² + σ²)·(x − mean)."""
    return ScoreDenoiser(GaussianMixtureScore(torch.full((1, 4), mean, dtype=torch.float64), std))


def pulled(purifier, x):
    """The gradient of a fixed mixture of pixels."""
    x = x.clone().requires_grad_()
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    return torch.autograd.grad((purifier(x, SEEDS[: len(x)]) * weights).sum(), x)[0], weights


def test_the_objective_of_a_gaussian_is_a_parabola():
    """D(x + σε) − x = (c − 1)x + cσε with c = s²/(s² + σ²): its mean square, and that one's slope."""
    purifier = LikelihoodMaximiser(gaussian(std=0.3), sigma=(0.5, 0.5))
    x, noise = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    sigma, epsilon = torch.full((2,), 0.5, dtype=torch.float64), noise[:, 1:].reshape(x.shape)
    c = 0.09 / 0.34
    residual = (c - 1) * x + c * 0.5 * epsilon
    error = denoising_error(gaussian(std=0.3), x, sigma, epsilon)
    torch.testing.assert_close(error, residual.square().flatten(1).mean(1))
    torch.testing.assert_close(purifier.slope(x, noise), 2 * (c - 1) * residual / 4)


@pytest.mark.parametrize("mean", [-0.4, 0.0, 0.3])
def test_many_iterations_find_the_mode(mean):
    """Averaged over ε, the slope of a Gaussian vanishes at its mean and nowhere else."""
    purifier = LikelihoodMaximiser(gaussian(mean, std=0.1), n_steps=150, lr=0.02)
    _, x = build()
    torch.testing.assert_close(purifier(x, SEEDS), to_image(torch.full_like(x, mean)), rtol=0, atol=0.04)


@pytest.mark.parametrize("adam_eps", [1e-8, 0.1])
@pytest.mark.parametrize("guided", [False, True])
def test_it_is_torchs_adam_on_the_plain_objective(guided, adam_eps):
    """The loop spelled out: every image alone, autograd through both x, torch.optim, one clamp at the end."""
    purifier, x = build(guided, guidance_weight=0.7 * UNIT, adam_eps=adam_eps)
    ends = []
    for start, noise in zip(to_state(x), purifier.draw(x, SEEDS).unbind(1), strict=True):
        state = start[None].clone().requires_grad_()
        optimiser = torch.optim.Adam([state], lr=0.1, eps=adam_eps)
        for draw in noise:
            uniform = torch.distributions.Normal(0.0, 1.0).cdf(draw[:1])
            sigma, epsilon = 0.4 + 0.2 * uniform, draw[1:].reshape(state.shape)
            loss = nn.functional.mse_loss(purifier.denoiser(state + sigma * epsilon, sigma), state)
            if guided:
                loss = loss - 0.7 * purifier.guide((state + 1) / 2).softmax(1).max().log()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ends.append(((state.detach() + 1) / 2).clamp(0, 1))
    torch.testing.assert_close(purifier(x, SEEDS), torch.cat(ends), rtol=0, atol=1e-10)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("adam_eps", [1e-8, 0.1])
def test_exact_passes_gradcheck(guided, adam_eps):
    """Through all five iterations; the larger ε leaves Adam's own derivative in every one of them."""
    purifier, x = build(guided, adam_eps=adam_eps)
    x = x[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: purifier(x, SEEDS[:2]), (x,), eps=1e-6, atol=1e-6)


def test_first_order_is_the_derivative_with_constant_guidance():
    """Against autograd through a loop whose guidance is detached by hand; and it is not the exact one."""
    purifier, x = build(guided=True, gradient="first_order", adam_eps=0.1)
    exact, _ = build(guided=True, adam_eps=0.1)
    ours, weights = pulled(purifier, x)
    assert relative_error(ours, pulled(exact, x)[0]) > 1e-2

    x = x.requires_grad_()
    plain = LikelihoodMaximiser(purifier.denoiser)
    state = torch.stack([to_state(x), torch.zeros_like(x), torch.zeros_like(x)])
    for step, noise in enumerate(purifier.draw(x, SEEDS), 1):
        here = state[0].detach().requires_grad_()
        (guidance,) = torch.autograd.grad(log_confidence(purifier.guide, here).sum(), here)
        state = adam_step(state, plain.slope(state[0], noise) - guidance, step, 0.1, 0.1)
    (theirs,) = torch.autograd.grad((to_image(state[0]) * weights).sum(), x)
    assert relative_error(ours, theirs) < 1e-12


def test_without_guidance_first_order_is_exact():
    exact, first_order = (pulled(*build(gradient=gradient))[0] for gradient in ("exact", "first_order"))
    assert torch.equal(exact, first_order)


def test_bpda_is_the_identity():
    gradient, weights = pulled(*build(guided=True, gradient="bpda"))
    assert torch.equal(gradient, weights)


def test_adams_first_step_hides_its_derivative():
    """One iteration moves every pixel by lr, and its exact gradient is BPDA's.

    What that hides: the move is a sign, which another start turns around. A large ε hides nothing, nor do
    later iterations.
    """
    purifier, x = build(n_steps=1)
    gradient, weights = pulled(purifier, x)
    torch.testing.assert_close((purifier(x, SEEDS) - x).abs(), torch.full_like(x, 0.05), rtol=1e-4, atol=0)
    assert relative_error(gradient, weights) < 1e-4
    moved = purifier(1 - x, SEEDS) - (1 - x)
    assert bool((moved.sign() != (purifier(x, SEEDS) - x).sign()).any())
    for settings in ({"n_steps": 1, "adam_eps": 0.1}, {"n_steps": 5}):
        assert relative_error(pulled(build(**settings)[0], x)[0], weights) > 0.05


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("guided", [False, True])
def test_every_gradient_has_the_same_forward_pass(gradient, guided):
    purifier, x = build(guided, gradient=gradient)
    reference = build(guided)[0](x, SEEDS)
    torch.testing.assert_close(purifier(x.requires_grad_(), SEEDS), reference, rtol=0, atol=1e-15)


def test_an_image_without_slope_stays_and_has_a_gradient():
    """D(x + σε) = x + σε has no slope anywhere; √ has no derivative at 0, and must not make NaN of it."""

    class Identity(nn.Module):
        def forward(self, x, sigma):
            return x

    _, x = build()
    purifier = LikelihoodMaximiser(Identity())
    gradient, weights = pulled(purifier, x)
    torch.testing.assert_close(purifier(x, SEEDS), x)
    torch.testing.assert_close(gradient, weights)


def test_a_graph_can_be_pulled_back_twice_and_keeps_the_states_only():
    """FAB asks for several backward passes; what is saved is (x, m, v) before every step."""
    purifier, x = build(guided=True)
    x = x.requires_grad_()
    purified = purifier(x, SEEDS)
    first = torch.autograd.grad(purified.sum(), x, retain_graph=True)[0]
    node = purified.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    assert sum(tensor.numel() for tensor in node.saved_tensors) == 5 * 3 * x.numel()
    assert torch.equal(torch.autograd.grad(purified.sum(), x)[0], first)


def test_a_random_guide_is_differentiated_as_it_was():
    """At the masks of the forward pass, as autograd through all steps does; and none is drawn besides."""
    denoiser, _, x = problem()
    purifier = LikelihoodMaximiser(denoiser, Dropping().double(), guidance_weight=UNIT, adam_eps=0.1)
    torch.manual_seed(0)
    ours, weights = pulled(purifier, x)
    after = torch.rand(3)
    torch.manual_seed(0)
    x = x.requires_grad_()
    state = torch.stack([to_state(x), torch.zeros_like(x), torch.zeros_like(x)])
    for step, noise in enumerate(purifier.draw(x, SEEDS), 1):
        state = adam_step(state, purifier.slope(state[0], noise), step, 0.1, 0.1)
    (theirs,) = torch.autograd.grad((to_image(state[0]) * weights).sum(), x)
    assert relative_error(ours, theirs) < 1e-12
    assert torch.equal(torch.rand(3), after)


def test_first_order_refuses_guidance_in_the_denoiser():
    """To hold that constant would change the objective itself."""
    score, classifier, _ = small_problem()
    denoiser = ScoreDenoiser(Guided(score, classifier))
    assert LikelihoodMaximiser(denoiser).denoiser is denoiser
    with pytest.raises(ValueError, match="first_order holds the guide constant, not guidance in the denois"):
        LikelihoodMaximiser(denoiser, classifier, gradient="first_order")


def test_first_order_refuses_guidance_in_the_denoiser_that_no_module_shows():
    score, classifier, x = small_problem()

    class Own(nn.Module):
        """Takes a gradient of its own, and is no `Guided`."""

        def forward(self, x, t):
            return score(x, t) + gradient_of(lambda x: log_confidence(classifier, x), x)

    denoiser = ScoreDenoiser(Own())
    x.requires_grad_()
    for gradient in ("exact", "first_order"):
        purifier = LikelihoodMaximiser(denoiser, classifier, gradient=gradient, n_steps=2)
        if gradient == "exact":
            purifier(x)
            continue
        with pytest.raises(ValueError, match="first_order cannot tell guidance from score"):
            purifier(x).sum().backward()


@pytest.mark.parametrize("who", ["denoiser", "guide"])
def test_networks_that_are_trained_or_elsewhere_are_refused(who):
    purifier, x = build(guided=True)
    getattr(purifier, who).train()
    with pytest.raises(ValueError, match=f"^{who}: is in train mode"):
        purifier(x)
    purifier.eval()
    getattr(purifier, who).to("meta")
    with pytest.raises(ValueError, match=f"^{who}: expected on cpu, where the images are; it is on meta"):
        purifier(x)


def test_guidance_raises_confidence():
    denoiser, classifier, x = problem()
    plain, guided = (
        likelihood(classifier, denoiser, weight)(x, SEEDS).softmax(1).amax(1) for weight in (0, 5 * UNIT)
    )
    assert bool((guided > plain).all())


def test_no_weight_is_no_guidance_bit_for_bit():
    weightless, x = build(guided=True, guidance_weight=0.0)
    plain, _ = build()
    assert torch.equal(weightless(x, SEEDS), plain(x, SEEDS))
    denoiser, classifier, _ = problem()
    assert torch.equal(likelihood(classifier, denoiser)(x, SEEDS), classifier(plain(x, SEEDS)))


@pytest.mark.parametrize("guided", [False, True])
def test_a_seed_means_the_same_result_in_any_batch_and_order(guided):
    purifier, x = build(guided)
    whole = purifier(x, SEEDS)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(purifier(x[order], SEEDS[order]), whole[order], rtol=0, atol=1e-12)
    alone = torch.cat([purifier(x[i : i + 1], SEEDS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)
    assert not torch.allclose(purifier(x, SEEDS + 1), whole)


@pytest.mark.parametrize("guided", [False, True])
def test_a_seed_means_the_same_result_in_every_precision(guided):
    purifier, x = build(guided)
    denoiser, classifier, single = problem(torch.float32)
    result = LikelihoodMaximiser(denoiser, classifier if guided else None, guidance_weight=UNIT)(
        single, SEEDS
    )
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), purifier(x, SEEDS), rtol=0, atol=1e-4)


def test_levels_are_uniform_and_every_image_and_step_has_its_own():
    purifier, _ = build(sigma=(0.4, 0.6))
    x = torch.zeros(2000, 1, 2, 2, dtype=torch.float64)
    levels = torch.stack([purifier.level(draw[:, 0]) for draw in purifier.draw(x, torch.arange(2000))])
    # The draws are float32: among so many, how the processor rounds decides whether two coincide.
    assert levels.numel() == 10_000 and levels.unique().numel() > 9_900
    assert float(levels.min()) >= 0.4 and float(levels.max()) <= 0.6
    quartiles = torch.quantile(levels, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, torch.tensor([0.45, 0.5, 0.55]).double(), rtol=0, atol=0.005)


def test_noise_is_its_own():
    """Not torch's global generator's, which attacks reseed; fresh in every call; repeated by a reseed."""
    purifier, x = build(seed=4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = purifier(x)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(0)
    assert not torch.allclose(purifier(x), first)
    purifier.reseed(4)
    assert torch.equal(purifier(x), first)


def test_results_are_images():
    """A long stride would leave the range: the end is clamped, and only there."""
    purifier, x = build(lr=2.0)
    purified = purifier(x, SEEDS)
    assert float(purified.min()) == 0 and float(purified.max()) == 1


def test_it_is_a_classifier_like_any_other():
    denoiser, classifier, x = problem()
    defence = likelihood(classifier, denoiser, 0.5, n_steps=2, seed=1)
    assert not any(parameter.requires_grad for parameter in defence.parameters())
    assert not denoiser.training and not classifier.training
    assert defence(x).shape == (5, 3) and not defence(x).requires_grad
    fixed = FixedNoise(defence, 7)
    assert torch.equal(fixed(x), fixed(x)) and not torch.equal(defence(x), defence(x))
    assert torch.equal(fixed(x), defence(x, torch.full((5,), 7)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "exakt"}, "expected one of exact, first_order, bpda; got 'exakt'"),
        ({"gradient": "adjoint"}, "no SDE, so no adjoint.*expected one of exact, .*got 'adjoint'"),
        ({"sigma": (0.6, 0.4)}, r"sigma: expected \(low, high\) with 0 < low <= high; got \(0.6, 0.4\)"),
        ({"n_steps": 0}, "n_steps: expected a whole number of at least 1; got 0"),
        ({"guidance_weight": float("nan")}, "guidance_weight: expected a number .*; got nan"),
        ({"lr": 0}, "lr: expected a number greater than 0; got 0"),
        ({"adam_eps": -1e-8}, "adam_eps: expected a number greater than 0; got -1e-08"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_there_is_one_seed_per_image():
    purifier, x = build()
    with pytest.raises(
        ValueError, match=r"seeds: expected one per image, shape \(5,\), torch.int64; got shape \(4,\)"
    ):
        purifier(x, SEEDS[:4])
