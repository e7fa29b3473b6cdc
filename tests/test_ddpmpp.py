"""DDPM++ against the published network: its manifests and its numbers on random weights (tests/parity)."""

import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from parity_fixtures import digest, manifest, off, published, seeded
from torch import Tensor, nn

from coup_lib.networks.checkpoints import CheckpointError, load_score_sde
from coup_lib.networks.ddpmpp import DEEP, DDPMpp, time_embedding
from coup_lib.score import DISCRETE_LEVELS, NoiseScore
from coup_lib.sde import VPSDE
from coup_lib.solver import reverse_drift, solve

REDUCED = partial(DDPMpp, width=16, blocks=1)
TIGHT = 1e-5  # relative L2; GroupNorm with eps 1e-5 in place of 1e-6 gives 5e-5


class PublishedSDE(VPSDE):
    """With the standard deviation as score_sde computes it, which loses digits in float32 near t = 0."""

    def std(self, t: Tensor) -> Tensor:
        # exp rounded once: of the last digit, which processors may round differently, 3 % of the std hang.
        return torch.sqrt(1 - torch.exp(-2 * self.gamma(t).double()).to(t.dtype))


def recipe(name: str, seed: int) -> dict[str, Tensor]:
    """The weights of the network of this size."""
    rows = manifest(f"ddpmpp_{name}_manifest")["keys"]
    return seeded([(row["key"], row["shape"]) for row in rows if row["kind"] == "parameter"], seed)


def with_weights(network: DDPMpp, weights: dict[str, Tensor]) -> DDPMpp:
    network.load_state_dict(weights | {"sigmas": network.sigmas})
    return network.eval().requires_grad_(False)


def reduced(dtype: torch.dtype = torch.float32) -> DDPMpp:
    return with_weights(REDUCED(), recipe("nf16", published("ddpmpp_nf16_io")["weight_seed"])).to(dtype)


def score_of(network: DDPMpp, sde: VPSDE) -> NoiseScore:
    return NoiseScore(network, sde, time_scale=DISCRETE_LEVELS)


@pytest.mark.parametrize(
    ("name", "build"), [("deep", DEEP), ("shallow", partial(DDPMpp, blocks=4)), ("nf16", REDUCED)]
)
def test_keys_shapes_and_order_are_the_published_ones(name, build):
    with torch.device("meta"):
        network = build()
    theirs = manifest(f"ddpmpp_{name}_manifest")
    rows = theirs["keys"]
    ours = [(key, list(value.shape), f"{value.dtype}") for key, value in network.state_dict().items()]
    assert ours == [(row["key"], row["shape"], f"torch.{row['dtype']}") for row in rows]
    averaged = {row["ema_index"]: row["key"] for row in rows if row["kind"] == "parameter"}
    assert dict(enumerate(key for key, _ in network.named_parameters())) == averaged
    assert sum(p.numel() for p in network.parameters()) == theirs["n_parameters"]


def test_sigmas():
    expected, sigmas = manifest("ddpmpp_deep_manifest")["sigmas_buffer"], REDUCED().sigmas
    assert (len(sigmas), sigmas.dtype) == (expected["len"], torch.float64)
    assert sigmas[[0, -1]].tolist() == pytest.approx([expected["first"], expected["last"]], rel=1e-13)


def test_time_embedding():
    theirs = published("ddpmpp_nf16_io")
    for labels, embedding in zip(theirs["labels"], theirs["timestep_embedding"], strict=True):
        torch.testing.assert_close(time_embedding(labels, 16), embedding, rtol=0, atol=1e-6)


def test_output():
    theirs, network = published("ddpmpp_nf16_io"), reduced()
    for labels, output in zip(theirs["labels"], theirs["output"], strict=True):
        assert off(network(theirs["x"], labels), output) < TIGHT


def test_output_in_float64():
    """Nothing but float64's own rounding: the same network, not only a similar one."""
    theirs, network = published("ddpmpp_nf16_io"), reduced(torch.float64)
    for labels, output in zip(theirs["labels"][-2:], theirs["output_float64_last2"], strict=True):
        assert off(network(theirs["x"].double(), labels), output) < 1e-13


def test_score():
    theirs = published("ddpmpp_nf16_io")
    score = score_of(reduced(), PublishedSDE())
    for t, expected in zip(theirs["t"], theirs["score"], strict=True):
        assert off(score(theirs["x"], t), expected) < TIGHT
        if bool((t == t[0]).all()):
            assert off(score(theirs["x"], t[0]), expected) < TIGHT


