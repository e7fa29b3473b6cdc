"""The two-Gaussian study against autograd, closed forms and an integration of the density."""

import math
from dataclasses import replace

import pytest
import torch

from coup_lib.studies import toy, toy_figures
from coup_lib.studies.toy import DTYPE, ToySettings, TwoGaussians

DATA = TwoGaussians()
SETTINGS = ToySettings(n_runs=2000, lambdas="0,2,10", noise_levels="0,1,10")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=DTYPE)


def log_density(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    mean = DATA.sde.mean_coeff(t) * DATA.mean
    logs = torch.stack([-0.5 * (x + mean) ** 2, -0.5 * (x - mean) ** 2])
    return logs.logsumexp(0) - math.log(2 * math.sqrt(2 * math.pi))


def drift(x: torch.Tensor, t: torch.Tensor, lam: float, c: float) -> torch.Tensor:
    ascent = DATA.score(x, t) + lam * DATA.guidance(x, scalar(c))[0]
    return DATA.reverse_drift(x, t, ascent)


def counts(**changes: object) -> dict:
    return toy.label_flips(DATA, replace(SETTINGS, **changes))


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0])
def test_score_is_the_gradient_of_the_log_density(t: float) -> None:
    x = torch.linspace(-4, 4, 101, dtype=DTYPE, requires_grad=True)
    (expected,) = torch.autograd.grad(log_density(x, scalar(t)).sum(), x)
    torch.testing.assert_close(DATA.score(x.detach(), scalar(t)), expected)


@pytest.mark.parametrize("c", [0.0, 1.0, 20.0])
def test_guidance_is_the_gradient_of_the_log_confidence(c: float) -> None:
    x = torch.linspace(-2, 2, 4000, dtype=DTYPE, requires_grad=True)
    p = DATA.confidence(x, scalar(c))
    (expected,) = torch.autograd.grad(torch.maximum(p, 1 - p).log().sum(), x)
    found, outside = DATA.guidance(x.detach(), scalar(c))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(outside, (p <= 0) | (p >= 1))
    assert bool(outside.any()) == (c == 20)


def test_the_true_classifier_is_a_sigmoid() -> None:
    x = torch.linspace(-3, 3, 50, dtype=DTYPE)  # the log odds of N(±½, 1) are x
    torch.testing.assert_close(DATA.confidence(x, scalar(0)), torch.sigmoid(x))


def test_drift_without_guidance_and_its_slope() -> None:
    x = torch.linspace(-3, 3, 50, dtype=DTYPE, requires_grad=True)
    t = scalar(0.1)
    unguided = drift(x, t, 0, 0)
    torch.testing.assert_close(unguided, DATA.sde.beta(t) * (x / 2 + DATA.score(x, t)))
    (slope,) = torch.autograd.grad(unguided.sum(), x)
    torch.testing.assert_close(DATA.unguided_slope(x.detach(), t), slope)


def test_one_gaussian_has_the_closed_form() -> None:
    """With both means at 0 the reverse SDE is dx = -βx/2 dτ + √β dw: x(0) ~ N(m x0, 1 - m²)."""
    settings = ToySettings(n_runs=40_000, lambdas="0", noise_levels="0")
    final = toy.simulate(TwoGaussians(mean=0.0), settings, toy.wiener_noise(40_000, 100, 0)).final[0, 0]
    t_star = scalar(settings.t_star)
    mean, std = float(DATA.sde.mean_coeff(t_star)) * settings.x0, float(DATA.sde.std(t_star))
    assert final.mean().item() == pytest.approx(mean, abs=4 * std / 200)
    assert final.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(80_000) + 1e-3)
    flip = 0.5 * math.erfc(mean / std / math.sqrt(2))
    assert (final < 0).double().mean().item() == pytest.approx(flip, abs=4 * 0.5 / 200)


def integrated_probabilities(lam: float, c: float) -> tuple[float, float]:
    """P(x < 0 at the end) and P(x < 0 at some step) of the Euler chain, by integrating its density."""
    h = 0.01
    x = (torch.arange(-250, 250, dtype=DTYPE) + 0.5) * h
    dt = SETTINGS.step
    anywhere = survivors = None
    for t in toy.time_grid(SETTINGS.t_star, SETTINGS.n_steps):
        std = float(DATA.sde.diffusion(t)) * math.sqrt(dt)

        def step(start: torch.Tensor, t: torch.Tensor = t, std: float = std) -> torch.Tensor:
            mean = start + dt * drift(start, t, lam, c)
            edges = torch.cat([x - h / 2, x[-1:] + h / 2])
            return torch.special.ndtr((edges - mean[:, None]) / std).diff(dim=-1)

        if anywhere is None:
            anywhere = survivors = step(scalar(SETTINGS.x0)[None])[0]
        else:
            kernel = step(x)
            anywhere, survivors = anywhere @ kernel, survivors @ kernel
        survivors = survivors * (x > 0)
    return float(anywhere[x < 0].sum()), 1 - float(survivors.sum())


@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_flip_probabilities_against_an_integration_of_the_density(lam: float) -> None:
    settings = ToySettings(n_runs=20_000, lambdas="0,2", noise_levels="0")
    paths = toy.simulate(DATA, settings, toy.wiener_noise(20_000, 100, 1))
    column = settings.weights.index(lam)
    final, crossed = integrated_probabilities(lam, 0.0)
    tolerance = 4 * 0.5 / math.sqrt(20_000)
    assert paths.flipped[0, column].double().mean().item() == pytest.approx(final, abs=tolerance)
    assert paths.crossed[0, column].double().mean().item() == pytest.approx(crossed, abs=tolerance)


