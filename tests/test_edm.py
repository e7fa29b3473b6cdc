"""EDM's denoiser against the published one (tests/parity); scores as denoisers and the other way round."""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from parity_fixtures import digest, manifest, off, published, seeded
from torch import Tensor, nn

from coup_lib.networks.checkpoints import CheckpointError
from coup_lib.networks.ddpmpp import DDPMpp
from coup_lib.networks.edm import Denoiser, edm_cifar, load_edm
from coup_lib.score import DenoisedScore, ScoreDenoiser
from coup_lib.sde import VPSDE, per_image

TIGHT = 1e-5  # relative L2
# The fixtures' weights: drawn with this seed, of this digest over the raw bytes in the order of the keys.
WEIGHT_SEED, WEIGHT_SHA256 = 1700, "c637451b1797a41b4881a25b1157373b0dee0feb5a52fbfe3175f6c907af234d"


def described(start: str) -> dict[str, Any]:
    """The published model whose description starts so."""
    models = manifest("edm_manifests")["models"]
    (found,) = (model for description, model in models.items() if description.startswith(start))
    return found


@cache
def weights() -> dict[str, Tensor]:
    """The weights that the fixtures were made with."""
    return seeded([(key, shape) for key, shape, *_ in described("reduced edm")["keys"]], WEIGHT_SEED)


def fresh() -> Denoiser:
    return Denoiser(DDPMpp(width=16, multipliers=(2, 2, 2), blocks=1))


def reduced(dtype: torch.dtype = torch.float32) -> Denoiser:
    return load_edm(fresh(), weights()).to(dtype)


def random_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@pytest.mark.parametrize(
    ("start", "build"),
    [("EDMPrecond", edm_cifar), ("VPPrecond", edm_cifar), ("reduced edm", fresh), ("reduced vp", fresh)],
)
def test_every_published_key_has_its_place(start, build):
    """With the number of parameters, and its shape: one more, one less or another is refused."""
    rows = described(start)["keys"]
    with torch.device("meta"):
        load_edm(denoiser := build(), {key: torch.empty(shape) for key, shape, *_ in rows})
    augmentation = sum(int(np.prod(shape)) for key, shape, *_ in rows if "map_augment" in key)
    ours = sum(p.numel() for p in denoiser.parameters())
    assert ours == described(start)["n_parameters"] - augmentation


def test_the_weights_are_those_of_the_fixtures():
    assert digest(weights()) == WEIGHT_SHA256


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_network(name):
    theirs = published(f"edm_reduced_{name}_io")
    assert off(reduced().model(theirs["raw_x"], theirs["raw_c_noise"]), theirs["raw_F"]) < TIGHT


def test_denoised():
    """Also of what is taken away: at σ = 0.01 it is 1 % of x, and has all the network's part in it."""
    theirs, denoiser = published("edm_reduced_edm_io"), reduced()
    x, denoised = theirs["x_noisy"], theirs["denoised"]
    ours = denoiser(x, theirs["sigma"])
    for at, sigma in enumerate(theirs["sigma"]):
        assert off(ours[at], denoised[at]) < TIGHT
        assert off(ours[at] - x[at], denoised[at] - x[at]) < 1e-4
        torch.testing.assert_close(denoiser(x[at : at + 1], sigma)[0], ours[at], rtol=1e-5, atol=1e-5)


def test_sigma_and_time_of_the_vp_sde():
    """Upstream's formulas cancel in float32: 1 is added to σ², and taken away again."""
    theirs, sde = {key: value.double() for key, value in published("edm_reduced_vp_io").items()}, VPSDE()
    sigma = sde.std(theirs["t"]) / sde.mean_coeff(theirs["t"])
    lost = 1e-7 / sigma**2 + 1e-6
    assert ((theirs["sigma_of_t"] / sigma - 1).abs() < lost).all()
    t = sde.time_at(theirs["sigma_of_t"])
    assert ((theirs["t_of_sigma"] / t - 1).abs() < lost).all()


