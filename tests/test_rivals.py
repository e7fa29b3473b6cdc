"""The rivals of notebook 08: their controls, their verdicts, and the compression of their paths."""

import numpy as np
import pytest
import torch
from test_beyond import row

from coup_lib.defences import PURIFIERS, RIVALS
from coup_lib.evaluation.bench import Bench
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.studies import beyond, rivals
from coup_lib.studies.beyond import Setting

CONFIG = Config(n_images=3, n_draws=2, n_iter=1, eot=1, purpose="rivals")


def test_each_rival_is_measured_at_its_best_weight_beside_its_own_purifier_without_guidance():
    tried = {Setting("gdmp", w): row(exact=n) for w, n in ((10.0, 3), (30.0, 8))}
    tried |= {Setting("prediction", 1.0): row(exact=5), Setting("robust-guide", 3.0): row()}
    chosen = rivals.chosen(tried, 1.0)
    assert {one.defence for one in chosen} >= {*RIVALS, "coup", "robust-guide"}
    assert Setting("gdmp", 30.0) in chosen and Setting("other-norm-guide", 3.0) in chosen
    controls = {"gdmp": "diffpure", "prediction": "reverse", "flow": "reverse", "other-norm-guide": "reverse"}
    for one in chosen:
        assert beyond.twin(one) in chosen
        assert beyond.twin(one) == Setting(controls.get(one.defence, "reverse"))
    assert {one.defence for one in rivals.settings("full")} == {"gdmp", "prediction"}


def test_the_verdict_judges_guidance_the_guide_and_the_gradients():
    found = {
        Setting("reverse"): row(exact=4),
        Setting("diffpure"): row(exact=9),
        Setting("gdmp", 30.0): row(exact=0, first_order=10),
        Setting("robust-guide", 3.0): row(exact=10, first_order=1),
    }
    alone = {"linf": row(exact=0), "l2": row()}
    tried = {Setting("coup", 3.0): row(exact=9, first_order=0)}
    lines = rivals.verdict(found, alone, tried, CONFIG).splitlines()
    (gdmp,) = (line for line in lines if "distance (GDMP), λ = 30 is more robust than DiffPure" in line)
    assert gdmp.count("does not hold") == 2 and "-90.00" in gdmp
    (guide,) = (line for line in lines if "is more robust than the guide alone, trained for L∞" in line)
    assert "+100.00" in guide and "+10.00" in guide
    judged = {line.split(":")[0]: line for line in lines if "first-order gradient is the stronger" in line}
    assert len(judged) == 2
    assert "does not hold" in judged["| guided by distance (GDMP), λ = 30"]
    assert "**holds**" in judged["| COUP, λ = 3"]


def test_a_guide_of_the_other_norm_is_the_one_trained_for_it():
    named = {
        (norm, name): PURIFIERS[name].guide_norm(norm)
        for norm in ("linf", "l2")
        for name in ("robust-guide", "other-norm-guide")
    }
    assert [named["linf", name] for name in ("robust-guide", "other-norm-guide")] == ["linf", "l2"]
    assert [named["l2", name] for name in ("robust-guide", "other-norm-guide")] == ["l2", "linf"]
    own, other = (
        Bench(CONFIG).defence(name).purifier.score.classifier.state_dict()
        for name in ("robust-guide", "other-norm-guide")
    )
    assert not all(map(torch.equal, own.values(), other.values()))


def test_compression_is_the_distance_after_over_the_distance_before(results_folder, monkeypatch):
    """Of a purifier that halves all differences one half, whatever its noise; it is then on record."""
    assert (rivals.compression(CONFIG, Setting("diffpure")) > 0).all()
    before = len(list(results_folder.rglob("compression-*.json")))

    class Halving:
        def purifier(self, x, seeds):
            return x / 2 + seeds[:, None, None, None] % 7

    monkeypatch.setattr(Bench, "defence", lambda self, name: Halving())
    found = rivals.compression(CONFIG, Setting("reverse"))
    assert found == pytest.approx(np.full(3, 0.5), abs=1e-6)
    assert len(list(results_folder.rglob("compression-*.json"))) == before + 1


def test_guides_alone_and_rows_are_shown_beside_the_rest(results_folder):
    which = [Setting("reverse"), Setting("gdmp", 30.0)]
    found, alone = beyond.measure(CONFIG, which, lent=()), rivals.guides_alone(CONFIG)
    assert {*alone} == {"linf", "l2"} and {*alone["l2"].right} == {*rivals.ALONE, "worst", "recorded"}
    rows = rivals.rows(found, alone, CONFIG)
    assert [row.label for row in rows[2:]] == [f"the guide alone, trained for {n}" for n in ("L∞", "L2")]
    rates = [row.shown[rivals.RATE] for row in rows]
    assert rates[2:] == ["–", "–"] and all("[" in rate for rate in rates[:2])
    assert Evaluation(CONFIG).bench.settings("gdmp") != Evaluation(CONFIG).bench.settings("diffpure")
