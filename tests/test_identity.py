"""Whose record is it? A record is found by the content of what made it, whatever that is called."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from coup_lib.auditing import protocol
from coup_lib.auditing.protocol import Prepared
from coup_lib.data import Images, load_split
from coup_lib.evaluation import identity
from coup_lib.evaluation.bench import Bench, against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.run import Runner
from coup_lib.evaluation.specs import CLEAN, AttackSpec
from coup_lib.score import NoiseScore
from coup_lib.sde import VPSDE

TINY = Config(n_images=6, n_iter=2, eot=1, n_draws=2, n_steps=2)


def untrained() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)


def test_the_name_of_a_network_does_not_matter_and_its_weights_do():
    one, other = untrained(), untrained()
    assert identity.of_network(one) == identity.of_network(other)
    assert identity.of_network(other.double()) == identity.of_network(one)
    changed = untrained()
    before = identity.of_network(changed)
    changed[1].bias += 1e-3
    assert before == identity.of_network(one) != identity.of_network(changed)


def test_a_classifier_that_a_caller_puts_in_gets_no_record_of_another():
    """An untrained network has no part in what was published of cnn-small."""
    usual = Evaluation(TINY, verbose=False)
    there = usual.predictions({"none": {"clean": CLEAN}})["none"]["clean"]
    mine = Evaluation(TINY, verbose=False)
    mine.bench.classifier = untrained()
    for spec in (against("apgd-ce", "none"), against("apgd-ce", "coup")):
        assert mine.attack_settings(spec) != usual.attack_settings(spec)
    assert mine.predictions({"none": {"clean": CLEAN}})["none"]["clean"].right.mean() < there.right.mean()


def test_the_zoos_network_is_the_same_loaded_or_not():
    evaluation = Evaluation(TINY, verbose=False)
    before = evaluation.bench.settings("coup")
    assert evaluation.bench.classifier is not None and evaluation.bench.score_network is not None
    assert evaluation.bench.settings("coup") == before


def test_other_pixels_at_the_same_places_are_another_record():
    usual, mine = Evaluation(TINY, verbose=False), Evaluation(TINY, verbose=False)
    images = load_split("digits", "test").first(TINY.n_images)
    mine.images = images
    assert mine.attack_settings(CLEAN) == usual.attack_settings(CLEAN)
    mine.images = Images(1 - images.x, images.y)
    assert mine.attack_settings(CLEAN) != usual.attack_settings(CLEAN)


def test_a_defence_that_nobody_knows_by_name_is_attacked_and_scored_like_the_papers():
    model, x = untrained(), load_split("digits", "test").first(TINY.n_images).x
    images = Images(x, model(x).argmax(1))  # so that it is right on all of them
    foreign = Prepared(None, {"exact": model}, model, {"exact": identity.of_network(model)}, seconds=0.001)
    bench = protocol.Bench({"mine": foreign})
    runner = Runner(replace(TINY, eps=0.9), bench, lambda: images, dict, verbose=False)
    row = {"clean": CLEAN, "own": AttackSpec("apgd-ce", "mine")}
    scores = runner.predictions({"mine": row})["mine"]
    assert scores["own"].counted.shape == (6,)
    assert scores["own"].right.mean() < scores["clean"].right.mean() == 1


class Own(Bench):
    """A bench whose classifier is a caller's, loaded when it is asked for."""

    @property
    def classifier(self) -> nn.Module:
        return untrained()


def test_a_bench_with_its_own_classifier_is_identified_by_that():
    usual, own = Bench(TINY), Own(TINY)
    assert own.settings("none")["classifier_sha256"] != usual.settings("none")["classifier_sha256"]
    assert own.settings("coup")["score_sha256"] == usual.settings("coup")["score_sha256"]


def test_an_exchanged_network_has_its_own_attacks_and_predictions():
    """One evaluation, two networks one after the other: each as in an evaluation of its own."""
    spec, found = against("apgd-ce", "none"), []
    exchanged, alone = Evaluation(TINY, verbose=False), Evaluation(TINY, verbose=False)
    exchanged.predictions({"none": {"it": spec}})
    for evaluation in (exchanged, alone):
        evaluation.bench.classifier = untrained()
        predicted = evaluation.predictions({"none": {"it": spec}})["none"]["it"]
        found.append((predicted.report.tolist(), predicted.counted.tolist(), evaluation.x_adv(spec).tolist()))
    assert found[0] == found[1]


def test_constants_of_a_network_in_hand_are_part_of_it():
    """Weights do not tell a score's SDE, nor the kind of a layer."""
    usual, other = Bench(TINY), Bench(TINY)
    network = usual.score_network.network
    other.score_network = NoiseScore(network, VPSDE(0.1, 40)).eval()
    assert other.settings("reverse") != usual.settings("reverse")
    layers = [nn.Sequential(nn.Flatten(), kind(), nn.Linear(64, 10)).eval() for kind in (nn.ReLU, nn.Sigmoid)]
    layers[1].load_state_dict(layers[0].state_dict())
    named = [identity.of_content(each) for each in layers]
    assert named[0] != named[1]


def test_another_score_network_cannot_be_lowered_by_name():
    bench = Bench(replace(TINY, precision="bfloat16"))
    bench.score_network = untrained()
    with pytest.raises(ValueError, match="score_network: expected the profile's own"):
        bench.attacked(against("apgd-ce", "reverse"))