@pytest.mark.parametrize(("t", "tolerance"), [(1e-5, 7e-3), (1e-3, 2e-4), (1e-2, TIGHT), (0.1, TIGHT)])
def test_score_with_the_accurate_std(t, tolerance):
    """Upstream's std loses digits near t = 0, ours does not: there, and only there, the scores differ."""
    theirs = published("ddpmpp_nf16_io")
    case = [float(row[0]) for row in theirs["t"]].index(float(np.float32(t)))
    score = score_of(reduced(), VPSDE())(theirs["x"], theirs["t"][case])
    assert off(score, theirs["score"][case]) < tolerance
    exact = VPSDE().std(theirs["t"][case].double())[:, None, None, None]
    assert off(score, -theirs["output"][case] / exact) < TIGHT


def test_input_gradient():
    theirs, network = published("ddpmpp_nf16_io"), reduced()
    for t, expected in zip(theirs["grad_x_t"], theirs["grad_x"], strict=True):
        x = theirs["x"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x, t * DISCRETE_LEVELS), x, theirs["grad_v"])
        assert off(gradient, expected) < TIGHT


def test_reverse_drift():
    """DiffPure's f and g, as functions of t' = 1 - t, and the gradient of f; f is minus the reverse drift."""
    theirs, sde = published("reverse_drift_nf16"), PublishedSDE()
    score = score_of(reduced(), sde)
    for t, f, vjp in zip(theirs["t_physical"], theirs["f"], theirs["vjp_f"], strict=True):
        x = theirs["x"].clone().requires_grad_()
        ours = -reverse_drift(score, sde, x, t)
        assert off(ours, f) < TIGHT
        assert off(torch.autograd.grad(ours, x, theirs["vjp_v"])[0], vjp) < TIGHT
    torch.testing.assert_close(sde.diffusion(theirs["t_physical"])[:, None].expand(-1, 2), theirs["g"])


@pytest.mark.parametrize("name", ["diffpure_euler_path_t010_nf16", "diffpure_euler_path_t100_nf16"])
@pytest.mark.parametrize("sde", [PublishedSDE(), VPSDE()], ids=["published std", "accurate std"])
def test_diffpures_purification(name, sde):
    """From the attacked image through forward noise and torchsde's Euler path, on its own float32 grid."""
    theirs, shape = published(name), (2, 3, 32, 32)
    generator = np.random.RandomState(theirs["rng_seed"])
    x = torch.from_numpy(generator.uniform(-1, 1, shape)).float()
    noise = torch.from_numpy(generator.standard_normal((theirs["t_star_steps"] + 1, *shape))).float()
    mean, std = sde.discrete_marginal(theirs["t_star_steps"] / 1000)
    assert off(mean * x + std * noise[0], theirs["x_noised"]) < TIGHT
    times = 1 - theirs["grid"].double()
    purified = solve(score_of(reduced(), sde), sde, theirs["x_noised"], times, noise[1:])
    assert off(purified, theirs["x_purified"]) < TIGHT


def test_the_sdes_closed_forms():
    theirs, sde = published("vpsde_closed_forms"), VPSDE()
    t = theirs["t"].double()
    for ours, name in [
        (sde.drift(torch.ones_like(t), t), "drift_of_ones"),
        (sde.diffusion(t), "diffusion"),
        (sde.mean_coeff(t), "mean_coeff_float64"),
        (sde.mean_coeff(t) ** 2, "alphas_cumprod_cont"),
        (sde.std(t), "std_float64"),
    ]:
        torch.testing.assert_close(ours, theirs[name].double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(PublishedSDE().std(theirs["t"]), theirs["std"], rtol=1e-6, atol=0)


@pytest.mark.skipif(os.environ.get("COUP_SLOW", "") in ("", "0"), reason="full size: set COUP_SLOW=1")
def test_the_full_size_network():
    theirs = published("ddpmpp_deep_seeded_io")
    weights = recipe("deep", theirs["weight_seed"])
    assert digest(weights) == theirs["weights_sha256"]
    x = theirs["x"].clone().requires_grad_()
    score = score_of(with_weights(DEEP(), weights), PublishedSDE())
    output = score.network(x, theirs["labels"])
    assert off(output, theirs["output"]) < TIGHT
    assert off(torch.autograd.grad(output, x, theirs["grad_v"])[0], theirs["grad_x"]) < TIGHT
    with torch.no_grad():
        assert off(score(theirs["x"], theirs["t"]), theirs["score"]) < TIGHT


def test_second_derivative():
    """A Hessian-vector product, exact and by central differences of the gradient."""
    theirs, network = published("ddpmpp_nf16_io"), reduced(torch.float64)
    x, v = theirs["x"][:1].double(), theirs["grad_v"][:1].double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        labels = torch.full((1,), 50.0, dtype=x.dtype)
        return torch.autograd.grad(network(x, labels), x, v, create_graph=create_graph)[0]

    x.requires_grad_()
    (exact,) = torch.autograd.grad(gradient(x, create_graph=True), x, direction)
    h = 1e-5
    ahead, behind = (gradient(x.detach().add(direction, alpha=s).requires_grad_()) for s in (h, -h))
    assert off((ahead - behind) / (2 * h), exact) < 1e-7


def test_dropout_is_for_training_only():
    x, labels = torch.zeros(1, 3, 32, 32), torch.tensor([50.0])
    network = reduced()
    assert torch.equal(network(x, labels), network(x, labels))
    network.train()
    assert not torch.equal(network(x, labels), network(x, labels))


def test_other_sizes():
    network = DDPMpp(width=8, multipliers=(1, 2), blocks=1, attention_at=(8, 4), image_size=8, channels=1)
    assert network(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 99.9])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("sizes", [{"width": 18}, {"image_size": 36}])
