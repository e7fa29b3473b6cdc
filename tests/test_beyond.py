"""The search of notebook 08 on made-up scores and on a few images."""

import pytest
from made_up import scored

from coup_lib.defences import CANDIDATES, RIVALS
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Transfer, worst_case
from coup_lib.reporting import tables
from coup_lib.studies import beyond
from coup_lib.studies.beyond import Found, Setting


def row(**right):
    """Scores of ten images of which the last `right` are right, per source."""
    made = {}
    for name in (*beyond.SOURCES, Transfer("averaged", "margin")):
        made[name] = scored(10 - right.get(name, 10), 10)
    return Found(made, worst_case(list(made.values())))


@pytest.fixture
def found():
    return {
        Setting("reverse"): row(exact=6),
        Setting("coup", 1.0): row(exact=9, first_order=5),
        Setting("smoothed", 1.0): row(exact=8, from_none=7),
        Setting("averaged"): row(exact=9),
    }


def test_the_winner_is_guided_and_best_under_its_worst_source(found):
    assert beyond.best_guided(found) == Setting("smoothed", 1.0)
    assert found[Setting("coup", 1.0)].right["worst"].mean() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("winner", "twin"),
    [("coup-averaged", "averaged"), ("guided-diffpure", "diffpure"), ("smoothed", "reverse")],
)
def test_a_winner_must_face_its_own_purifier_without_guidance(winner, twin):
    chosen = beyond.to_confirm(Setting(winner, 2.0), 1.0)
    plain = [Setting(name) for name in dict.fromkeys(("reverse", twin))]
    assert chosen == [*plain, Setting("coup", 1.0), Setting(winner, 2.0)]
    assert beyond.to_confirm(Setting("coup", 1.0), 1.0) == [Setting("reverse"), Setting("coup", 1.0)]
    # Its gain is guidance's only if it is above both.
    n_right = {Setting(name): 0 for name in ("reverse", twin)} | {Setting("coup", 1.0): 0}
    for control in plain:
        found = {setting: row(exact=n) for setting, n in (n_right | {control: 10}).items()}
        found[Setting(winner, 2.0)] = row(exact=9)
        assert "**No guided purifier" in beyond.verdict(found, Setting(winner, 2.0))


def test_every_candidate_is_tried_at_every_weight():
    tried = beyond.settings([0.5, 2.0])
    assert {setting.defence for setting in tried} == {*beyond.RIVALS, *CANDIDATES}
    assert Setting("coup", 0.5) in tried and Setting("coup", 2.0) in tried
    assert [setting for setting in tried if setting.defence == "reverse"] == [Setting("reverse")]


def test_everyone_faces_the_same_kinds_of_attack():
    for defence in (*beyond.RIVALS, *CANDIDATES, *RIVALS):
        assert set(beyond.sources(defence)) == set(beyond.SOURCES)


def test_what_reads_the_image_is_attacked_by_its_exact_gradient_from_elsewhere_too():
    """There the first-order gradient leaves out how the image guides, and is the weaker attack."""
    for defence, gradient in (("coup", "first_order"), ("gdmp", "exact"), ("prediction", "exact")):
        faced = beyond.sources(defence)
        assert {faced[name].gradient for name in ("warm", "worst_draw")} == {gradient}
        assert faced["first_order"].gradient == "first_order"


def test_the_verdict_says_what_the_interval_says(found):
    wins = beyond.verdict(found, Setting("smoothed", 1.0))
    assert "**No guided purifier" in wins
    better = {Setting("reverse"): row(exact=0), Setting("smoothed", 1.0): row()}
    assert "keeps its gain under the worst of these attacks" in beyond.verdict(
        better, Setting("smoothed", 1.0)
    )


def test_the_table_has_every_setting(found):
    rows = beyond.rows(found, Config(n_images=10))
    assert rows[0].label == "no guidance, averaged"  # the best worst case
    assert len(tables.long_form(rows, beyond.COLUMNS)) == len(found) * len(beyond.COLUMNS)


def test_a_search_on_a_few_images(results_folder):
    config = Config(n_images=3, n_draws=2, split="validation", purpose="search")
    tried = [Setting("reverse"), Setting("smoothed", 2.0)]
    found = beyond.measure(config, tried)
    assert list(found) == tried
    assert all(score.report.shape == (3, 2) for each in found.values() for score in each.scores.values())
    assert len(list(results_folder.rglob("*guided*"))) == 0
    assert list(results_folder.rglob("score-smoothed-on-*-apgd-margin-smoothed-exact-*.json"))
    made = {Transfer("averaged", name) for name in ("exact", "margin", "warm", "worst_draw")}
    first, second = (set(found[setting].scores) for setting in tried)
    assert made < first and made | {Transfer("reverse", "margin")} < second


def test_both_ways_what_is_made_against_one_is_tried_on_the_other(results_folder):
    config = Config(n_images=3, n_draws=2, purpose="compare", n_iter=1, eot=1)
    tried = [Setting("reverse"), Setting("diffpure"), Setting("coup", 1.0), Setting("smoothed", 2.0)]
    found = beyond.measure(config, tried, both_ways=True)
    names = ("exact", "first_order", "margin", "warm", "worst_draw")
    guided = {Transfer(str(setting), name) for setting in tried[2:] for name in names}
    assert all(guided < set(found[setting].scores) for setting in tried[:2])
    assert not guided & (set(found[tried[2]].scores) | set(found[tried[3]].scores))
    plain = {Transfer("diffpure", "margin"), Transfer("diffpure", "warm")}  # its exact one is in `SOURCES`
    assert all(plain < set(found[setting].scores) for setting in tried if setting.defence != "diffpure")
    # At each one's own λ.
    names = [path.name for path in results_folder.rglob("score-reverse-on-*-apgd-margin-smoothed-*.json")]
    assert len(names) == 1
