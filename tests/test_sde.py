"""The VP-SDE against closed forms and against numbers of the published code (tests/parity)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from coup_lib.sde import VPSDE

PUBLISHED = np.load(Path(__file__).parent / "parity" / "vpsde_closed_forms.npz")
T = torch.linspace(0.001, 1, 50, dtype=torch.float64)


def test_gamma_is_half_the_integral_of_beta():
    sde = VPSDE()
    for t in (0.0, 0.075, 0.1, 1.0):
        grid = torch.linspace(0, t, 2001, dtype=torch.float64)
        integral = torch.trapezoid(sde.beta(grid), grid) / 2
        assert sde.gamma(torch.tensor(t, dtype=torch.float64)) == pytest.approx(float(integral), abs=1e-12)


def test_the_papers_gamma():
    gamma = VPSDE().gamma(torch.tensor([0.1, 0.075], dtype=torch.float64))
    assert gamma.tolist() == pytest.approx([0.05475, 0.03173], abs=5e-6)


def test_marginal_solves_the_moment_equations():
    """d mean/dt = -β mean/2 and d var/dt = β(1 - var), by central differences."""
    sde, h = VPSDE(), 1e-6
    slope = (sde.mean_coeff(T + h) - sde.mean_coeff(T - h)) / (2 * h)
    torch.testing.assert_close(slope, -sde.beta(T) / 2 * sde.mean_coeff(T), rtol=1e-7, atol=1e-9)
    slope = (sde.std(T + h) ** 2 - sde.std(T - h) ** 2) / (2 * h)
    torch.testing.assert_close(slope, sde.beta(T) * (1 - sde.std(T) ** 2), rtol=1e-7, atol=1e-9)


def test_std_keeps_its_digits_in_float32():
    exact = VPSDE().std(torch.tensor(1e-5, dtype=torch.float64))
    assert float(VPSDE().std(torch.tensor(1e-5))) == pytest.approx(float(exact), rel=1e-6)


def test_drift_and_diffusion_of_eq_6():
    sde, t = VPSDE(), torch.tensor([0.1, 0.5], dtype=torch.float64)
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    beta = torch.tensor([0.1 + 0.1 * 19.9, 0.1 + 0.5 * 19.9], dtype=torch.float64)
    torch.testing.assert_close(sde.drift(x, t), -beta.view(2, 1, 1, 1) * x / 2)
    torch.testing.assert_close(sde.diffusion(t), beta.sqrt())


def test_parity_with_diffpures_discrete_forward_noise():
    for steps, expected in zip(
        PUBLISHED["diffpure_forward_steps"], PUBLISHED["diffpure_forward_coef"], strict=True
    ):
        assert VPSDE().discrete_marginal(steps / 1000) == pytest.approx(tuple(expected), rel=1e-4)


def test_noised_has_the_marginal_moments():
    sde, n = VPSDE(), 200_000
    generator = torch.Generator().manual_seed(0)
    x, t = torch.full((n, 1), 0.7, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    sample = sde.noised(x, t, torch.randn(n, 1, generator=generator, dtype=torch.float64))
    tolerance = 4 * float(sde.std(t)) / math.sqrt(n)
    assert float(sample.mean()) == pytest.approx(0.7 * float(sde.mean_coeff(t)), abs=tolerance)
    assert float(sample.std()) == pytest.approx(float(sde.std(t)), rel=0.01)
