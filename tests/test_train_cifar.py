import copy
import re
from dataclasses import replace

import pytest
import random_cifar
import torch
from safetensors.torch import load_file

from coup_lib.attacks import NORM_LABELS, Attack
from coup_lib.data import Images, is_here, load_split
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.networks.checkpoints import SUMS, load_network, read_sums, save_network
from coup_lib.networks.resnet import cifar_resnet
from coup_lib.networks.small import NETWORKS, T_MAX, PatchedDDPMpp
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.paths import DATA_VARIABLE, WEIGHTS
from coup_lib.sde import VPSDE
from training import cifar as train_cifar
from training import train
from training.denoising import denoising_loss, noise_error

TINY = {"width": 8, "multipliers": (1, 1), "blocks": 1, "attention_at": (8,)}
SMALL = PROFILES["cifar10-small"]
SCORE, ROBUST = (train_cifar.RECIPES[name] for name in ("score-small", "resnet20-linf"))
KEY = "network.all_modules.0.weight"
NUMBER = r"\d+\.?\d*"


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 32, 32, generator=generator)
    return Images(x, torch.randint(10, (12,), generator=generator))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    random_cifar.write(tmp_path)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


def test_untrained_it_is_what_independent_gaussian_pixels_want():
    network, x, t = PatchedDDPMpp(**TINY), torch.randn(3, 3, 32, 32), torch.tensor([0.01, 0.1, 0.3])
    m, std = (value[:, None, None, None] for value in (VPSDE().mean_coeff(t), VPSDE().std(t)))
    torch.testing.assert_close(network(x, t), std * x / (m.square() / 4 + std.square()))


def test_what_the_u_net_predicts_has_unit_variance_at_every_time(images):
    """For Gaussian pixels of variance 1/4, whatever t: (noise - built in) / (factor of the U-Net)."""
    network, generator = PatchedDDPMpp(**TINY), torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator) / 2
    for time in (0.001, 0.05, 0.3):
        t = torch.full((64,), time)
        noise = torch.randn(x.shape, generator=generator)
        state = VPSDE().noised(x, t, noise)
        built_in = network(state, t)
        network.network.forward = lambda x, labels: torch.ones_like(x)
        factor = network(state, t) - built_in
        del network.network.forward
        assert ((noise - built_in) / factor).var().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", NETWORKS["cifar10"])
def test_published_networks_are_small_frozen_and_finite(name):
    network = load_network("cifar10", name)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    inputs = (torch.rand(2, 3, 32, 32), torch.tensor([0.001, 0.3])) if name == SMALL.score else None
    result = network(*inputs) if inputs else network(torch.rand(2, 3, 32, 32))
    assert result.isfinite().all()
    assert (WEIGHTS / "cifar10" / f"{name}.safetensors").stat().st_size <= 16 * 2**20


