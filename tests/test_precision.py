import dataclasses

import pytest
import torch
import torch.nn.functional as F

from coup_lib.attacks import Attack, AttackResult
from coup_lib.data import load_split
from coup_lib.evaluation import bench
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import record
from coup_lib.networks.precision import Bfloat16, products
from coup_lib.networks.zoo import load_score

LOWERED = Config(n_images=8, n_iter=2, eot=1, precision="bfloat16")
FULL = dataclasses.replace(LOWERED, precision="float32")


def gradient(config, name):
    model = Evaluation(config, verbose=False).bench.attacked(against("apgd-ce", name))
    data = load_split("digits", "validation").first(32)
    x = data.x.requires_grad_()
    loss = F.cross_entropy(model(x, seeds=torch.arange(len(x))), data.y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].flatten(1).double()


@pytest.mark.parametrize("name", ["diffpure", "reverse", "coup"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(name):
    exact, lowered = gradient(FULL, name), gradient(LOWERED, name)
    assert lowered.isfinite().all() and not torch.equal(exact, lowered)
    cosines = (exact * lowered).sum(1) / (exact.norm(dim=1) * lowered.norm(dim=1))
    assert cosines.mean() > 0.99


def test_what_comes_out_is_as_precise_as_what_goes_in():
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.05)
    full, lowered = (load_score("digits", "score", precision=name) for name in ("float32", "bfloat16"))
    assert lowered(x, t).dtype == torch.float32
    torch.testing.assert_close(lowered(x, t), full(x, t), rtol=0.05, atol=0.2)
    products_seen = []
    network = lowered.network.network
    network.head.register_forward_hook(lambda module, given, result: products_seen.append(result.dtype))
    lowered(x, t)
    assert products_seen == [torch.bfloat16]


def test_the_denoiser_is_lowered_inside_only(monkeypatch):
    monkeypatch.setenv("COUP_SMOKE", "1")
    score = load_score("cifar100", "edm-vp", precision="bfloat16")
    assert isinstance(score.denoiser.model, Bfloat16)
    assert score(torch.randn(2, 3, 32, 32), torch.tensor(0.1)).dtype == torch.float32


def test_attacks_are_lowered_and_scores_are_not():
    evaluation = Evaluation(LOWERED, verbose=False)
    assert isinstance(
        evaluation.bench.attacked(against("apgd-ce", "coup")).purifier.score.score.network, Bfloat16
    )
    assert not isinstance(evaluation.bench.defence("coup").purifier.score.score.network, Bfloat16)


def test_a_lowered_attack_is_a_record_of_its_own_and_an_undefended_one_is_not():
    def settings(config, defence):
        return Evaluation(config, verbose=False).attack_settings(against("apgd-ce", defence))[1]

    assert settings(LOWERED, "coup") == settings(FULL, "coup") | {"precision": "bfloat16"}
    assert settings(LOWERED, "none") == settings(FULL, "none")
    found = [
        Evaluation(config, verbose=False).x_adv(against("apgd-ce", "coup")) for config in (LOWERED, FULL)
    ]
    assert not torch.equal(*found)  # as the gradients differ in their last digits, some signs do


def test_tf32_is_a_gpus_to_compute_and_everyones_to_read():
    config = Config(precision="tf32", device="cpu", n_images=2, n_iter=1, eot=1, n_steps=2)
    evaluation = Evaluation(config, verbose=False)
    with pytest.raises(ValueError, match="precision: tf32 is a GPU's, expected float32 or bfloat16 on cpu"):
        evaluation.x_adv(against("apgd-ce", "reverse"))
    assert len(evaluation.x_adv(against("apgd-ce", "none"))) == 2  # has no score network


@pytest.mark.parametrize(("defence", "allowed"), [("none", False), ("reverse", True)])
def test_products_are_tf32s_where_a_purifier_is_attacked_and_nowhere_else(defence, allowed, monkeypatch):
    seen = []

    def attack(self, model, x, y, start=None):
        seen.append(torch.backends.cudnn.allow_tf32)
        return AttackResult(x, torch.ones(len(x), dtype=torch.bool))

    monkeypatch.setattr(Attack, "__call__", attack)
    monkeypatch.setattr(bench, "check_precision", lambda precision, device: None)
    Evaluation(Config(precision="tf32", n_images=2), verbose=False).x_adv(against("apgd-ce", defence))
    assert seen == [allowed]


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("bfloat16", False), ("tf32", True)])
def test_products_says_what_a_gpu_may_do_and_leaves_it_as_it_was(precision, allowed):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    with pytest.raises(KeyboardInterrupt), products(precision):
        assert [backend.allow_tf32 for backend in backends] == [allowed] * 2
        raise KeyboardInterrupt
    assert [backend.allow_tf32 for backend in backends] == before


def test_what_a_record_holds_is_computed_in_float32_unless_it_says_otherwise(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    found = record("p", "name", {}, lambda: {"allowed": torch.backends.cudnn.allow_tf32})
    assert found["result"]["allowed"] is False
