"""The same sources for every defence, and checks that can fail."""

import numpy as np
import pytest

from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Predictions, Transfer
from coup_lib.evaluation.protocol import Evaluation
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
        assert all(expected <= one.suspicion.mean() + 1e-9 for one in columns[defence].values())
        assert {"two_runs", "transferred"} < set(row) and (row["recorded"] == recorded[defence].right).all()
    # From the others the longest attacks and other losses; what is there already is not transferred again.
    assert {Transfer("reverse", "restart"), Transfer("none", "margin")} < set(columns["coup"])
    there = {Transfer("reverse", "exact"), Transfer("none", "exact"), Transfer("reverse", "fgsm")}
    assert not there & set(columns["coup"])
    assert Transfer("coup", "first_order") in columns["reverse"]
    assert (results["coup"]["fixed_own"] == columns["coup"]["fixed"].attack_robust).all()
    frame = stronger.sources_table(tables.rows(results, config), config)
    assert frame.loc["APGD-ce, BPDA", "No defence"] == "–"
    assert frame.index[-1] == "Worst case on record, per image"
    assert list(stronger.difference_table(results, config).index) == list(frame.index)
    assert len(stronger.decisions_table(columns, config)) == 3
