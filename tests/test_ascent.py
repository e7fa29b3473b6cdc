"""What attacks on random defences climb by, in float64 against closed forms."""

import math

import pytest
import torch
from closed_forms import small_problem
from torch import nn

from coup_lib.ascent import (
    LOW,
    InParts,
    Kept,
    PerStep,
    cross_entropy,
    deviation,
    low_frequencies,
    selected,
    steepest,
)
from coup_lib.attacks import Attack
from coup_lib.purify import DiffPurePurifier, FixedNoise, Purified, Purifier, coup, standard_normal
from coup_lib.sde import VPSDE

GREY, ZEROS = torch.full((6, 1, 8, 8), 0.5, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
EPS = {"Linf": 0.1, "L2": 0.4}
BUDGET = {"n_iter": 9, "eot": 4, "seed": 1}


def pattern(seed=0):
    """(8, 8), in which way the model's margin grows."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Noisy(nn.Module):
    """Margin of class 1 over class 0: slope·(x - 1/2) - guard + noise·z, z standard normal, one an image."""

    def __init__(self, slope, guard=0.0, noise=1.0):
        super().__init__()
        self.slope, self.guard, self.noise, self.seen = slope, guard, noise, []
        self.generator = torch.Generator().manual_seed(0)
        self.eval()

    def forward(self, x):
        z = torch.randn(len(x), generator=self.generator, dtype=x.dtype)
        margin = ((x - 0.5) * self.slope).flatten(1).sum(1) - self.guard + self.noise * z
        self.seen.append((x.detach().clone(), margin.detach()))
        return torch.stack([torch.zeros_like(margin), margin], 1)


def attack(name, norm="Linf", **changes):
    return Attack(name, norm, **{"eps": EPS[norm]} | BUDGET | changes)


# --- kept and worst-draw ---


def test_what_is_kept_has_the_fewest_right_draws_and_of_equal_ones_the_highest_margin():
    kept, places = Kept(torch.zeros(3, 1, 1, 1)), torch.arange(3)
    offered = ([0.5, 1.0, 1.0], [0.0, 0.0, 0.0]), ([0.5, 1.0, 0.0], [1.0, -1.0, -9.0]), ([1.0] * 3, [9.0] * 3)
    for point, (right, margin) in enumerate(offered, start=1):
        x = torch.full((3, 1, 1, 1), float(point))
        kept.offer(places, x, torch.tensor(right), torch.tensor(margin))
    assert kept.x.flatten().tolist() == [2, 3, 2]
    assert kept.right.tolist() == [0.5, 1, 0] and kept.margin.tolist() == [1, 9, -9]
    kept.offer(torch.tensor([1]), torch.full((1, 1, 1, 1), 7.0), torch.tensor([0.0]), torch.tensor([0.0]))
    assert kept.x.flatten().tolist() == [2, 7, 2]


@pytest.mark.parametrize("norm", EPS)
def test_kept_is_the_best_point_of_apgd_ces_own_climb(norm):
    """Written out: of what the model was asked, the point that most draws got wrong."""
    models = [Noisy(pattern(), guard=1.0, noise=3.0) for _ in range(2)]
    by_name = zip(("apgd-ce", "kept"), models, strict=True)
    ce, kept = (attack(name, norm)(model, GREY, ZEROS) for name, model in by_name)
    # Without the clean draw and the verdict:
    climbs = [torch.stack([x for x, _ in model.seen[1:-1]]) for model in models]
    assert torch.equal(*climbs) and climbs[0].shape == (10, 4 * 6, 1, 8, 8)
    points = climbs[1].unflatten(1, (4, 6))[:, 0]
    margins = torch.stack([margin for _, margin in models[1].seen[1:-1]]).unflatten(1, (4, 6))
    rank = (margins <= 0).double().mean(1) - 1e-6 * margins.mean(1)  # (points, images)
    best = points[rank.argmin(0), torch.arange(6)]
    assert torch.equal(kept.x_adv, best) and (norm == "Linf" or not torch.equal(ce.x_adv, best))


def test_with_many_draws_kept_is_the_point_that_is_wrong_most_often():
    """Of a linear margin with known noise: the corner, right with probability Φ((guard - gain) / noise)."""
    slope, n = pattern(), 4000
    gain, noise = float(0.1 * slope.abs().sum()), 5.0
    model = Noisy(slope, guard=gain - 1.0, noise=noise)
    found = attack("kept", eot=n, n_iter=5)(model, GREY[:1], ZEROS[:1])
    torch.testing.assert_close(found.x_adv, GREY[:1] + 0.1 * slope.sign())
    right = 0.5 * (1 + math.erf(-1.0 / noise / math.sqrt(2)))
    shares = [
        float((margin <= 0).double().mean())
        for x, margin in model.seen
        if len(x) > 1 and torch.equal(x[:1], found.x_adv)
    ]
    assert shares and all(abs(share - right) < 4 * (right * (1 - right) / 640) ** 0.5 for share in shares)


class Once(nn.Module):
    """Right but in one draw: of the first image, when it is asked for the third gradient."""

    def __init__(self):
        super().__init__()
        self.asked, self.lost = 0, None
        self.eval()

    def forward(self, x):
        wrong = torch.zeros(len(x), dtype=x.dtype)
        if x.requires_grad:
            self.asked += 1
            if self.asked == 3:
                wrong[6], self.lost = 10.0, x.detach()[0].clone()  # in the second of its four draws
        tilt = 0.01 * x.flatten(1).sum(1)
        return torch.stack([torch.ones_like(wrong), tilt - 1 + wrong], 1)


def test_an_image_is_lost_by_the_worst_draw_once_any_draw_at_any_point_is_wrong():
    model = Once()
    found = attack("worst-draw")(model, GREY, ZEROS)
    assert found.robust.tolist() == found.judged.tolist() == [False] + [True] * 5
    assert torch.equal(found.x_adv[0], model.lost)
    assert torch.equal(attack("kept")(Once(), GREY, ZEROS).x_adv, found.x_adv)
    assert attack("kept")(Once(), GREY, ZEROS).robust.all()  # one draw of the kept image is right


@pytest.mark.parametrize("name", ["kept", "worst-draw", "em"])
def test_a_model_without_noise_is_told_of(name):
    told = attack(name)(Noisy(pattern(), noise=0.0), GREY, ZEROS).warnings
    assert sum("draws are all alike, so that one would do" in text for text in told) == 1
    for model, eot in ((Noisy(pattern(), noise=0.0), 1), (Noisy(pattern()), 4)):
        assert not any("alike" in text for text in attack(name, eot=eot)(model, GREY, ZEROS).warnings)


# --- em ---


@pytest.mark.parametrize("norm", EPS)
def test_draws_weigh_as_much_as_a_common_step_is_expected_to_break_them(norm):
    """Two draws go one way, a third the other way; every weight is a sigmoid, in closed form."""
    way, eps = steepest(pattern().expand(1, 1, 8, 8), norm), EPS[norm]
    gradients = torch.stack([way, way, -way])
    losses = torch.tensor([[-1.0], [-3.0], [-1.0]], dtype=torch.float64)
    gain = eps * float((way * steepest(way, norm)).sum())
    sigmoid = 1 / (1 + torch.exp(-(losses + gain * torch.tensor([[1.0], [1.0], [-1.0]]))))
    weights = selected(losses, gradients, norm, eps)
    torch.testing.assert_close(weights, sigmoid / sigmoid.sum())
    alike = selected(torch.zeros(3, 1, dtype=torch.float64), way.expand(3, 1, 1, 8, 8), norm, eps)
    torch.testing.assert_close(alike, torch.full_like(alike, 1 / 3))


class Dilemma(nn.Module):
    """Half of the draws can be broken; the other half, which cannot, pull harder, and the other way."""

    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        gain = (x - 0.5).flatten(1).mean(1)  # at most eps
        even = torch.arange(len(x)) // 6 % 2 == 0
        margin = torch.where(even, 20 * gain - 1, -60 * gain - 50)
        return torch.stack([torch.zeros_like(margin), margin], 1)


def test_em_breaks_the_draws_that_the_mean_gradient_would_save():
    """They break beyond a gain of 1/20; the mean gradient goes to the least gain in the ball."""
    em, mean = (attack(name)(Dilemma(), GREY, ZEROS).x_adv - GREY for name in ("em", "apgd-margin"))
    assert (em.flatten(1).mean(1) > 1 / 20).all()
    torch.testing.assert_close(mean, torch.full_like(GREY, -0.1))


def test_em_spends_its_iterations_on_three_losses_and_on_images_that_are_still_right():
    class Three(Noisy):
        def forward(self, x):
            logits = super().forward(x)
            return torch.cat([logits, logits[:, :1] - 5], 1)

    model = Three(pattern(), guard=1e3)
    attack("em")(model, GREY, ZEROS)
    gradients = [len(x) for x, _ in model.seen[1:-1]]
    assert gradients == [4 * 6] * 3 * (1 + 3)  # three climbs, each a start and a third of nine iterations
    slope = pattern()
    model = Three(slope, guard=0.05 * float(slope.abs().sum()), noise=0.0)
    assert not attack("em")(model, GREY, ZEROS).judged.any()
    assert [len(x) for x, _ in model.seen[1:-1]] == [4 * 6] * (1 + 3)  # all were lost on the first climb


# --- low frequencies ---


def cosine(k, size):
    return torch.cos(torch.pi * k * (torch.arange(size, dtype=torch.float64) + 0.5) / size)


def test_low_cosines_stay_and_high_ones_go():
    rows, columns = 8, 6
    for k in range(rows):
        for j in range(columns):
            wave = (cosine(k, rows)[:, None] * cosine(j, columns)).expand(2, 3, rows, columns)
            left = wave if k < LOW * rows and j < LOW * columns else torch.zeros_like(wave)
            torch.testing.assert_close(low_frequencies(wave), left, atol=1e-12, rtol=0)
    x = pattern().expand(1, 1, 8, 8)
    torch.testing.assert_close(low_frequencies(low_frequencies(x)), low_frequencies(x))
    assert torch.equal(low_frequencies(x[..., :1, :1]), x[..., :1, :1])


@pytest.mark.parametrize("norm", EPS)
def test_a_linear_models_low_frequency_attack_is_its_gradients_low_part(norm):
    slope = pattern().expand(1, 1, 8, 8)
    found = attack("low-frequency", norm, n_iter=20)(Noisy(pattern(), noise=0.0), GREY, ZEROS)
    expected = EPS[norm] * steepest(low_frequencies(slope), norm)
    torch.testing.assert_close(found.x_adv, GREY + expected, atol=1e-4, rtol=0)


def test_images_of_one_pixel_have_no_high_frequencies():
    x = torch.full((2, 3, 1, 1), 0.5, dtype=torch.float64)
    told = attack("low-frequency")(Noisy(torch.ones(1, 1).double()), x, ZEROS[:2]).warnings
    assert any("no high frequencies to leave out" in text for text in told)


# --- per-step losses ---


class Pull(nn.Module):
    """The score of a normal distribution: s(x, t) = -3 x."""

    def forward(self, x, t):
        return -3 * x


@pytest.mark.parametrize("kind", [Purifier, DiffPurePurifier])
def test_a_linear_paths_deviation_and_its_gradient_are_the_closed_form(kind):
    """Two Euler steps written out: every state is a x + b of the image x in [-1, 1]."""
    x = small_problem()[2]
    purifier, seeds = kind(Pull(), t_star=0.1, n_steps=2, seed=7), torch.Generator().manual_seed(7)
    noise = standard_normal(torch.randint(2**62, (5,), generator=seeds), 3, x)
    sde, times = VPSDE(), purifier.times
    mean, std = sde.discrete_marginal(0.1) if kind is DiffPurePurifier else (1.0, 0.0)
    a, b, away, slope = mean, std * noise[0], 0.0, 0.0
    for step in range(2):
        beta, dt = sde.beta(times[step]), times[step] - times[step + 1]
        factor = 1 + beta * dt / 2 - 3 * beta * dt
        a, b = a * factor, b * factor + (beta * dt).sqrt() * noise[step + 1]
        left = a - sde.mean_coeff(times[step + 1])
        gap = left * (2 * x - 1) + b
        away, slope = away + gap.square().flatten(1).mean(1) / 2, slope + 2 * left * gap * 2 / (4 * 2)
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    nn.init.zeros_(constant[1].weight)
    given = InParts(Purified(constant, purifier), 640), 1, 640, cross_entropy, Kept(x)
    gradient, loss = PerStep(*given).mean_gradient(x, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss, away + cross_entropy(constant(x), torch.zeros(5).long()))
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_a_guided_paths_deviation_is_that_of_its_states(gradient):
    score, classifier, x = small_problem()
    model = coup(classifier, score, n_steps=4, guidance_weight=0.5, gradient=gradient)
    means, found, slopes = model.purifier.sde.mean_coeff(model.purifier.times), [], []

    def look(index, t, state):
        if index:
            found.append((state - means[index] * (2 * at - 1)).square().flatten(1).mean(1))

    at = x.clone().requires_grad_()
    model.purifier.reseed(3)
    purified = model.purifier.trajectory(at, look)
    slopes.append(torch.autograd.grad(sum(found).sum() / 4 + purified.square().sum(), at)[0])
    model.purifier.reseed(3)
    same, away = deviation(model.purifier, at)
    torch.testing.assert_close(same, purified)
    torch.testing.assert_close(away, sum(found) / 4)
    slopes.append(torch.autograd.grad(away.sum() + same.square().sum(), at)[0])
    assert torch.allclose(*slopes) == (gradient == "exact")


def test_per_step_stays_in_the_ball_and_is_refused_where_no_states_are_shown():
    score, classifier, x = small_problem()
    model, y = coup(classifier, score, n_steps=2), torch.zeros(5, dtype=torch.int64)
    found = attack("per-step", eot=2, n_iter=3)(model, x, y)
    assert float((found.x_adv - x).abs().max()) <= 0.1 + 1e-12 and not torch.equal(found.x_adv, x)
    for hidden in (classifier.eval(), FixedNoise(model, 0)):
        with pytest.raises(ValueError, match=r"per-step: expected a purify.Purified around one .*; got"):
            attack("per-step")(hidden, x, y)
    model = coup(classifier, score, n_steps=2, gradient="bpda")
    with pytest.raises(ValueError, match=r"per-step: expected .* exact or first_order; got bpda"):
        attack("per-step")(model, x, y)
