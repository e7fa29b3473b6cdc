"""Fig. 2c: classifiers by training, and verdicts on the cross setting and on the combination."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from coup_lib.attacks import NORMS
from coup_lib.evaluation.config import Config
from coup_lib.reporting import tables
from coup_lib.studies import adversarial_training as cross

N = 100
CONFIGS = {norm: Config(norm=norm, n_images=N) for norm in NORMS}


def row(adaptive, worst):
    """Columns of which these many of N images are lost."""
    lost = {"clean": 0, "adaptive": adaptive, "first_order": 0, "from_none": 0, "from_reverse": 0}
    return {
        name: (np.arange(N) >= wrong).astype(float) for name, wrong in (lost | {"recorded": worst}).items()
    }


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
    text = cross.cross_lines(found, CONFIGS)
    assert text.count("**holds** (+40.00 points") == 4
    assert "70.00 [60.0, 78.8] % against 30.00 [21.2, 40.0] %" in text


def test_the_combination_is_counted_for_either_attack(found):
    text = cross.claim_lines(found, CONFIGS)
    assert "70.90 → 77.15 % (+6.25)" in text
    assert "exact: *COUP makes the adversarially trained classifier more robust* **holds** in 4 of 4" in text
    assert "image: *COUP makes the adversarially trained classifier more robust* **holds** in 2, " in text
    assert "**does not hold** in 2 of 4 settings" in text
    # of COUP and reverse-only, in four settings each, COUP in its own two
    assert text.endswith("Here the worst case shows that in 2 of 8 comparisons.")
    lines = cross.combination_lines(found, CONFIGS).splitlines()
    (line,) = [line for line in lines if "trained for L∞ | L∞ | COUP − Classifier alone" in line]
    assert "+20.00 points" in line and ": more |" in line
    assert "-30.00 points" in line and ": **less** |" in line
    assert len(lines) == 2 + 3 * 2 * 3


def test_tables_and_figure_show_all(found):
    frame, long = cross.table(found, CONFIGS), cross.numbers(found, CONFIGS)
    assert len(frame) == 18 and cross.ALONE in frame.index and "No defence" not in frame.index
    assert len(long) == 18 * 6
    chosen = long.query("norm == 'l2' and training == 'l2' and defence == 'coup' and column == 'recorded'")
    assert chosen["value"].tolist() == [40]
    figure = cross.figure(found, CONFIGS)
    assert [len(axes.containers) for axes in figure.axes] == [3 * 3 * 2] * 2
    assert "eps = 0.15, t* = 0.1 and L2 with eps = 0.5, t* = 0.075" in cross.caption(CONFIGS)
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
            assert tables.column_names(rows, configs["linf"])["recorded"].startswith("Worst case on record")
