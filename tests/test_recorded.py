"""The worst case on record: one number per defence and images, whichever notebook made the attacks."""

from dataclasses import replace

import pytest

from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import CLEAN

CONFIG = Config(n_images=4, n_iter=2, eot=1, n_draws=2, n_steps=3)


def clean(config=CONFIG):
    """The clean column alone, and the worst case beside it."""
    evaluation = Evaluation(config, verbose=False)
    rows = evaluation.predictions({"coup": {"clean": CLEAN}})
    return rows["coup"]["clean"], evaluation.recorded(rows)["coup"]


def attack(config=CONFIG, target="coup", **source):
    rows = {target: {"it": against("pgd", "coup", **source)}}
    return Evaluation(config, verbose=False).predictions(rows)[target]["it"]


def test_an_attack_of_another_notebook_counts(results_folder):
    score, alone = clean()
    assert alone.n_sources == 1 and (alone.right == score.right).all()
    found = attack(n_iter=5)  # with a budget of its own
    _, worst = clean()
    assert worst.n_sources == 2
    assert worst.expected.mean() <= min(found.selection.mean(), score.selection.mean())


def test_the_first_images_of_a_larger_record_count(results_folder):
    larger = attack(replace(CONFIG, n_images=6))
    score, worst = clean()
    assert worst.n_sources == 2
    assert worst.expected.mean() <= min(larger.selection[:4].mean(), score.selection.mean())
    assert clean(replace(CONFIG, n_images=8))[1].n_sources == 1  # of these two images it says nothing


@pytest.mark.parametrize(
    "other",
    [
        {"norm": "l2", "t_star": 0.1, "eps": 0.15},
        {"eps": 0.2},
        {"split": "validation"},
        {"t_star": 0.05},
        {"guidance_weight": 2.0},
    ],
)
def test_other_threats_images_and_defences_do_not(results_folder, other):
    attack(replace(CONFIG, **other))
    attack(target="reverse")
    assert clean()[1].n_sources == 1
