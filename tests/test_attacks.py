"""The attacks, AutoAttack's through the adapter, on the real thing and on small inputs."""

import sys
import types

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from closed_forms import small_problem
from torch import nn

from coup_lib import attacks
from coup_lib.attacks import (
    ATTACKS,
    PGD_STEP,
    STARTED,
    Attack,
    BatchedEOT,
    InParts,
    cross_entropy,
    margin,
    project,
)
from coup_lib.data import load_split
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.networks.checkpoints import load_network
from coup_lib.purify import Purified, coup
from coup_lib.score import NoiseScore

SMALL = {"norm": "Linf", "eps": 0.15, "seed": 1, "n_iter": 5, "eot": 2, "n_targets": 3, "square_queries": 20}
THREATS = [("Linf", 0.15), ("L2", 0.5)]


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", "validation").first(16)


@pytest.fixture(scope="module")
def classifier():
    return load_network("digits", "cnn-small")


def defended(classifier):
    return coup(classifier, NoiseScore(load_network("digits", "score")), n_steps=4, seed=7)


def attack(name, **changes):
    return Attack(name, **SMALL | changes)


def apgd(model, **settings):
    return pyautoattack.autoattack.APGDAttack(
        model, n_iter=5, norm="Linf", eps=0.15, seed=1, device="cpu", **settings
    )


def distance(x_adv, x, norm):
    """(n,) in the threat's norm."""
    return (x_adv - x).flatten(1).norm(p={"Linf": torch.inf, "L2": 2}[norm], dim=1)