def test_double_precision():
    """In float64 the same function, nearer to it than float32 is."""
    theirs, denoiser = published("edm_reduced_edm_io"), reduced(torch.float64)
    ours = denoiser(theirs["x_noisy"].double(), theirs["sigma"].double())
    assert ours.dtype == torch.float64
    assert off(ours, theirs["denoised"]) < TIGHT


def test_first_and_second_derivative():
    """A vector-Jacobian and a Hessian-vector product of a frozen denoiser, by central differences."""
    denoiser = reduced(torch.float64)
    x, sigma = (
        published("edm_reduced_edm_io")["x_noisy"][2:].double(),
        torch.tensor([0.34, 1.0], dtype=torch.float64),
    )
    v, direction, h = random_like(x, 1), random_like(x, 2), 1e-5
    ahead, behind = (x + step * direction for step in (h, -h))

    def objective(x: Tensor) -> Tensor:
        return (denoiser(x, sigma) * v).sum()

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x if create_graph else x.detach().requires_grad_()
        return torch.autograd.grad(objective(x), x, create_graph=create_graph)[0]

    slope = (objective(ahead) - objective(behind)) / (2 * h)
    assert float(slope) == pytest.approx(float((gradient(x) * direction).sum()), rel=1e-7)
    x.requires_grad_()
    (exact,) = torch.autograd.grad(gradient(x, create_graph=True), x, direction)
    assert off((gradient(ahead) - gradient(behind)) / (2 * h), exact) < 1e-7


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        ((2, 1, 32, 32), (2,), "expected x (B, 3, 32, 32) and labels (B,); got (2, 1, 32, 32) and (2,)"),
        ((2, 3, 32, 32), (3,), "expected sigma () or (2,), one per image; got (3,)"),
        ((2, 3, 32, 32), (2, 1, 1, 1), "expected sigma () or (2,), one per image; got (2, 1, 1, 1)"),
    ],
)
def test_wrong_inputs(x, sigma, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fresh()(torch.zeros(x), torch.ones(sigma))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_prefixes_come_off(prefix):
    state = {prefix + key.removeprefix("model."): value for key, value in weights().items()}
    denoiser, expected = fresh(), load_edm(fresh(), weights()).state_dict()
    assert load_edm(denoiser, state) is denoiser
    assert all(torch.equal(value, expected[key]) for key, value in denoiser.state_dict().items())
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())


def test_weights_for_augmentations_change_nothing():
    theirs = published("edm_reduced_edm_io")
    denoiser = load_edm(fresh(), {"model.map_augment.weight": torch.ones(16, 9), **weights()})
    arguments = theirs["x_noisy"], theirs["sigma"]
    assert torch.equal(denoiser(*arguments), reduced()(*arguments))


QKV = "model.enc.16x16_block0.qkv.weight"
FILTER = "model.dec.32x32_up.skip.resample_filter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {QKV: None},
            r"^a\.pt does not fit DDPMpp at 3 names, such as .*NIN_0\.W: .*\(32, 32\), got nothing",
        ),
        (
            {"model.map_label.weight": torch.ones(16, 10)},
            r"map_label\.weight: expected nothing, .*\(16, 10\)",
        ),
        ({QKV: torch.ones(64, 32, 1, 1)}, r"NIN_0\.W: expected .*\(32, 32\), got .*\(32, 22\)"),
        ({QKV: "spoilt"}, r"qkv\.weight: expected nothing, got a str"),
        ({FILTER: torch.ones(1, 1, 4, 4)}, r"filter: expected .*\(1, 1, 2, 2\), got .*\(1, 1, 4, 4\)"),
    ],
    ids=["missing", "of a conditional network", "of another shape", "of no tensor", "of NCSN++"],
)
def test_a_spoilt_checkpoint_is_refused_and_changes_nothing(change, message):
    state = {key: value for key, value in (weights() | change).items() if value is not None}
    denoiser = fresh()
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_edm(denoiser, state, "a.pt")
    assert all(torch.equal(value, before[key]) for key, value in denoiser.state_dict().items())


