import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coup_lib.attacks import NORM_LABELS, Attack, AttackResult
from coup_lib.data import load_split
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.networks.checkpoints import SUMS, CheckpointError, load_network, save_network, weights_path
from coup_lib.networks.small import NETWORKS, NoiseNet, build_network
from coup_lib.paths import WEIGHTS
from coup_lib.sde import VPSDE
from training import digits as train_digits
from training.denoising import denoising_loss
from training.digits import deformed, redrawable, redrawn, train_classifier
from training.train import flops, main, model_card, right, train

TWO_STEPS = replace(train_digits.ROBUST, steps=2)
NUMBER = r"\d+\.?\d*"
# Accuracy on validation that each classifier is above; robustness costs some.
CLASSIFIERS = {"cnn-small": 0.97, "cnn-large": 0.97, "cnn-small-linf": 0.94, "cnn-small-l2": 0.97}
# Above, by a margin, the losses of the published weights (weights/digits/README.md).
LOSS_BELOW = {0.05: 0.35, 0.1: 0.24, 0.2: 0.143}


@pytest.fixture
def validation():
    return load_split("digits", "validation")


@pytest.mark.parametrize("name", NETWORKS["digits"])
def test_published_networks_are_frozen_small_and_deterministic(name, validation):
    network = load_network("digits", name)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    inputs = (validation.x, torch.full((285,), 0.1)) if name == "score" else (validation.x,)
    assert torch.equal(network(*inputs), network(*inputs))
    assert sum(path.stat().st_size for path in WEIGHTS.glob("digits/*")) < 2.1e6
    assert flops(network) < 1.3e6


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_know_the_digits(name, validation):
    network = load_network("digits", name)
    assert network(validation.x).shape == (285, 10)
    assert right(network, validation).mean() >= CLASSIFIERS[name]


@pytest.mark.parametrize(("norm", "robust"), PROFILES["digits"].robust_classifiers.items())
def test_adversarial_training_makes_robust(norm, robust, validation):
    """Against APGD, which it was not trained on, at the profile's eps; beside the same architecture."""
    attack = Attack("apgd-ce", NORM_LABELS[norm], PROFILES["digits"].eps[norm], n_iter=20, eot=1)
    x, y = validation.x[:64], validation.y[:64]
    left = {
        name: float(attack(load_network("digits", name), x, y).robust.float().mean())
        for name in (robust, "cnn-small")
    }
    assert left[robust] > 0.65
    assert left[robust] > left["cnn-small"] + 0.15


@pytest.mark.parametrize("t", LOSS_BELOW)
def test_noise_net_beats_the_wiener_denoiser(t, validation):
    loss = denoising_loss(load_network("digits", "score"), validation, t)
    wiener = denoising_loss(Wiener(load_split("digits", "train").x), validation, t)
    assert loss < LOSS_BELOW[t]
    assert loss < 0.8 * wiener


def test_noise_net_takes_a_time_per_image(validation):
    score, times = load_network("digits", "score"), torch.tensor([1e-5, 0.01, 0.1, 0.3])
    x = 2 * validation.x[:4] - 1
    one_by_one = torch.cat([score(x[i : i + 1], times[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(score(x, times), one_by_one, rtol=1e-4, atol=1e-5)


def test_untrained_noise_net_is_the_gaussian_one(validation):
    """With its last layer at zero the net must be the closed form for independent Gaussian pixels."""
    net = NoiseNet(width=4, hidden=8, blocks=1)
    net.fit_skip(validation.x)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 0.1, 0.3])
    m, std = (value[:, None, None, None] for value in (VPSDE().mean_coeff(t), VPSDE().std(t)))
    torch.testing.assert_close(
        net(x, t), std * (x - m * net.mean) / (m.square() * net.variance + std.square())
    )


@pytest.mark.parametrize("name", NETWORKS["digits"])
def test_twice_differentiable(name, validation):
    """Hessian-vector products agree with central differences of the gradient, in float64."""
    network = load_network("digits", name).double()
    x, v = validation.x[:3].double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    step = 1e-5
    analytic = torch.autograd.functional.hvp(lambda x: scalar(network, x), x, v)[1]
    numeric = (gradient(network, x + step * v) - gradient(network, x - step * v)) / (2 * step)
    assert analytic.norm() > 0
    assert (analytic - numeric).norm() / analytic.norm() < 1e-6


def test_loading_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"one of digits, cifar10; got 'mnist'"):
        load_network("mnist", "score")
    with pytest.raises(ValueError, match=rf"one of {', '.join(NETWORKS['digits'])}; got 'resnet'"):
        load_network("digits", "resnet")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*cnn-small\.safetensors"):
        load_network("digits", "cnn-small", folder=tmp_path)


def test_a_tampered_file_is_refused(tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    path = weights_path("digits", "cnn-small", folder)
    state = load_file(path)
    state["head.bias"] += 1
    save_file(state, path)
    with pytest.raises(
        CheckpointError, match=r"cnn-small\.safetensors: expected SHA-256 \w{64} .* got \w{64}"
    ):
        load_network("digits", "cnn-small", folder=folder)
    load_network("digits", "cnn-large", folder=folder)  # the others are as they were


def test_an_unlisted_file_is_refused(tmp_path):
    save_network(build_network("digits", "cnn-small"), "digits", "cnn-small", folder=tmp_path)
    (tmp_path / SUMS).write_text("")
    with pytest.raises(CheckpointError, match="no line for it"):
        load_network("digits", "cnn-small", folder=tmp_path)


def test_saved_is_loaded(tmp_path):
    network = build_network("digits", "cnn-small")
    path = save_network(network, "digits", "cnn-small", folder=tmp_path)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "cnn-small.safetensors"
    ]  # nothing temporary
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_network("digits", "cnn-small", folder=tmp_path)(x), network(x))


