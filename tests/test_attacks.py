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
from coup_lib.attacks import ATTACKS, PGD_STEP, Attack, BatchedEOT, cross_entropy, margin, project
from coup_lib.checkpoints import load_network
from coup_lib.data import load_split
from coup_lib.purify import coup
from coup_lib.score import NoiseScore

SMALL = {"norm": "Linf", "eps": 0.15, "seed": 1, "n_iter": 5, "eot": 2, "n_targets": 3, "square_queries": 20}
THREATS = [("Linf", 0.15), ("L2", 0.5)]
STARTED = ("pgd", "apgd-ce", "apgd-dlr", "apgd-margin")  # those that begin where they are told


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


def test_batched_apgd_takes_the_steps_of_autoattacks_own(digits, classifier):
    """On a deterministic model EOT changes nothing, so APGD with our interface must equal APGD without it."""
    theirs = apgd(classifier, eot_iter=3).perturb(digits.x, digits.y)
    batched = BatchedEOT(classifier, 3, 640, cross_entropy)
    ours = apgd(batched, is_tf_model=True).perturb(digits.x, digits.y)
    torch.testing.assert_close(ours, theirs)


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


def test_the_budgets_are_autoattacks_own_unless_told(classifier):
    """What a bare object of each version is set up with, read off it."""
    standard, rand = (
        pyautoattack.AutoAttack(classifier, norm="Linf", eps=0.1, seed=1, version=version)
        for version in ("standard", "rand")
    )
    default = Attack("standard", "Linf", 0.1, seed=1)
    ours = default._autoattack(classifier, attacks._Listener())
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


def rand_of_ours(classifier, x, y, norm, eps, **budget):
    """apgd-ce AND apgd-dlr, image by image, and both of them alone: three (n,) bool."""
    ce, dlr = (
        torch.cat(
            [
                Attack(f"apgd-{loss}", norm, eps, seed=1, **budget)(classifier, *image).robust
                for image in zip(x.split(1), y.split(1), strict=True)
            ]
        )
        for loss in ("ce", "dlr")
    )
    return ce & dlr, ce, dlr


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.27)])
def test_ce_and_dlr_together_are_autoattacks_rand(classifier, norm, eps):
    """On a deterministic classifier, where nothing but the composition can make a difference."""
    images = load_split("digits", "validation").first(60)
    x, y = images.x[-24:], images.y[-24:].clone()
    y[0] = (y[0] + 1) % 10  # one that is wrong before any attack
    expected = rand_of_autoattack(classifier, x, y, norm, eps, n_iter=10, eot_iter=2)
    ours, ce, dlr = rand_of_ours(classifier, x, y, norm, eps, n_iter=10, eot=2)
    assert torch.equal(ours, expected)
    assert 0 < expected.sum() < 24 and not ours[0]
    assert expected.sum() <= min(ce.sum(), dlr.sum())


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
@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_images_stay_in_the_ball_and_in_range(digits, classifier, name, norm, eps):
    x, y = digits.x[:8], digits.y[:8]
    result = attack(name, norm=norm, eps=eps)(defended(classifier), x, y)
    assert float(distance(result.x_adv, x, norm).max()) <= eps * (1 + 1e-5)
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1
    assert result.robust.shape == (8,) and result.robust.dtype == torch.bool
    assert not result.x_adv.requires_grad


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
    assert torch.equal(results[0].x_adv, results[1].x_adv)
    assert torch.equal(results[0].robust, results[1].robust)


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
    with pytest.raises(ValueError, match=r"attack: expected one of clean, noise, fgsm, .*; got 'rand'"):
        Attack("rand", "Linf", 0.1)


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
    classifier = Bumpy() if landscape == "bumpy" else classifier
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


@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_pgd_raises_the_loss(digits, classifier, norm, eps):
    x_adv = attack("pgd", norm=norm, eps=eps, n_iter=10)(classifier, digits.x, digits.y).x_adv
    before, fgsm = (
        cross_entropy(classifier(images), digits.y)
        for images in (digits.x, attack("fgsm", norm=norm, eps=eps)(classifier, digits.x, digits.y).x_adv)
    )
    after = cross_entropy(classifier(x_adv), digits.y)
    assert (after > before).all() and after.mean() > before.mean() + 0.5
    assert after.mean() > fgsm.mean()  # ten steps find more than one


def test_the_margin_attack_raises_the_margin(digits, classifier):
    x_adv = attack("apgd-margin", n_iter=10)(classifier, digits.x, digits.y).x_adv
    rise = margin(classifier(x_adv), digits.y) - margin(classifier(digits.x), digits.y)
    assert (rise > 1).all()


@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize(("norm", "eps"), THREATS)
def test_the_first_gradient_is_taken_at_the_start(digits, classifier, name, norm, eps):
    generator = torch.Generator().manual_seed(5)
    start = project(
        digits.x + eps * torch.randn(digits.x.shape, generator=generator), digits.x, norm, 0.9 * eps
    )
    spy = Spy(classifier)
    attack(name, norm=norm, eps=eps, eot=1)(spy, digits.x, digits.y, start=start)
    assert torch.equal(spy.seen[0], digits.x)  # whether the images were right at first
    torch.testing.assert_close(spy.seen[1], start)
    spy.seen.clear()
    attack(name, norm=norm, eps=eps, eot=1)(spy, digits.x, digits.y)
    assert (distance(spy.seen[1], digits.x, norm) > 0).all()  # without one, at a random point
    assert (distance(spy.seen[1], start, norm) > 0).all()


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


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_nothing_in_the_ball_is_nearer_than_the_projection(norm):
    """Away from the range's edges, in L2 distance, against 2000 random points of the ball."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), 0.2
    outside = x + 0.3 * torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    assert distance(outside, x, norm) > eps
    others = x + 2 * eps * (torch.rand(2000, 1, 2, 2, generator=generator, dtype=torch.float64) - 0.5)
    inside = others[distance(others, x, norm) <= eps]
    nearest = distance(project(outside, x, norm, eps), outside, "L2")
    assert len(inside) > 100 and (distance(inside, outside, "L2") > nearest).all()


def test_margin_by_hand():
    logits = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0], [-3.0, -3.0, -4.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [-3.0, 4.0, 0.0]
