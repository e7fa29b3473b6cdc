"""Fig. 2c: classifiers by training, and verdicts on the cross setting and on the combination."""

import matplotlib.pyplot as plt
import pytest
from made_up import losing

from coup_lib.attacks import NORMS
from coup_lib.evaluation.config import Config
from coup_lib.reporting import tables
from coup_lib.studies import adversarial_training as cross

N = 100
CONFIGS = {norm: Config(norm=norm, n_images=N) for norm in NORMS}
JUDGED = tables.headings(cross.JUDGED, CONFIGS["linf"])


def row(adaptive, worst):
    """Columns of which these many of N images are lost."""
    lost = {"clean": 0, "adaptive": adaptive, "first_order": 0, "from_none": 0, "from_reverse": 0}
    return {name: losing(wrong, N) for name, wrong in (lost | {"recorded": worst}).items()}


@pytest.fixture
def found():
    """Trained for the attack's norm: COUP helps against the exact gradient, and harms in the worst case."""
    own = {"none": row(30, 30), "reverse": row(30, 31), "coup": row(10, 60)}
    other = {"none": row(70, 70), "reverse": row(20, 20), "coup": row(20, 20)}
    usual = {"none": row(95, 95), "reverse": row(40, 40), "coup": row(30, 50)}
    return {
        "linf": {"linf": own, "l2": other, "standard": usual},
        "l2": {"linf": other, "l2": own, "standard": usual},
    }


def test_classifiers_are_the_profiles():
    config = CONFIGS["linf"]
    assert list(cross.classifiers(config)) == ["linf", "l2", "standard"]
    assert cross.classifiers(config)["standard"] == config.classifier


def test_the_cross_setting_is_judged_under_one_attack(found):
    text = tables.claims(cross.cross_claims(found), JUDGED)
    assert text.count("**holds** (+40.00 points") == 4
    assert "attacked in L2: trained for L2 beats trained for L∞" in text


def test_every_combination_is_judged(found):
    claims = cross.combination_claims(found, CONFIGS)
    assert len(claims) == 3 * 2 * 3
    text = tables.claims(claims, JUDGED)
    (line,) = [line for line in text.splitlines() if "for L∞, attacked in L∞: COUP beats alone" in line]
    assert "**holds** (+20.00 points" in line and "**does not hold** (-30.00 points" in line


def test_table_and_figure_show_all(found):
    rows = cross.rows(found, CONFIGS)
    assert len(rows) == 18 and {row.label for row in rows} == {cross.ALONE, "Reverse SDE", "COUP"}
    long = tables.long_form(rows, tables.headings(rows[0].right, CONFIGS["linf"]))
    assert len(long) == 18 * 6
    chosen = long.query("norm == 'l2' and training == 'l2' and defence == 'coup' and column == 'recorded'")
    assert chosen["value"].tolist() == [40]
    figure = cross.figure(found, CONFIGS)
    assert [len(axes.containers) for axes in figure.axes] == [3 * 2] * 2
    plt.close(figure)


def test_every_classifier_is_measured_in_every_norm(results_folder):
    configs = {norm: Config(norm=norm, n_images=4, n_draws=2) for norm in NORMS}
    found = cross.measure(configs)
    assert {training for panel in found.values() for training in panel} == {"linf", "l2", "standard"}
    records = {path.name.rsplit("-", 1)[0] for path in results_folder.rglob("cnn-*.json")}
    assert {f"cnn-small-{norm}-{norm}-apgd-ce-coup-exact" for norm in NORMS} < records
    assert {"cnn-small-linf-l2-apgd-ce-coup-exact", "cnn-small-l2-linf-apgd-ce-coup-exact"} < records
    for panel in found.values():
        for rows in panel.values():
            assert tables.headings(rows["coup"], configs["linf"])["recorded"].startswith(
                "Worst case on record"
            )