def test_the_score_has_the_second_derivatives_that_attacks_on_x0_guidance_need():
    score, t, step = load_score("cifar10", SMALL.score).double(), torch.tensor(0.05).double(), 1e-5
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, 3, 32, 32, generator=generator, dtype=torch.float64)

    def slope(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(score(x, t).square().sum(), x)[0]

    analytic = torch.autograd.functional.hvp(lambda x: score(x, t).square().sum(), x, v)[1]
    numeric = (slope(x + step * v) - slope(x - step * v)) / (2 * step)
    assert (analytic - numeric).norm() / analytic.norm() < 1e-5


@pytest.mark.skipif(not is_here("cifar10"), reason="no CIFAR-10 in COUP_DATA")
def test_the_score_network_beats_an_image_prior_that_knows_no_neighbours():
    held_out = load_split("cifar10", "validation").first(64)
    network, blank = load_network("cifar10", SMALL.score), PatchedDDPMpp(**TINY)
    for t in (0.02, 0.05, 0.1):
        assert denoising_loss(network, held_out, t, repeats=1) < 0.6 * denoising_loss(
            blank, held_out, t, repeats=1
        )


@pytest.mark.skipif(not is_here("cifar10"), reason="no CIFAR-10 in COUP_DATA")
@pytest.mark.parametrize(("norm", "robust"), SMALL.robust_classifiers.items())
def test_adversarial_training_makes_robust(norm, robust):
    data = load_split("cifar10", "validation").first(64)
    attack = Attack("apgd-ce", NORM_LABELS[norm], SMALL.eps[norm], n_iter=10, eot=1)
    usual, trained = load_classifier("cifar10", "resnet18"), load_network("cifar10", robust)
    left = [float(attack(network, data.x, data.y).robust.float().mean()) for network in (trained, usual)]
    assert left[0] > 0.2 + left[1]


@pytest.mark.skipif(not is_here("cifar10"), reason="no CIFAR-10 in COUP_DATA")
def test_the_model_card_matches_the_weights():
    measured = train.model_card("cifar10").splitlines()
    published = (WEIGHTS / "cifar10" / "README.md").read_text().splitlines()
    for line, claim in zip(measured, published, strict=True):
        if line.startswith("|"):
            assert [float(n) for n in re.findall(NUMBER, line)] == pytest.approx(
                [float(n) for n in re.findall(NUMBER, claim)], rel=0, abs=2e-3
            )


def test_most_times_of_training_are_short_few_next_to_zero(images, monkeypatch):
    """Against the distribution of the smallest of three: P(t < s·T_MAX) = 1 - (1 - s)³."""
    times = []

    def seen(network, x, t, noise):
        times.append(t)
        return noise_error(network, x, t, noise)

    monkeypatch.setattr(train_cifar, "noise_error", seen)
    train_cifar.train_score(PatchedDDPMpp(**TINY), images, images, replace(SCORE, steps=8, batch=64))
    t = torch.cat(times)
    assert t.min() > 0 and t.max() <= T_MAX + 1e-4
    for s in (1 / 15, 1 / 3, 1 / 2):
        share = 1 - (1 - s) ** 3
        assert abs((t < s * T_MAX).float().mean() - share) < 3 * (share * (1 - share) / len(t)) ** 0.5


def test_training_is_repeatable_and_goes_on_after_a_kill(images, tmp_path, monkeypatch):
    monkeypatch.setattr("training.fit.SAVE_EVERY", -1)

    def weights(state=None):
        torch.manual_seed(0)
        network = PatchedDDPMpp(**TINY)
        trained = train_cifar.train_score(network, images, images, replace(SCORE, steps=3, batch=4), state)
        return torch.cat([p.flatten() for p in trained.parameters()])

    def killed(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noise_error(*given)

    whole, calls = weights(), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cifar, "noise_error", killed)
        weights(tmp_path / "state.pt")
    assert torch.equal(weights(tmp_path / "state.pt"), whole)


def test_the_command_writes_weights_and_card(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STATES", tmp_path / "states")
    monkeypatch.setitem(NETWORKS["cifar10"], SMALL.score, lambda: PatchedDDPMpp(**TINY))
    arguments = ["--dataset", "cifar10", "--only", SMALL.score, "--steps", "2", "--precision", "bfloat16"]
    arguments += ["--folder", str(tmp_path / "weights")]
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    train.main([*arguments, "--batch", "2", "--compiled"])
    assert [type(network) for network in compiled] == [PatchedDDPMpp]
    card = (tmp_path / "weights" / "cifar10" / "README.md").read_text()
    assert "| score-small |" in card and "| score-small, on train images |" in card
    first = "coup train --seed 0 --threads 1 --dataset cifar10 --only score-small --steps 2"
    assert f"- score-small: `{first} --batch 2 --compiled --precision bfloat16`\n" in card
    assert (
        load_file(tmp_path / "weights" / "cifar10" / f"{SMALL.score}.safetensors")[KEY].dtype == torch.float16
    )
    assert f"cifar10/{SMALL.score}.safetensors" in (tmp_path / "weights" / SUMS).read_text()

    with pytest.raises(ValueError, match="--only: expected one of resnet20-l2, resnet20-linf, score-small"):
        train.main(["--dataset", "cifar10", "--only", "score"])
    with pytest.raises(ValueError, match=r"batch=3.* got one with .*batch=2"):
        train.main([*arguments, "--batch", "3"])
    with pytest.raises(ValueError, match="--batch: expected a whole number of at least 1"):
        train.main([*arguments, "--batch", "0"])


def test_the_card_names_every_command_behind_the_weights(cifar, tmp_path, monkeypatch):
    """Further training is told after what it began with; training anew is told alone."""
    monkeypatch.setitem(NETWORKS["cifar10"], SMALL.score, lambda: PatchedDDPMpp(**TINY))
    folder, begin = tmp_path / "weights", tmp_path / "begin.safetensors"

    def told(name, *arguments):
        monkeypatch.setattr(train, "STATES", tmp_path / name)
        train.main(["--dataset", "cifar10", "--only", SMALL.score, "--folder", str(folder), *arguments])
        return train.read_commands("cifar10", folder)[SMALL.score]

    (first,) = told("first", "--steps", "1")
    begin.write_bytes((folder / "cifar10" / f"{SMALL.score}.safetensors").read_bytes())
    _, second = told("second", "--steps", "2", "--begin-with", str(begin))
    assert first.endswith("--steps 1") and second.endswith(f"--steps 2 --begin-with {begin}")
    card = (folder / "cifar10" / "README.md").read_text()
    assert f"- {SMALL.score}: `{first}`, then `{second}`\n" in card
    assert told("third", "--steps", "1") == [first]


def test_a_score_network_is_trained_further_from_weights_that_are_named(cifar, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS["cifar10"], SMALL.score, lambda: PatchedDDPMpp(**TINY))
    first = train.train("cifar10", SMALL.score, seed=0, steps=1, batch=2)
    path = save_network(first, "cifar10", SMALL.score, folder=tmp_path, half=True)
    given = []
    monkeypatch.setattr(train_cifar, "fit", lambda network, loss, recipe, *_: given.append(recipe) or network)
    begun = train.train("cifar10", SMALL.score, seed=1, begin_with=path)
    assert all(parameter.requires_grad for parameter in begun.parameters()) and begun.training
    for key, value in first.state_dict().items():
        assert torch.equal(begun.state_dict()[key].half(), value.half()), key
    # Another run's state is not taken up: the file's digest is among what tells runs apart.
    assert read_sums(tmp_path)[f"cifar10/{SMALL.score}.safetensors"] == given[0].begins_with


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--only", "score-small"], FileNotFoundError, "--begin-with: no weights at .*nowhere"),
        (["--only", "resnet20-l2"], ValueError, "--only, with --begin-with: expected one of score-small"),
        ([], ValueError, "--only, with --begin-with: expected one of score-small; got None"),
    ],
)
def test_weights_to_begin_with_are_checked(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        train.main(["--dataset", "cifar10", "--begin-with", str(tmp_path / "nowhere"), *arguments])


def test_adversarial_training_begins_where_it_should(cifar, monkeypatch):
    torch.manual_seed(0)
    published, begun, met = cifar_resnet(20), [], []

    def load(dataset, name):
        begun.append(name)
        return published

    def train_robust(network, data, attack, recipe, *rest):
        met.append((attack.norm, attack.n_iter, recipe.steps, recipe.lr))
        return network

    monkeypatch.setattr(train, "load_classifier", load)
    monkeypatch.setattr(train_cifar, "train_robust", train_robust)
    for name in SMALL.robust_classifiers.values():
        assert torch.equal(train.train("cifar10", name, seed=0).conv1.weight, published.conv1.weight)
    assert begun == ["resnet20-l2", "resnet20"]
    recipes = {norm: train_cifar.RECIPES[name] for norm, name in SMALL.robust_classifiers.items()}
    assert met == [(NORM_LABELS[norm], r.pgd_steps, r.steps, r.lr) for norm, r in recipes.items()]


def test_adversarial_training_keeps_the_statistics(images):
    torch.manual_seed(0)
    published = cifar_resnet(20)
    seen = []

    class Spy(Attack):
        def __call__(self, network, x, y):
            seen.append((network.training, x, y))
            return super().__call__(network, x, y)

    attack = Spy("clean", "Linf", 0.1)
    trained = train_cifar.train_robust(copy.deepcopy(published), images, attack, replace(ROBUST, steps=2))
    assert len(seen) == 2 and not any(training for training, _, _ in seen)
    for key, value in published.state_dict().items():
        same = torch.equal(trained.state_dict()[key], value)
        assert same == ("running" in key or "num_batches" in key), key


def test_each_step_of_adversarial_training_starts_elsewhere_also_after_a_kill(images, tmp_path, monkeypatch):
    monkeypatch.setattr("training.fit.SAVE_EVERY", -1)
    torch.manual_seed(0)
    published, seeds = cifar_resnet(20), []

    class Spy(Attack):
        def __call__(self, network, x, y):
            seeds.append(self.seed)
            if len(seeds) == dies_at:
                raise KeyboardInterrupt
            return super().__call__(network, x, y)

    def weights(state=None):
        attack = Spy("pgd", "Linf", 0.1, n_iter=1, eot=1)
        recipe = replace(ROBUST, steps=3)
        trained = train_cifar.train_robust(copy.deepcopy(published), images, attack, recipe, state)
        return torch.cat([p.flatten() for p in trained.parameters()])

    dies_at = None
    whole = weights()
    assert len(set(seeds)) == len(seeds) == 3  # another seed is another start (test_attacks)
    seeds, dies_at = [], 3
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "state.pt")
    dies_at = None
    assert torch.equal(weights(tmp_path / "state.pt"), whole)


def test_mirrored_and_shifted_images_are_the_same_images(images):
    generator = torch.Generator().manual_seed(0)
    for image, original in zip(train_cifar.mirrored(images.x, generator), images.x, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(2))
    padded = torch.nn.functional.pad(images.x, [4] * 4)
    places = set()
    for moved, whole in zip(train_cifar.shifted(images.x, generator), padded, strict=True):
        found = [
            (i, j) for i in range(9) for j in range(9) if torch.equal(moved, whole[:, i : i + 32, j : j + 32])
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 4