def test_training_is_repeatable(tmp_path):
    """Two short runs of the command write the same bytes."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        main(["--only", "score", "--steps", "3", "--threads", "1", "--folder", str(folder)])
    assert (tmp_path / "a" / SUMS).read_text() == (tmp_path / "b" / SUMS).read_text()
    assert "| score |" in (tmp_path / "a" / "digits" / "README.md").read_text()


def test_adversarial_training_is_repeatable_and_its_own():
    """Seeded attacks and all; with an attack, other weights than without."""
    one, again, plain = (
        torch.cat([p.flatten() for p in train("digits", name, seed=3, steps=2).parameters()])
        for name in ("cnn-small-linf", "cnn-small-linf", "cnn-small")
    )
    assert torch.equal(one, again) and not torch.equal(one, plain)


def test_classifiers_learn_from_the_attacked_images():
    """What the network is shown under training is what the attack made, of the right labels."""
    made = []

    class Stub(Attack):
        def __call__(self, network, x, y):
            made.append(torch.rand_like(x))
            return AttackResult(made[-1], torch.ones(len(y), dtype=torch.bool))

    shown = []
    network = build_network("digits", "cnn-small")
    network.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    attack = Stub("pgd", "Linf", 0.1)
    train_classifier(network, load_split("digits", "train"), TWO_STEPS, attack)
    assert len(made) == 2 and all(torch.equal(a, b) for a, b in zip(made, shown, strict=True))


def test_each_step_of_adversarial_training_starts_elsewhere(monkeypatch):
    """Madry et al.: PGD from a start drawn anew, also where the images are the same."""
    monkeypatch.setattr(train_digits, "deformed", lambda x, *_, **__: x)
    one, shown, network = load_split("digits", "train").first(1), [], build_network("digits", "cnn-small")
    network.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].detach().clone()))
    attack = Attack("pgd", "Linf", 0.1, n_iter=1, eot=1)
    train_classifier(network, one, TWO_STEPS, attack)
    (clean, start), (again, other) = (shown[place : place + 2] for place in (0, len(shown) // 2))
    assert torch.equal(clean, again) and not torch.equal(start, other)


def test_model_card_matches_the_weights():
    """Every number in the published card is one this code measures on the published files."""
    measured = model_card("digits").splitlines()
    published = (WEIGHTS / "digits" / "README.md").read_text().splitlines()
    for line, claim in zip(measured, published, strict=True):
        if not line.startswith("|"):
            assert line == claim
        else:
            assert re.sub(NUMBER, "", line) == re.sub(NUMBER, "", claim)
            # Sums are rounded differently elsewhere; one test image is 0.2 percent.
            assert [float(n) for n in re.findall(NUMBER, line)] == pytest.approx(
                [float(n) for n in re.findall(NUMBER, claim)], rel=0, abs=2e-4
            )


def test_deformations_leave_the_identity_alone():
    x, still = load_split("digits", "train").x[:5], {"shift": 0, "angle": 0, "scale": 0, "shear": 0}
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(deformed(x, generator, **still), x)


def test_redrawn_digits_look_like_the_real_ones():
    """Same digit, and the grey levels of a 4×4 block count: k/16, as often 0 as in the data."""
    x, still = load_split("digits", "train").x, {"shift": 0, "angle": 0, "scale": 0, "shear": 0}
    drawn = redrawn(redrawable(x), torch.Generator(), **still)
    assert (drawn - x).square().mean() < 2e-3
    assert torch.equal(drawn, (16 * drawn).round() / 16)
    assert abs((drawn == 0).float().mean() - (x == 0).float().mean()) < 0.02


class Wiener(nn.Module):
    """The best linear predictor of the noise when images are Gaussian with the mean and covariance of x."""

    def __init__(self, x):
        super().__init__()
        flat = (2 * x - 1).flatten(1).double()
        self.mean = flat.mean(0)
        self.covariance = torch.cov(flat.T)

    def forward(self, x, t):
        m, std = VPSDE().mean_coeff(t[0]).double(), VPSDE().std(t[0]).double()
        centred = x.flatten(1).double() - m * self.mean
        total = m**2 * self.covariance + std**2 * torch.eye(64)
        return (std * torch.linalg.solve(total, centred.T).T).view_as(x).float()


def scalar(network, x):
    """log max_y p(y|x), summed, for a classifier; something as curved for the noise net."""
    if isinstance(network, NoiseNet):
        return network(x, torch.full((len(x),), 0.1, dtype=x.dtype)).square().sum()
    return network(x).log_softmax(1).max(1).values.sum()


def gradient(network, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(scalar(network, x), x)[0]
