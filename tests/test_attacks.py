"""The adapter over AutoAttack, on the real thing and on small inputs."""

import sys
import types

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from closed_forms import small_problem

from coup_lib import attacks
from coup_lib.attacks import BatchedEOT, run_attack
from coup_lib.checkpoints import load_network
from coup_lib.data import load_split
from coup_lib.purify import coup
from coup_lib.score import NoiseScore

SMALL = {"norm": "Linf", "eps": 0.15, "seed": 1, "n_iter": 5, "eot": 2, "n_targets": 3, "square_queries": 20}


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", "validation").first(16)


@pytest.fixture(scope="module")
def classifier():
    return load_network("digits", "cnn-small")


def defended(classifier):
    return coup(classifier, NoiseScore(load_network("digits", "score")), n_steps=4, seed=7)


def apgd(model, **settings):
    return pyautoattack.autoattack.APGDAttack(
        model, n_iter=5, norm="Linf", eps=0.15, seed=1, device="cpu", **settings
    )


def test_batched_eot_is_the_mean_over_draws_of_the_sequential_one():
    score, classifier, x = small_problem()
    y, model = torch.arange(5) % 3, coup(classifier, score, n_steps=4)
    model.purifier.reseed(3)
    _, loss, gradient = BatchedEOT(model, 6, 640, apgd(model).dlr_loss).get_logits_loss_grad_xent(x, y)
    model.purifier.reseed(3)
    total = torch.zeros_like(x)
    for _ in range(6):
        at = x.clone().requires_grad_()
        last = F.cross_entropy(model(at), y, reduction="none")
        total += torch.autograd.grad(last.sum(), at)[0]
    torch.testing.assert_close(gradient, total / 6)
    torch.testing.assert_close(loss, last.detach())


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


def test_batched_apgd_takes_the_steps_of_autoattacks_own(digits, classifier):
    """On a deterministic model EOT changes nothing, so APGD with our interface must equal APGD without it."""
    theirs = apgd(classifier, eot_iter=3).perturb(digits.x, digits.y)
    batched = BatchedEOT(classifier, 3, 640, apgd(classifier).dlr_loss)
    ours = apgd(batched, is_tf_model=True).perturb(digits.x, digits.y)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["standard", "rand"])
def test_the_adapter_gives_autoattacks_own_numbers(digits, classifier, name):
    """Full budgets against a bare AutoAttack object on an undefended classifier."""
    x, y = digits.x[:2], digits.y[:2]
    version = pyautoattack.AutoAttack(classifier, norm="Linf", eps=0.05, seed=1, version=name)
    expected, labels = version.run_standard_evaluation(x, y, batch_size=640)
    result = run_attack(name, classifier, x, y, norm="Linf", eps=0.05, seed=1)
    torch.testing.assert_close(result.x_adv, expected)
    assert torch.equal(result.robust, labels == y)


def test_the_original_package_is_used_where_it_is_there(digits, classifier, monkeypatch):
    """`autoattack` has the same attacks behind other names; a stand-in with its signatures gives the same."""

    class AutoAttack(pyautoattack.AutoAttack):
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, version="standard", device="cuda"):
            super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs)
            return (x_adv, y_adv) if return_labels else x_adv

    ours = run_attack("rand", classifier, digits.x, digits.y, **SMALL)
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    assert attacks.autoattack_class() is AutoAttack
    original = run_attack("rand", classifier, digits.x, digits.y, **SMALL)
    assert torch.equal(ours.x_adv, original.x_adv) and torch.equal(ours.robust, original.robust)


@pytest.mark.parametrize("name", ["apgd-ce", "standard", "rand"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.15), ("L2", 0.5)])
def test_images_stay_in_the_ball_and_in_range(digits, classifier, name, norm, eps):
    settings = SMALL | {"norm": norm, "eps": eps}
    result = run_attack(name, defended(classifier), digits.x, digits.y, **settings)
    distance = (result.x_adv - digits.x).flatten(1).norm(p={"Linf": torch.inf, "L2": 2}[norm], dim=1)
    assert float(distance.max()) <= eps * (1 + 1e-5)
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1
    assert result.robust.shape == (16,) and result.robust.dtype == torch.bool


def test_attacks_break_an_undefended_classifier(digits, classifier):
    assert run_attack("clean", classifier, digits.x, digits.y, **SMALL).robust.float().mean() > 0.9
    for name in ("apgd-ce", "standard", "rand"):
        settings = SMALL | {"n_iter": 20, "eps": 0.3}
        assert run_attack(name, classifier, digits.x, digits.y, **settings).robust.sum() == 0


def test_apgd_ce_moves_every_image(digits, classifier):
    """Also those that it never saw misclassified: they are needed against other defences."""
    result = run_attack("apgd-ce", defended(classifier), digits.x, digits.y, **SMALL)
    assert ((result.x_adv - digits.x).flatten(1).abs().amax(1) > 0).all()


def test_autoattacks_warnings_are_kept(digits, classifier):
    said = " ".join(
        run_attack("standard", defended(classifier), digits.x[:4], digits.y[:4], **SMALL).warnings
    )
    assert "randomized defense" in said and "dynamic defense" in said


@pytest.mark.parametrize("name", ["apgd-ce", "standard", "rand"])
def test_an_attack_repeats_with_its_seeds_whatever_was_drawn_before(digits, classifier, name):
    results = []
    for seed in (0, 1):
        model = defended(classifier)
        torch.manual_seed(seed)
        results.append(run_attack(name, model, digits.x, digits.y, **SMALL))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), after)  # the caller's generator is left alone
    assert torch.equal(results[0].x_adv, results[1].x_adv)


def test_an_unknown_attack_is_refused(digits, classifier):
    with pytest.raises(ValueError, match="attack: expected one of clean, apgd-ce, standard, rand; got 'pgd'"):
        run_attack("pgd", classifier, digits.x, digits.y, **SMALL)