class Spy(nn.Module):
    """A model that keeps what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []
        self.eval()

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


# --- EOT ---


def test_batched_eot_is_the_mean_over_draws_of_the_sequential_one():
    score, classifier, x = small_problem()
    y, model = torch.arange(5) % 3, coup(classifier, score, n_steps=4)
    model.purifier.reseed(3)
    _, loss, gradient = BatchedEOT(model, 6, 640, cross_entropy).get_logits_loss_grad_xent(x, y)
    model.purifier.reseed(3)
    mean_gradient, mean_loss = BatchedEOT(model, 6, 640, cross_entropy).mean_gradient(x, y)
    model.purifier.reseed(3)
    total, losses = torch.zeros_like(x), []
    for _ in range(6):
        at = x.clone().requires_grad_()
        losses.append(F.cross_entropy(model(at), y, reduction="none"))
        total += torch.autograd.grad(losses[-1].sum(), at)[0]
    torch.testing.assert_close(gradient, total / 6)
    torch.testing.assert_close(loss, losses[-1].detach())
    assert torch.equal(mean_gradient, gradient)
    torch.testing.assert_close(mean_loss, torch.stack(losses).mean(0).detach())


@pytest.mark.parametrize("max_batch", [3, 10, 12, 640])
def test_eot_draws_fit_into_any_batch(max_batch):
    score, classifier, x = small_problem()
    model = coup(classifier, score, n_steps=2, guidance_weight=0.5)
    results = []
    for limit in (max_batch, 640):
        model.purifier.reseed(0)
        batched = BatchedEOT(model, 4, limit, apgd(model).dlr_loss)
        results.append(batched.get_logits_loss_grad_dlr(x, torch.zeros(5, dtype=torch.int64))[2])
    torch.testing.assert_close(*results)


# --- AutoAttack ---


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_apgd_keeps_autoattacks_point_of_highest_loss(digits, classifier, loss, norm, eps):
    theirs = pyautoattack.autoattack.APGDAttack(
        classifier, n_iter=10, norm=norm, eps=eps, loss=loss, eot_iter=2, device="cpu"
    )
    torch.manual_seed(1)  # it seeds itself in every case but this one
    expected = theirs.perturb(digits.x, digits.y, best_loss=True)
    result = attack(f"apgd-{loss}", norm=norm, eps=eps, n_iter=10)(classifier, digits.x, digits.y)
    torch.testing.assert_close(result.x_adv, expected)


def test_the_budgets_are_autoattacks_own_unless_told(digits, classifier, monkeypatch):
    """What a bare object of each version is set up with, read off it."""
    standard, rand = (
        pyautoattack.AutoAttack(classifier, norm="Linf", eps=0.1, seed=1, version=version)
        for version in ("standard", "rand")
    )
    suites, default = [], Attack("standard", "Linf", 0.1, seed=1)
    run = lambda suite, x, y, **_: suites.append(suite) or (x, y)  # noqa: E731
    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    default(classifier, digits.x, digits.y)
    (ours,) = suites
    assert ours.attacks_to_run == standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    settings = (
        "n_iter",
        "n_iter_2",
        "n_restarts",
        "n_target_classes",
        "n_queries",
        "eot_iter",
        "eps",
        "seed",
    )
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        for setting in settings:
            expected = getattr(getattr(standard, name), setting, None)
            assert getattr(getattr(ours, name), setting, None) == expected, (name, setting)
    assert (default.n_iter, default.eot) == (rand.apgd.n_iter, rand.apgd.eot_iter) == (100, 20)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.4)])
def test_standard_gives_autoattacks_own_numbers(digits, classifier, norm, eps):
    """Against a bare AutoAttack object with the same budgets on an undefended classifier."""
    x, y = digits.x[:8], digits.y[:8]
    suite = pyautoattack.AutoAttack(classifier, norm=norm, eps=eps, seed=1, version="standard")
    own = {"n_iter": 10, "norm": norm, "eps": eps, "seed": 1, "device": "cpu"}
    suite.apgd = type(suite.apgd)(classifier, **own)  # APGD's schedule is made with the object
    suite.apgd_targeted = type(suite.apgd_targeted)(classifier, n_target_classes=3, **own)
    suite.fab.n_iter, suite.fab.n_target_classes, suite.square.n_queries = 10, 3, 50
    expected, labels = suite.run_standard_evaluation(x, y, batch_size=640)
    settings = {"norm": norm, "eps": eps, "n_iter": 10, "square_queries": 50}
    result = attack("standard", **settings)(classifier, x, y)
    assert torch.equal(result.x_adv, expected)
    assert torch.equal(result.robust, labels == y)
    assert 0 < result.robust.sum() < 8


def test_square_gives_autoattacks_own_numbers(digits, classifier):
    suite = pyautoattack.AutoAttack(
        classifier, norm="Linf", eps=0.1, seed=1, version="custom", attacks=["square"]
    )
    suite.square.n_queries = 100
    expected, labels = suite.run_standard_evaluation(digits.x, digits.y, batch_size=640)
    result = attack("square", eps=0.1, square_queries=100)(classifier, digits.x, digits.y)
    assert torch.equal(result.x_adv, expected)
    assert torch.equal(result.robust, labels == digits.y)
    assert 0 < result.robust.sum() < 16


def rand_of_autoattack(classifier, x, y, norm, eps, **budget):
    """A bare object's verdict (n,) bool, image by image: its random starts depend on who is still right."""
    suite = pyautoattack.AutoAttack(classifier, norm=norm, eps=eps, seed=1, version="rand")
    assert suite.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    suite.apgd = type(suite.apgd)(classifier, norm=norm, eps=eps, seed=1, device="cpu", **budget)
    verdicts = [
        suite.run_standard_evaluation(*image, batch_size=640)[1] == image[1]
        for image in zip(x.split(1), y.split(1), strict=True)
    ]
    return torch.cat(verdicts)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.27)])
