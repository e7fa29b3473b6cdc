"""The same sources for every defence, and checks that can fail."""

from dataclasses import replace

import numpy as np
import pytest

from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.noise import DECIDE, image_seeds
from coup_lib.evaluation.outcomes import Predictions, Transfer
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import Missing, reading_only
from coup_lib.evaluation.run import predict
from coup_lib.outside import OUTSIDE, TRIED
from coup_lib.reporting import tables
from coup_lib.studies import stronger_attacks as stronger

RIGHT, WRONG = np.ones(40), np.zeros(40)
HALF = np.tile([1.0, 0.0], 20)


def score(right, labels=None):
    labels = np.arange(len(right)) % 10 if labels is None else labels
    report = np.where(right[:, None] == 1, labels[:, None], (labels[:, None] + 1) % 10)
    return Predictions(labels, report, report[:, 0], right, right == 1)


def test_purifiers_face_the_same_sources():
    """COUP alone has a first-order gradient of its own; the names, budgets and counts are the same."""
    config = Config(purpose="probe")
    rows = {name: stronger.sources(config, name) for name in ("diffpure", "reverse", "coup")}
    assert rows["diffpure"].keys() == rows["reverse"].keys() == rows["coup"].keys()
    for name in rows["coup"]:
        budgets = {(r[name].attack, r[name].n_iter, r[name].eot, r[name].n_steps) for r in rows.values()}
        assert len(budgets) == 1
    assert rows["reverse"]["first_order"] == rows["reverse"]["exact"]
    assert rows["coup"]["first_order"] != rows["coup"]["exact"]
    assert rows["reverse"]["pgd_first_order"] == rows["reverse"]["pgd"]
    assert {"adjoint", "bpda", "coarse"} & stronger.sources(config, "none").keys() == set()


def test_the_full_size_is_the_fields():
    full = Config(purpose="probe", n_iter=50, eot=20)
    row = stronger.sources(full, "coup")
    assert row["pgd"].n_iter == 200
    assert [row[f"eot_{place}"].eot for place in (1, 2, 3, 4)] == [1, 5, 20, 64]
    names = stronger.labels(full)
    assert names["pgd"] == "PGD-200, exact" and names["eot_4"].endswith("EOT 64")
    assert set(row) - set(names) == {"short", "quarter"}  # these two are only for the convergence check
    assert not [label for label in names.values() if "{" in label]


def purifier_row(**right):
    names = ("clean", "noise", "fgsm", "exact", "short", "quarter", "restart", "pgd", "square")
    row = dict.fromkeys((*names, *stronger.COMPARED), WRONG) | {"clean": RIGHT, "noise": RIGHT} | right
    return {name: score(values) for name, values in row.items()}


SERIES = {0.0: RIGHT, 1.0: HALF, 2.0: WRONG}
RISING = np.linspace(0, 1, 6)[:, None].repeat(40, 1)


def seen(row, series=SERIES, losses=RISING):
    return {
        sign.name for sign in stronger.checks({"coup": row}, {"coup": series}, {"coup": losses}) if sign.seen
    }


def test_a_sound_attack_shows_no_sign():
    assert seen(purifier_row()) == set()


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        (
            {"exact": HALF, "restart": HALF},
            {
                "an attack that sees less is stronger",
                "another gradient is stronger than its own",
                "images made against another defence are stronger",
            },
        ),
        ({"short": HALF, "exact": WRONG}, {"more iterations still find something"}),
        ({"short": HALF, "exact": HALF, "pgd": WRONG}, {"more iterations still find something"}),
        ({"exact": RIGHT, "short": RIGHT}, {"random noise does as much as the gradient"}),
        (
            {"first_order": WRONG, "exact": HALF, "short": HALF, "restart": WRONG},
            {"another start still finds something"},
        ),
    ],
)
def test_each_sign_can_be_seen(right, expected):
    assert expected <= seen(purifier_row(**right))


def test_accuracy_that_does_not_fall_and_loss_that_does_not_rise_are_signs():
    name = "accuracy at a large radius stays above chance"
    assert seen(purifier_row(), series=SERIES | {2.0: HALF}) == {name}
    assert seen(purifier_row(), series={0.0: RIGHT, 1.0: WRONG, 2.0: RIGHT, 4.0: WRONG}) == {name}
    assert seen(purifier_row(), losses=RISING[::-1]) == {"the loss does not rise along the gradient"}


def test_signs_are_shown_and_masking_is_named():
    row = purifier_row(exact=HALF, restart=HALF, short=HALF)
    found = stronger.checks({"coup": row}, {"coup": SERIES}, {"coup": RISING})
    text = stronger.check_table(found)
    assert "| another gradient is stronger than its own | ✗ first-order leaves 0.0 %, exact 50.0 % |" in text
    assert "| random noise does as much as the gradient | ✓ 100.0 % against 50.0 % |" in text
    assert text.endswith("Gradient masking is shown in: **COUP**.")
    assert stronger.check_table([sign for sign in found if not sign.seen]).endswith("**none of them**.")