class GaussianScore(nn.Module):
    """The score of images whose pixels are N(mean, variance), carried through the VP-SDE: t () or (B,)."""

    mean, variance, sde = 0.3, 0.2, VPSDE()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m, std = per_image(self.sde.mean_coeff(t), x), per_image(self.sde.std(t), x)
        return (m * self.mean - x) / (m**2 * self.variance + std**2)


class GaussianDenoiser(nn.Module):
    """E[image | image + σ noise = x] for the same images."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        noise, variance = per_image(sigma, x) ** 2, GaussianScore.variance
        return (variance * x + noise * GaussianScore.mean) / (variance + noise)


class Wavy(nn.Module):
    """A score or a denoiser of no particular images: another function for every level."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return torch.sin(3 * x) + per_image(level, x)


X = random_like(torch.empty(4, 3, 2, 2, dtype=torch.float64), 0)
LEVELS = [torch.tensor([1e-3, 0.01, 0.1, 1.0], dtype=torch.float64), torch.tensor(0.07, dtype=torch.float64)]
at_levels = pytest.mark.parametrize("level", LEVELS, ids=["per image", "for all"])


@at_levels
def test_denoiser_of_a_gaussian_score(level):
    torch.testing.assert_close(ScoreDenoiser(GaussianScore())(X, 5 * level), GaussianDenoiser()(X, 5 * level))


@at_levels
def test_score_of_a_gaussian_denoiser(level):
    score = DenoisedScore(GaussianDenoiser())(X, level)
    torch.testing.assert_close(score, GaussianScore()(X, level), rtol=1e-9, atol=1e-9)


@at_levels
@pytest.mark.parametrize("sde", [VPSDE(), VPSDE(0.2, 5.0)], ids=["usual", "other"])
def test_the_two_are_inverse_to_each_other(level, sde):
    as_score = DenoisedScore(ScoreDenoiser(Wavy(), sde), sde)
    torch.testing.assert_close(as_score(X, level), Wavy()(X, level), rtol=1e-9, atol=1e-9)
    as_denoiser = ScoreDenoiser(DenoisedScore(Wavy(), sde), sde)
    torch.testing.assert_close(as_denoiser(X, level), Wavy()(X, level), rtol=1e-9, atol=1e-9)


def test_a_denoiser_of_edm_becomes_a_score():
    """At its own σ the two say the same: the network meets the image it was published with."""
    theirs, sde = published("edm_reduced_edm_io"), VPSDE()
    t = sde.time_at(theirs["sigma"])
    m, std = (per_image(value, theirs["x_noisy"]) for value in (sde.mean_coeff(t), sde.std(t)))
    score = DenoisedScore(reduced())(m * theirs["x_noisy"], t)
    assert off(score, m * (theirs["denoised"] - theirs["x_noisy"]) / std**2) < 1e-4


TIMES = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 61)]).double()


@pytest.mark.parametrize("sde", [VPSDE(), VPSDE(0.2, 5.0), VPSDE(3.0, 3.0)], ids=repr)
def test_time_at_is_the_inverse_of_std_over_mean(sde):
    sigma = sde.std(TIMES) / sde.mean_coeff(TIMES)
    torch.testing.assert_close(sde.time_at(sigma), TIMES, rtol=1e-14, atol=0)
    assert sde.time_at(sigma[5]).shape == ()


def test_time_at_keeps_its_digits_in_float32():
    sigma = (VPSDE().std(TIMES) / VPSDE().mean_coeff(TIMES)).float()
    exact = VPSDE().time_at(sigma.double())
    torch.testing.assert_close(VPSDE().time_at(sigma).double(), exact, rtol=4e-7, atol=0)