def test_rand_is_autoattacks_and_both_its_halves(classifier, norm, eps):
    """On a deterministic classifier, where nothing but the composition can make a difference."""
    images = load_split("digits", "validation").first(60)
    x, y = images.x[-24:], images.y[-24:].clone()
    y[0] = (y[0] + 1) % 10  # one that is wrong before any attack
    expected = rand_of_autoattack(classifier, x, y, norm, eps, n_iter=10, eot_iter=2)
    settings = {"norm": norm, "eps": eps, "n_iter": 10}
    singly = [
        attack("rand", **settings)(classifier, *image) for image in zip(x.split(1), y.split(1), strict=True)
    ]
    assert torch.equal(torch.cat([result.robust for result in singly]), expected)
    assert 0 < expected.sum() < 24 and not expected[0]
    rand, ce, dlr = (attack(name, **settings)(classifier, x, y) for name in ("rand", "apgd-ce", "apgd-dlr"))
    assert torch.equal(rand.robust, ce.robust & dlr.robust)
    first = ce.robust.reshape(-1, 1, 1, 1)
    assert torch.equal(rand.x_adv, torch.where(first, dlr.x_adv, ce.x_adv))


class Unsure(nn.Module):
    """Says 0, each time and of each image, with probability 0.9, by a generator of its own."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.eval()

    def forward(self, x):
        wrong = torch.rand(len(x), generator=self.generator) > 0.9
        other = F.one_hot(torch.randint(1, 10, (len(x),), generator=self.generator), 10)
        right = F.one_hot(torch.zeros(len(x), dtype=torch.int64), 10)
        return 5 * torch.where(wrong[:, None], other, right) + 1e-3 * x.flatten(1)[:, :10]


# In so many an image has to be right; worst-draw looks at both of each of three gradients.
DRAWS = dict.fromkeys(ATTACKS, 2) | {"rand": 3, "standard": 5, "worst-draw": 1 + 3 * 2}


@pytest.mark.parametrize("name", DRAWS)
def test_a_count_has_one_clean_draw_and_one_for_each_attack(name):
    """Of 4000 images that are right with probability 0.9 in every draw, 0.9^draws are counted: ± 4 σ."""
    n, share = 4000, 0.9 ** DRAWS[name]
    grey, zeros = torch.full((n, 1, 5, 5), 0.5), torch.zeros(n, dtype=torch.int64)
    tolerance = 4 * (share * (1 - share) / n) ** 0.5
    ours = attack(name, n_iter=2, square_queries=2)(Unsure(), grey, zeros).robust
    assert abs(float(ours.float().mean()) - share) < tolerance
    if name in ("rand", "square", "standard"):
        version = {"version": "custom", "attacks": [name]} if name == "square" else {"version": name}
        suite = pyautoattack.AutoAttack(Unsure(), norm="Linf", eps=0.15, seed=1, **version)
        for part in (suite.apgd, suite.apgd_targeted, suite.fab):
            part.n_iter = 2
        suite.fab.n_target_classes = suite.apgd_targeted.n_target_classes = 3
        suite.apgd.eot_iter, suite.square.n_queries = 2, 2
        labels = suite.run_standard_evaluation(grey, zeros, batch_size=n)[1]
        assert abs(float((labels == zeros).float().mean()) - share) < tolerance


def test_square_meets_logits_that_are_tied(digits):
    """Every image counts as right and none has a margin: the attack asks about no images at all."""

    class Tied(nn.Module):
        def forward(self, x):
            assert len(x)
            return torch.zeros(len(x), 10)

    result = attack("square")(Tied().eval(), digits.x, torch.zeros_like(digits.y))
    assert result.robust.all()


@pytest.mark.parametrize(("seed", "field", "draws"), [(1, "judged", 3), (1, "robust", 4), (0, "judged", 2)])
def test_the_halves_of_rand_make_its_count_with_noise_of_their_own_and_one_clean_draw(seed, field, draws):
    """Halves that begin with the same noise (seed 0) are judged on the same noise: 0.9² are left."""
    n, zeros = 4000, torch.zeros(4000, dtype=torch.int64)
    grey = torch.full((n, 1, 5, 5), 0.5)
    ce, dlr = (
        attack(name, n_iter=2)(model, grey, zeros)
        for name, model in (("apgd-ce", Unsure()), ("apgd-dlr", Unsure(seed)))
    )
    left = ce.robust & getattr(dlr, field)
    assert abs(float(left.float().mean()) - 0.9**draws) < 0.025


def test_the_records_of_rands_halves_have_one_clean_draw(results_folder, monkeypatch):
    forward, drawn, first = Purified.forward, [], []

    def noted(self, x, seeds=None):
        drawn.append(forward(self, x, seeds))
        return drawn[-1]

    monkeypatch.setattr(Purified, "forward", noted)
    evaluation = Evaluation(Config(n_images=4, n_iter=2, eot=2), verbose=False)
    for name in ("apgd-ce", "apgd-dlr"):
        drawn.clear()
        evaluation.attack(against(name, "coup"))
        first.append(drawn[0])
    assert torch.equal(*first) and not torch.equal(first[0], drawn[-1])


# --- in parts ---


class Grainy(nn.Module):
    """A classifier of 8×8 digits on noise that it draws image by image, one after the other.

    It counts how many images are differentiated at once. What it gives for an image is to the bit the same in
    whatever batch.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weights", torch.randn(10, 64, generator=generator))
        self.generator = torch.Generator().manual_seed(1)
        self.largest = self.most = self.open = 0
        self.eval()

    def forward(self, x):
        noise = torch.stack([torch.randn(64, generator=self.generator) for _ in x])
        logits = ((x.flatten(1) + 0.1 * noise)[:, None] * self.weights).sum(2)
        self.largest = max(self.largest, len(x))
        if logits.requires_grad:
            self.open += len(x)
            self.most = max(self.most, self.open)
            logits.register_hook(lambda _: setattr(self, "open", self.open - len(x)))
        return logits


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.3)])
def test_results_do_not_depend_on_max_batch_which_bounds_every_call(digits, name, norm, eps):
    settings = {"norm": norm, "eps": eps, "eot": 1}  # sums over draws would be rounded otherwise
    y = Grainy()(digits.x).argmax(1)
    whole = attack(name, **settings)(Grainy(), digits.x, y)
    assert 0 < whole.robust.sum() < 16
    for max_batch in (5, 1):
        model = Grainy()
        parts = attack(name, max_batch=max_batch, **settings)(model, digits.x, y)
        assert torch.equal(parts.x_adv, whole.x_adv) and torch.equal(parts.robust, whole.robust)
        assert model.largest == max_batch and model.most <= max_batch


