"""The time grid and the Euler–Maruyama solver, in float64 against closed forms."""

import pytest
import torch
from closed_forms import GaussianMixtureScore, small_problem

from coup_lib.guidance import Guided, gradient_of, to_image, to_state
from coup_lib.sde import T_END, VPSDE
from coup_lib.solver import reverse_drift, solve, time_grid


def test_the_papers_grid():
    times = time_grid(0.1, 100)
    steps = times[:-1] - times[1:]
    torch.testing.assert_close(steps[:-1], torch.full((99,), 1e-3, dtype=torch.float64))
    assert float(steps[-1]) == pytest.approx(0.99e-3)
    assert float(times[0]) == 0.1 and float(times[-1]) == T_END


def unit_gaussian() -> GaussianMixtureScore:
    """N(0, I) data: the VP-SDE leaves it as it is, the score is -x at every t."""
    return GaussianMixtureScore(torch.zeros(1, 4, dtype=torch.float64), 1.0)


def test_deterministic_path_converges_to_the_closed_form():
    """Without Brownian motion dx/dt = βx/2 on unit Gaussian data: x_0 = exp(-γ) x_t*, first order."""
    sde, x = VPSDE(), torch.ones(1, 4, dtype=torch.float64)
    span = sde.gamma(torch.tensor([0.1, T_END], dtype=torch.float64))
    exact = torch.exp(-(span[0] - span[1]))
    errors = [
        float((solve(unit_gaussian(), sde, x, time_grid(0.1, n)) - exact).abs().max()) for n in (20, 40, 80)
    ]
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_noise_keeps_the_stationary_law():
    """The reverse SDE carries N(0, I) to N(0, I); mean and variance of 50,000 paths say so."""
    n = 50_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(50, n, 1, generator=generator, dtype=torch.float64)
    score = GaussianMixtureScore(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    end = solve(score, VPSDE(), x, time_grid(0.3, 50), noise)
    assert float(end.mean()) == pytest.approx(0, abs=4 / n**0.5)
    assert float(end.var()) == pytest.approx(1, abs=0.03)


def test_callback_sees_every_state():
    score, _, x = small_problem()
    seen = []
    end = solve(score, VPSDE(), to_state(x), time_grid(0.1, 7), callback=lambda *step: seen.append(step))
    assert [index for index, _, _ in seen] == list(range(8))
    assert seen[0][1] == 0.1 and seen[-1][1] == T_END
    torch.testing.assert_close(seen[0][2], to_state(x))
    assert seen[-1][2] is end


def test_drift_is_eq_5():
    score, classifier, x = small_problem()
    sde, t, weight = VPSDE(), torch.tensor(0.08, dtype=torch.float64), 1.7
    state = to_state(x).requires_grad_()
    log_confidence = classifier(to_image(state)).softmax(1).max(1).values.log().sum()
    (guidance,) = torch.autograd.grad(log_confidence, state)
    beta = 0.1 + 0.08 * 19.9
    expected = -beta * state / 2 - beta * (score(state, t) + weight * guidance)
    torch.testing.assert_close(reverse_drift(Guided(score, classifier, weight), sde, state, t), expected)


def test_each_image_may_have_a_time_of_its_own_in_the_drift():
    score, _, x = small_problem()
    sde, x, times = VPSDE(), to_state(x)[:2], torch.tensor([0.02, 0.1], dtype=torch.float64)
    alone = [reverse_drift(score, sde, x[i : i + 1], times[i]) for i in (0, 1)]
    torch.testing.assert_close(reverse_drift(score, sde, x, times), torch.cat(alone))


def test_gradient_of_can_be_differentiated_again_only_where_asked():
    """∇ of Σ x⁴/12 is x³/3 per image, and the gradient of its sum is x²."""
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)

    def function(x):
        return (x**4).flatten(1).sum(1) / 12

    plain = gradient_of(function, x)
    torch.testing.assert_close(plain, x**3 / 3)
    assert not plain.requires_grad
    twice = gradient_of(function, x.requires_grad_())
    torch.testing.assert_close(torch.autograd.grad(twice.sum(), x)[0], x.detach() ** 2)
    with torch.no_grad():
        assert not gradient_of(function, x).requires_grad