def test_weight_zero_is_no_guidance_whatever_the_classifier() -> None:
    paths = toy.simulate(DATA, SETTINGS, toy.wiener_noise(300, 100, 0))
    assert torch.equal(paths.final[0, 0], paths.final[-1, 0])
    dt, x = SETTINGS.step, torch.full((300,), SETTINGS.x0, dtype=DTYPE)
    for t, z in zip(toy.time_grid(0.1, 100), toy.wiener_noise(300, 100, 0), strict=True):
        x = x + DATA.sde.beta(t) * (x / 2 + DATA.score(x, t)) * dt + (DATA.sde.beta(t) * dt).sqrt() * z
    torch.testing.assert_close(paths.final[0, 0], x, rtol=1e-12, atol=1e-12)


def test_same_seed_same_counts_and_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    first = counts()
    assert torch.equal(before, torch.get_rng_state())  # a generator of its own
    monkeypatch.setattr(toy, "CHUNK_ELEMENTS", 1000)
    assert counts() == first
    assert counts(seed=1) != first


def test_true_guidance_never_causes_a_crossing_and_noise_does() -> None:
    result = counts()
    assert result["crossed_harmed"][0] == [0, 0, 0]
    assert result["crossed"][0] == sorted(result["crossed"][0], reverse=True)
    assert result["crossed_harmed"][2][-1] > result["crossed_saved"][2][-1]
    for key in ("flipped", "crossed"):
        for level, row in enumerate(result[key]):
            saved, harmed = result[f"{key}_saved"][level], result[f"{key}_harmed"][level]
            assert row == [row[0] - s + h for s, h in zip(saved, harmed, strict=True)]


def test_runs_that_are_not_finite_are_neither_flips_nor_not() -> None:
    nan, one = scalar(math.nan), scalar(1.0)
    paths = toy.Paths(torch.stack([nan, -one, one]), torch.stack([-one, -one, one]), torch.zeros(3).bool())
    assert paths.finite.tolist() == [False, True, True]
    assert paths.flipped.tolist() == paths.crossed.tolist() == [False, True, False]
    result = {"n_runs": 3, "not_finite": [[1]], "flipped": [[1]]}
    assert toy_figures.shares(result, "flipped", 0)[0].value == 0.5


def test_prop1_hypotheses() -> None:
    found = toy.prop1_hypotheses(DATA, SETTINGS)
    assert found["push_share"][0] == 1 and found["push_share"][1] < 1
    assert found["slope"][1] < 0 < found["growth"] < 1


def test_prop2_gamma_noise_and_bound() -> None:
    settings = ToySettings(n_runs=2000, t_stars="0.075,0.1")
    found = toy.prop2_check(DATA, settings)
    assert found["gamma"] == pytest.approx([0.03173, 0.05475], abs=5e-6)
    # ε is a standard normal, up to the Euler grid (1 % at 100 steps) and 4 standard errors.
    assert found["mean_square_eps"] == pytest.approx([1, 1], abs=0.02 + 4 * math.sqrt(2 / 2000))
    assert found["held_printed"] == found["held_rigorous"] == [1, 1]
    assert found["c_p"] == pytest.approx([1, 1], abs=1e-3)  # 2 max sigmoid(-|x|)


def test_prop2_printed_bound_is_not_implied_by_its_assumptions() -> None:
    """dx = β(x/2 + s) dτ with s constant, from 0: x = 2s(e^γ - 1), and C_s = 2s."""
    gamma, c_s = 0.05475, 3.0
    x, n = 0.0, 20_000
    for _ in range(n):  # γ as the clock: dγ = ½β dτ
        x += (x + c_s) * gamma / n
    assert x > toy.prop2_bound(gamma, c_s, 0.0, 0.0, 0.0)
    assert x == pytest.approx(toy.prop2_bound(gamma, c_s, 0.0, 0.0, 0.0, rigorous=True), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_runs": 0},
        {"n_steps": 1.5},
        {"t_star": 1.1},
        {"x0": -0.2},
        {"seed": -1},
        {"guidance_weight": -0.5},
        {"lambdas": "1,2"},
        {"lambdas": "0,a"},
        {"noise_levels": "0,2,1"},
        {"t_stars": "0.1,2"},
    ],
)
def test_settings_refuse_what_makes_no_sense(changes: dict) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}.*expected.*got"):
        ToySettings(**changes)


def test_smoke_cuts_the_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUP_SMOKE", raising=False)
    assert ToySettings().n_runs == 100_000
    monkeypatch.setenv("COUP_SMOKE", "1")
    assert ToySettings().n_runs == toy.SMOKE_RUNS
    assert ToySettings(n_runs=50).n_runs == 50


def test_tables_say_what_the_runs_showed() -> None:
    settings = replace(SETTINGS, t_stars="0.1")
    flips, hypotheses = counts(), toy.prop1_hypotheses(DATA, settings)
    table = toy_figures.flip_table(flips)
    assert table["Ever below 0: rarer with guidance"]["0"] == "holds"
    assert table["Ever below 0: rarer with guidance"]["10"] == "does not hold"
    share = 100 * flips["flipped"][0][0] / SETTINGS.n_runs
    assert table["Final flip, λ = 0"]["0"].startswith(f"{share:.2f} % [")
    assert toy_figures.hypothesis_table(hypotheses)["Verdict"].tolist() == ["does not hold", "holds"]
    crossings = toy_figures.crossing_table(flips, hypotheses)
    assert crossings["Eq. 7, path by path"].tolist() == ["holds", "does not hold", "does not hold"]
    assert crossings["λ = 10"]["0"] == f"{flips['crossed_saved'][0][2]:,} / 0"
    bound = toy_figures.prop2_table(toy.prop2_check(DATA, settings))
    assert bound.index.tolist() == ["0.1"] and bound["Runs within Eq. 8"].tolist() == ["100.00%"]