def test_a_purifier_draws_the_same_noise_in_parts(digits, classifier):
    models = defended(classifier), InParts(defended(classifier), 5)
    torch.testing.assert_close(*(torch.cat([model(digits.x), model(digits.x)]) for model in models))


def test_the_original_package_is_used_where_it_is_there(digits, classifier, monkeypatch):
    """`autoattack` has the same attacks behind other names; a stand-in with its signatures gives the same."""

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, version="standard", device="cuda"):
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
            return (x_adv, y_adv) if return_labels else x_adv

    names = ("standard", "apgd-dlr")
    ours = [attack(name)(classifier, digits.x, digits.y) for name in names]
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    assert attacks.autoattack_class() is AutoAttack
    for result, name in zip(ours, names, strict=True):
        original = attack(name)(classifier, digits.x, digits.y)
        assert torch.equal(result.x_adv, original.x_adv) and torch.equal(result.robust, original.robust)


def test_autoattacks_warnings_are_kept(digits, classifier):
    said = " ".join(attack("standard")(defended(classifier), digits.x[:4], digits.y[:4]).warnings)
    assert "randomized defense" in said and "dynamic defense" in said


def test_apgd_ce_moves_every_image(digits, classifier):
    """Also those that it never saw misclassified: they are needed against other defences."""
    result = attack("apgd-ce")(defended(classifier), digits.x, digits.y)
    assert (distance(result.x_adv, digits.x, "Linf") > 0).all()