def test_sizes_that_cannot_be_split(sizes):
    with pytest.raises(ValueError, match=rf"multiple of.*got.*{next(iter(sizes.values()))}"):
        DDPMpp(blocks=1, **sizes)


@pytest.mark.parametrize(
    ("x", "labels"), [((2, 1, 32, 32), (2,)), ((2, 3, 28, 28), (2,)), ((2, 3, 32, 32), ())]
)
def test_wrong_inputs(x, labels):
    with pytest.raises(ValueError, match=r"expected x \(B, 3, 32, 32\) and labels \(B,\); got \(2, "):
        REDUCED()(torch.zeros(x), torch.zeros(labels))


def checkpoint() -> dict[str, Any]:
    """A checkpoint of score_sde: averages in a list, raw weights (here NaN) under DataParallel's names."""
    weights = recipe("nf16", seed=5)
    raw = {f"module.{key}": torch.full_like(value, torch.nan) for key, value in weights.items()}
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": list(weights.values())}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": raw, "ema": ema, "step": 7}


@pytest.mark.parametrize("frozen_before", [False, True])
def test_the_averages_are_loaded(frozen_before):
    network = REDUCED().requires_grad_(not frozen_before)
    assert load_score_sde(network, checkpoint(), "a.pth") is network
    expected = recipe("nf16", seed=5)
    for key, parameter in network.named_parameters():
        assert torch.equal(parameter, expected[key]), key
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_network_does_not_share_memory_with_the_checkpoint():
    saved = checkpoint()
    network = load_score_sde(REDUCED(), saved, "a.pth")
    saved["ema"]["shadow_params"][0].zero_()
    assert network.all_modules[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda averages: dict(enumerate(averages)), r"ema\.shadow_params: expected 270 tensors, got a dict"),
        (lambda averages: [], r"ema\.shadow_params: expected 270 tensors, got 0"),
        (lambda averages: [*averages, torch.zeros(3)], r"ema\.shadow_params: expected 270 tensors, got 271"),
        (
            lambda averages: [averages[-1], *averages[:-1]],
            r"such as all_modules\.0\.weight: expected shape \(64, 16\), got shape \(3,\)",
        ),
        (
            lambda averages: [*averages[:4], 0.5, *averages[5:]],
            r"all_modules\.2\.weight: expected shape \(16, 3, 3, 3\), got a float",
        ),
        (
            lambda averages: [averages[0], averages[1].long(), *averages[2:]],
            r"all_modules\.0\.bias: expected shape \(64,\), got shape \(64,\) of whole numbers",
        ),
    ],
)
def test_a_spoilt_checkpoint_is_refused_and_changes_nothing(spoil, message):
    saved, network = checkpoint(), REDUCED()
    saved["ema"]["shadow_params"] = spoil(saved["ema"]["shadow_params"])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_score_sde(network, saved, "a.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("saved", "got"), [({}, "an empty dictionary"), ({"ema": None}, "keys ema")])
def test_something_else_than_a_checkpoint(saved, got):
    with pytest.raises(CheckpointError, match=f"expected averages at .* got {got}"):
        load_score_sde(REDUCED(), saved, "a.pth")


def test_labels_keep_their_precision_when_states_have_little():
    """In bfloat16 999·0.0995 would be 99.5 rather than 99.4005."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x, labels):
            seen.append(labels)
            return x

    x, t = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.tensor(0.0995)
    NoiseScore(Spy(), time_scale=DISCRETE_LEVELS)(x, t)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [float(t * 999)] * 2
    NoiseScore(Spy(), time_scale=DISCRETE_LEVELS)(x.double(), t.double())
    assert seen[1].dtype == torch.float64