def test_columns_accuracies_and_tables():
    config = Config(purpose="probe", n_images=3, n_iter=1, eot=1, square_queries=3, n_draws=2)
    evaluation = Evaluation(config, verbose=False)
    columns = stronger.columns(evaluation, ("none", "reverse", "coup"))
    recorded = evaluation.recorded(columns)
    results = stronger.per_image_accuracy(columns, recorded)
    for defence, row in results.items():
        expected = recorded[defence].expected.mean()
        assert all(expected <= one.selection.mean() + 1e-9 for one in columns[defence].values())
        assert {"two_runs", "transferred"} < set(row) and (row["recorded"] == recorded[defence].right).all()
    # From the others the longest attacks and other losses; what is there already is not transferred again.
    assert {Transfer("reverse", "restart"), Transfer("none", "margin")} < set(columns["coup"])
    there = {Transfer("reverse", "exact"), Transfer("none", "exact"), Transfer("reverse", "fgsm")}
    assert not there & set(columns["coup"])
    assert Transfer("coup", "first_order") in columns["reverse"]
    assert (results["coup"]["fixed_own"] == columns["coup"]["fixed"].attack_robust).all()
    frame = stronger.across(tables.rows(results, config), stronger.labels(config))
    assert frame.loc["APGD-ce, BPDA", "No defence"] == "–"
    assert frame.index[-1] == "Worst case on record, per image"


def test_counts_by_many_draws_and_their_controls(monkeypatch):
    """The fresh draws of clean images begin alike in every count; what was drawn is on record."""
    monkeypatch.setattr(stronger, "MANY", 16)
    config = Config(purpose="probe", n_images=3, n_iter=1, eot=2, square_queries=3, n_draws=2)
    evaluation = Evaluation(config, verbose=False)
    columns = stronger.columns(evaluation, ("none", "reverse"))
    found, head = stronger.counts(evaluation, columns, evaluation.recorded(columns))
    for way in ("worst_draw", "clean_worst_draw"):
        assert head[f"many_{way}"].endswith("all of 16 draws") and head[way].endswith("all of 2 draws")
    assert head["any_draw"] == "Clean: all of 4 draws" and "autoattack" not in found["reverse"]
    row = found["reverse"]
    assert row["many_worst_draw"].mean() <= row["many_single"].mean()
    assert (row["many_clean_worst_draw"] <= row["any_draw"]).all()
    alone = found["none"]
    assert (alone["any_draw"] == alone["clean_single"]).all()
    assert (alone["many_majority"] == columns["none"]["exact"].right).all()
    with reading_only():
        again = stronger.counts(evaluation, columns, evaluation.recorded(columns))[0]
    assert (again["reverse"]["many_majority"] == row["many_majority"]).all()


def test_many_draws_are_fresh_and_of_each_images_strongest_attack():
    config = Config(purpose="probe", n_images=3, n_iter=1, eot=2, n_draws=2)
    evaluation = Evaluation(config, verbose=False)
    faced = {name: against(name, "reverse") for name in ("fgsm", "apgd-ce")}
    scores = evaluation.predictions({"reverse": faced})["reverse"]
    # By the draws that choose, the first image's strongest is FGSM, and the others' is APGD.
    for name, chosen in (("fgsm", [0.0, 1.0, 1.0]), ("apgd-ce", [1.0, 0.0, 0.0])):
        scores[name] = replace(scores[name], selection=np.array(chosen))
    given = {faced[name]: scores[name] for name in faced}
    votes = stronger.drawn(evaluation, "reverse", given, 5)
    x, y = evaluation.x_adv(faced["apgd-ce"]).clone(), evaluation.images.y
    x[0] = evaluation.x_adv(faced["fgsm"])[0]
    seeds = image_seeds(config.seed, DECIDE, range(3), 5)
    logits = predict(evaluation.bench.defence("reverse"), x, seeds, 64)
    assert np.allclose(votes.right, (logits.argmax(2) == y[:, None]).double().mean(1))
    assert (votes.average == logits.mean(1).argmax(1).numpy()).all()
    with reading_only(), pytest.raises(Missing):
        stronger.drawn(evaluation, "reverse", given, 6)


def test_attacks_outside_the_ball_are_in_no_worst_case():
    config = Config(purpose="probe", n_images=3, n_iter=1, eot=1, square_queries=3, n_draws=2)
    faced = {spec.attack for row in stronger.experiment(config).attacks.values() for spec in row.values()}
    assert not faced & {*OUTSIDE}
    evaluation = Evaluation(config, verbose=False)
    columns = evaluation.predictions({"reverse": {"exact": against("apgd-ce", "reverse")}})
    before = evaluation.recorded(columns)["reverse"]
    found = stronger.shares(stronger.outside_experiments(config, ("none", "reverse")))
    assert list(found) == ["none", "reverse"]
    assert all(list(row) == [*TRIED.values()] for row in found.values())
    after = evaluation.recorded(columns)["reverse"]
    assert before.n_sources == after.n_sources and (before.right == after.right).all()