# --- every attack ---


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_repeats_with_its_seeds_whatever_was_drawn_before(digits, classifier, name):
    results = []
    for seed in (0, 1):
        model = defended(classifier)
        torch.manual_seed(seed)
        results.append(attack(name)(model, digits.x[:4], digits.y[:4]))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), after)  # the caller's generator is left alone
    one, other = results
    assert torch.equal(one.x_adv, other.x_adv) and torch.equal(one.robust, other.robust)
    assert one.robust.shape == (4,) and one.robust.dtype == torch.bool and not one.x_adv.requires_grad


@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_that_draws_from_torchs_generator_repeats_too_and_leaves_it_alone(name, digits, classifier):
    """The clean draw as well: it is part of the count."""

    class Dropping(nn.Module):
        def forward(self, x):
            return classifier(F.dropout(x, 0.5, training=True))

    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(attack(name, n_iter=2)(Dropping().eval(), digits.x, digits.y))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0].robust, found[1].robust)
    assert torch.equal(found[0].x_adv, found[1].x_adv)


@pytest.mark.parametrize("name", ["noise", *STARTED])
def test_another_seed_is_another_attack(digits, classifier, name):
    one, other = (attack(name, seed=seed)(classifier, digits.x, digits.y).x_adv for seed in (1, 2))
    assert not torch.equal(one, other)


def test_attacks_break_an_undefended_classifier(digits, classifier):
    assert attack("clean")(classifier, digits.x, digits.y).robust.float().mean() > 0.9
    for name in ("pgd", "apgd-ce", "apgd-dlr", "apgd-margin", "standard"):
        result = attack(name, n_iter=20, eps=0.3)(classifier, digits.x, digits.y)
        assert result.robust.sum() == 0, name


@pytest.mark.parametrize("name", ["clean", "noise", "fgsm", "pgd"])
def test_the_verdict_is_that_of_the_images_left_behind(digits, classifier, name):
    result = attack(name, eps=0.1)(classifier, digits.x, digits.y)
    right = (classifier(digits.x).argmax(1) == digits.y) & (classifier(result.x_adv).argmax(1) == digits.y)
    assert torch.equal(result.robust, right)


def test_an_image_that_was_wrong_at_first_is_not_robust(digits, classifier):
    wrong = (digits.y + 1) % 10
    for name in ("clean", "noise", "pgd", "apgd-ce", "square"):
        assert not attack(name)(classifier, digits.x, wrong).robust.any()


def test_an_unknown_attack_is_refused():
    with pytest.raises(ValueError, match=r"attack: expected one of clean, noise, fgsm, .*; got 'cw'"):
        Attack("cw", "Linf", 0.1)


# --- noise, FGSM, PGD, starts ---


@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_noise_is_on_the_surface_of_the_ball(classifier, norm, eps):
    """Grey images, so that the range cuts nothing off."""
    grey, y = torch.full((16, 1, 8, 8), 0.5), torch.zeros(16, dtype=torch.int64)
    x_adv = attack("noise", norm=norm, eps=eps)(classifier, grey, y).x_adv
    torch.testing.assert_close(distance(x_adv, grey, norm), torch.full((16,), eps))
    if norm == "Linf":  # at a corner
        torch.testing.assert_close((x_adv - grey).abs(), torch.full_like(grey, eps))
    assert distance(x_adv[1:], x_adv[:-1], norm).min() > 0  # each image its own


@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_fgsm_is_one_step_of_eps(norm, eps):
    _, classifier, x = small_problem()
    classifier.eval()
    y = torch.arange(5) % 3
    at = x.clone().requires_grad_()
    slope = torch.autograd.grad(F.cross_entropy(classifier(at), y, reduction="sum"), at)[0]
    lengths = torch.stack([image.pow(2).sum().sqrt() for image in slope]).reshape(5, 1, 1, 1)
    step = torch.sign(slope) if norm == "Linf" else slope / lengths
    result = attack("fgsm", norm=norm, eps=eps, n_iter=50)(classifier, x, y)
    torch.testing.assert_close(result.x_adv, (x + eps * step).clamp(0, 1))


class Bumpy(nn.Module):
    """Two logits whose difference is a wave, so that steps overshoot its crests."""

    def forward(self, x):
        return torch.stack([torch.sin(20 * x).flatten(1).sum(1), torch.zeros(len(x), dtype=x.dtype)], dim=1)


@pytest.mark.parametrize(("norm", "eps"), THREATS)
@pytest.mark.parametrize("landscape", ["smooth", "bumpy"])
def test_pgd_is_its_steps_and_keeps_the_highest_loss(norm, eps, landscape):
    """Written out on images of four pixels, every loss along the way looked at."""
    _, classifier, x = small_problem()
    classifier = (Bumpy() if landscape == "bumpy" else classifier).eval()
    y, point = torch.arange(5) % 2, x.clone()
    points, losses = [], []
    for _ in range(9):
        point = point.detach().requires_grad_()
        loss = F.cross_entropy(classifier(point), y, reduction="none")
        points.append(point.detach())
        losses.append(loss.detach())
        slope = torch.autograd.grad(loss.sum(), point)[0]
        direction = slope.sign() if norm == "Linf" else F.normalize(slope.flatten(1), dim=1).view_as(slope)
        point = project(point.detach() + PGD_STEP * eps * direction, x, norm, eps)
    highest = torch.stack(losses).argmax(0)
    assert landscape == "smooth" or (highest < 8).any()
    best = torch.stack(points)[highest, torch.arange(5)]
    result = attack("pgd", norm=norm, eps=eps, n_iter=8)(classifier, x, y, start=x)
    torch.testing.assert_close(result.x_adv, best)


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_the_first_gradient_is_taken_at_the_start(digits, classifier, name, norm, eps):
    """APGD's to the bit, where the start is in the ball; also on its surface, as attacks leave it."""
    generator = torch.Generator().manual_seed(5)
    inside = project(
        digits.x + eps * torch.randn(digits.x.shape, generator=generator), digits.x, norm, 0.9 * eps
    )
    surface = attack("apgd-ce", norm=norm, eps=eps)(classifier, digits.x, digits.y).x_adv
    spy = Spy(classifier)
    for start in (inside, surface):
        spy.seen.clear()
        attack(name, norm=norm, eps=eps, eot=1)(spy, digits.x, digits.y, start=start)
        assert torch.equal(spy.seen[0], digits.x)  # whether the images were right at first
        torch.testing.assert_close(spy.seen[1], start)
        assert name == "pgd" or torch.equal(spy.seen[1], start)
    spy.seen.clear()
    attack(name, norm=norm, eps=eps, eot=1)(spy, digits.x, digits.y)
    assert (distance(spy.seen[1], digits.x, norm) > 0).all()  # without one, at a random point
    assert (distance(spy.seen[1], inside, norm) > 0).all()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_images_are_in_the_ball_wherever_the_attack_was_started(digits, classifier, name, norm, eps):
    """Some far outside it, some out of [0, 1], one inside, which alone is left where it is."""
    start = digits.x + 0.6
    start[::2] = (1 - digits.x[::2]).clamp(0, 1)
    start[3] = digits.x[3]
    spy = Spy(classifier)
    result = attack(name, norm=norm, eps=eps, n_iter=2, eot=1)(spy, digits.x, digits.y, start=start)
    assert float(distance(result.x_adv, digits.x, norm).max()) <= eps * (1 + 1e-5)
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1
    if name in STARTED:
        torch.testing.assert_close(spy.seen[1], project(start, digits.x, norm, eps))
        assert torch.equal(spy.seen[1][3], start[3])
    assert any("takes no start" in text for text in result.warnings) == (name not in STARTED)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce"])
def test_a_good_start_is_not_lost(digits, classifier, name):
    """One iteration from the end of a long attack leaves no lower loss than it was given."""
    strong = attack("apgd-ce", n_iter=20)(classifier, digits.x, digits.y).x_adv
    result = attack(name, n_iter=1)(classifier, digits.x, digits.y, start=strong)
    found, given = (cross_entropy(classifier(x), digits.y) for x in (result.x_adv, strong))
    assert (found >= given - 1e-5).all()


# --- projection and margin ---


def test_projection_is_the_closed_form():
    x = torch.tensor([0.5, 0.5, 0.9, 0.1], dtype=torch.float64).reshape(1, 1, 2, 2)
    shift = torch.tensor([0.3, -0.4, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)  # of length 0.5
    clipped = torch.tensor([0.25, -0.25, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    torch.testing.assert_close(project(x + shift, x, "L2", 0.25), x + shift / 2)
    torch.testing.assert_close(project(x + shift, x, "Linf", 0.25), x + clipped)
    for norm in ("L2", "Linf"):
        torch.testing.assert_close(project(x + shift, x, norm, 0.6), x + shift)  # inside: left alone
        assert torch.equal(project(x, x, norm, 0.25), x)
    out = torch.tensor([0.0, 0.0, 0.3, -0.4], dtype=torch.float64).reshape(1, 1, 2, 2)
    expected = torch.tensor([0.5, 0.5, 1.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    for norm in ("L2", "Linf"):
        torch.testing.assert_close(project(x + out, x, norm, 0.5), expected)  # cut off at 0 and 1


def test_margin_by_hand():
    logits = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0], [-3.0, -3.0, -4.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [-3.0, 4.0, 0.0]


# --- what is refused, and what is told ---


class Flat(nn.Module):
    """Linear in the pixels of images (n, 1, 8, 8), with so many classes; its weights are no parameters."""

    def __init__(self, classes):
        super().__init__()
        self.weights = torch.randn(64, classes, generator=torch.Generator().manual_seed(0))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.weights


@pytest.mark.parametrize("norm", ["linf", "Linf", "LINF", "l2", "L2"])
def test_norms_are_known_in_any_case_and_eps_as_a_fraction(norm):
    made = Attack("pgd", norm, "8/255")
    assert (made.norm, made.eps) == ({"linf": "Linf", "l2": "L2"}[norm.lower()], 8 / 255)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(project(x + 1, x, norm, 0.1), project(x + 1, x, made.norm, 0.1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": "l1"}, "norm: expected one of linf, l2; got 'l1'"),
        ({"eps": 0}, "eps: expected a number greater than 0; got 0"),
        ({"eps": "8/0"}, "eps: expected a number or a fraction such as \"8/255\"; got '8/0'"),
        ({"n_iter": 0}, "n_iter: expected a whole number of at least 1; got 0"),
        ({"eot": 1.5}, "eot: expected a whole number of at least 1; got 1.5"),
        ({"n_targets": 0}, "n_targets: expected a whole number of at least 1; got 0"),
        ({"square_queries": "many"}, "square_queries: expected a whole number .*; got 'many'"),
        ({"max_batch": 0}, "max_batch: expected a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed: expected a whole number of at least 0 and at most .*; got -1"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attack("pgd", **given)


def test_an_eot_that_cannot_be_is_refused(classifier):
    for given, message in (((0, 5), "eot: expected"), ((5, 0), "max_batch: expected")):
        with pytest.raises(ValueError, match=message):
            BatchedEOT(classifier, *given, cross_entropy)
    with pytest.raises(ValueError, match="norm: expected one of linf, l2; got 'lsup'"):
        project(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), "Lsup", 0.1)


X, Y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
LABELS = r"y: expected one label per image, shape \(4,\), torch.int64, on cpu; got "
STARTS = r"start: expected images like x, shape \(4, 1, 8, 8\), torch.float32, on cpu; got "


class Constant(Flat):
    """Gives the same in any case."""

    def __init__(self, given):
        super().__init__(10)
        self.given = given

    def forward(self, x):
        return self.given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": F.relu}, "model: expected a torch.nn.Module; got function"),
        ({"model": Flat(10).train()}, "model: is in train mode"),
        ({"model": nn.Linear(8, 8, device="meta").eval()}, "model: expected on cpu, where the images are"),
        ({"model": Constant([1])}, r"classifier: expected logits \(4, K\) of two classes or more; got list"),
        ({"model": Constant(torch.rand(4))}, r"classifier: expected logits \(4, K\).*; got shape \(4,\)"),
        ({"x": X.numpy()}, "x: expected at least one image, .*; got ndarray"),
        ({"x": X * torch.nan}, r"x: expected values in \[0, 1\]; got NaN"),
        ({"y": Y.numpy()}, LABELS + "ndarray"),
        ({"y": Y[:3]}, LABELS + r"shape \(3,\), torch.int64, on cpu"),
        ({"y": Y.to("meta")}, LABELS + r"shape \(4,\), torch.int64, on meta"),
        ({"y": Y + 10}, "y: expected labels among the model's classes, 0 to 9; got 10 to 10"),
        ({"y": Y - 1}, "y: expected labels among the model's classes, 0 to 9; got -1 to -1"),
        ({"start": X.numpy()}, STARTS + "ndarray"),
        ({"start": X.double()}, STARTS + r"shape \(4, 1, 8, 8\), torch.float64, on cpu"),
        ({"start": X * torch.nan}, "start: expected finite values; got NaN or infinity"),
    ],
)
def test_what_cannot_be_attacked_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attack("pgd")(**{"model": Flat(10), "x": X, "y": Y} | given)


def test_a_model_that_gives_nan_is_refused():
    with pytest.raises(FloatingPointError, match="NaN or infinity from the model"):
        attack("pgd")(Constant(torch.full((4, 10), torch.nan)), X, Y)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_met(name, classes, digits):
    """DLR compares three logits and targeted DLR four; targets are no more than the wrong classes."""
    model = Flat(classes)
    y = model(digits.x).argmax(1)
    if (name, classes) == ("apgd-dlr", 2):
        with pytest.raises(ValueError, match="attack: apgd-dlr compares 3 classes; the model has 2"):
            attack(name)(model, digits.x, y)
        return
    result = attack(name, n_targets=9)(model, digits.x, y)
    assert float(distance(result.x_adv, digits.x, "Linf").max()) <= 0.15 * (1 + 1e-5)
    left_out = {
        ("rand", 2): "apgd-dlr",
        ("em", 2): "dlr",
        ("standard", 2): "apgd-t",
        ("standard", 3): "apgd-t",
    }.get((name, classes))
    told = [text for text in result.warnings if "left out" in text]
    assert bool(told) == bool(left_out) and all(left_out in text for text in told)
    assert not any("target classes" in text for text in result.warnings)


@pytest.mark.parametrize("name", ["pgd", "rand", "standard"])
def test_probabilities_are_told_of(name, digits, classifier, recwarn):
    usual = attack(name)(classifier, digits.x, digits.y)
    assert not recwarn.list and not any("probabilities" in text for text in usual.warnings)
    with pytest.warns(UserWarning, match="the model returns probabilities, not logits"):
        result = attack(name)(nn.Sequential(classifier, nn.Softmax(1)).eval(), digits.x, digits.y)
    assert any("probabilities" in text for text in result.warnings)


def test_a_warning_is_of_this_model_not_of_one_before(digits, classifier):
    """AutoAttack keeps in mind that it once saw a defence that asks for gradients."""
    attack("square")(defended(classifier), digits.x, digits.y)
    assert attack("square")(classifier, digits.x, digits.y).warnings == ()


@pytest.mark.parametrize("name", ATTACKS)
def test_inference_mode_makes_no_difference(name, digits, classifier):
    expected = attack(name)(classifier, digits.x, digits.y)
    with torch.inference_mode():
        x, y = digits.x.clone(), digits.y.clone()
        result = attack(name)(classifier, x, y, start=x.clone() if name in STARTED else None)
    if name not in STARTED:
        assert torch.equal(result.x_adv, expected.x_adv)
