"""Sweeps of t* and λ: which values, which claims hold, and what is confirmed."""

import matplotlib.pyplot as plt
import pytest
from made_up import losing

from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Difference
from coup_lib.evaluation.stats import mean_interval
from coup_lib.reporting import tables
from coup_lib.studies import sweeps

N = 200


def made_up(wrong, clean=None):
    """A sweep over 0, 1, 2, … with this many images lost in every column but "clean"."""
    columns = ("adaptive", "first_order", "from_none", "from_reverse", "worst")
    clean = clean or [0] * len(wrong)
    return {
        float(value): {"clean": losing(right, N)} | {name: losing(lost, N) for name in columns}
        for value, (lost, right) in enumerate(zip(wrong, clean, strict=True))
    }


def test_the_profiles_own_value_is_swept_too():
    config = Config(norm="l2")
    assert sweeps.values_to_sweep(config, "t_star", [0.2, 0.05]) == [0.05, 0.075, 0.2]
    assert sweeps.values_to_sweep(config, "guidance_weight", [2, 1, 0]) == [0, 1, 2]


@pytest.mark.parametrize("values", ["0.1,0.2", 0.1, [0.1], ["much", 1]])
def test_what_cannot_be_swept_is_refused(values):
    with pytest.raises(ValueError, match="t_star: expected"):
        sweeps.values_to_sweep(Config(), "t_star", values)


def test_bonferroni_widens_the_interval_and_keeps_the_difference():
    right, reference = losing(40, N), losing(60, N)
    one, many = (sweeps.simultaneous(right, reference, comparisons) for comparisons in (1, 6))
    plain = Difference.of(right, reference)
    assert (one.value, one.low, one.high) == pytest.approx((plain.value, plain.low, plain.high))
    assert (many.low, many.high) == pytest.approx(
        [100 * end for end in mean_interval(right - reference, -1, 1, level=1 - 0.05 / 6)]
    )
    # about as z of a two-sided interval at 95 % and at 1 − 0.05/6, from a table of the normal distribution
    assert (many.high - many.low) / (one.high - one.low) == pytest.approx(2.6383 / 1.9600, abs=0.05)


def test_of_equal_values_the_smallest_is_best():
    assert sweeps.best(made_up([50, 10, 10]), "worst") == 1


@pytest.mark.parametrize(
    ("clean", "verdict"),
    [([0, 10, 40], "holds"), ([40, 10, 0], "does not hold"), ([0, 0, 1], "is not decided")],
)
def test_accuracy_falls(clean, verdict):
    assert sweeps.falls(made_up([9, 9, 9], clean))[0] == verdict


def test_one_rise_on_the_way_is_enough_against_a_fall():
    ends = made_up([9, 9, 9], [0, 80, 40])
    assert Difference.of(ends[0]["clean"], ends[2]["clean"]).verdict == "holds"
    assert sweeps.falls(ends)[0] == "does not hold"


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ([90, 20, 10, 90], "holds"),
        ([90, 60, 50, 10], "does not hold"),
        ([90, 20, 10, 11], "is not decided"),
    ],
)
def test_a_peak_between_the_ends(wrong, verdict):
    found, evidence = sweeps.peaks_inside(made_up(wrong), "worst")
    assert found == verdict
    assert evidence.startswith("2 minus 0: +40.00 points") or verdict == "does not hold"


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [([90, 10, 80], "holds"), ([90, 40, 10], "does not hold"), ([90, 10, 11], "is not decided")],
)
def test_one_value_is_best(wrong, verdict):
    found, evidence = sweeps.is_best(made_up(wrong), "worst", 1.0)
    assert found == verdict
    assert evidence.startswith("1 minus its strongest rival, 2: ")


def over_t_star():
    return {0.05: made_up([90])[0], 0.1: made_up([40])[0], 0.2: made_up([10])[0]}


def over_weights():
    return {0.0: made_up([50])[0], 1.0: made_up([40])[0], 4.0: made_up([90])[0]}


def test_the_table_of_claims_judges_every_one():
    config = Config(n_images=N)
    times = {0.05: made_up([90])[0], 0.1: made_up([10])[0], 0.2: made_up([80])[0]}
    weights = {0.0: made_up([10])[0], 1.0: made_up([40])[0], 4.0: made_up([90])[0]}
    text = tables.markdown(sweeps.claims(times, weights, config))
    assert "| t* = 0.1 is best | APGD-ce, exact | **holds** | 0.1 minus its strongest rival, 0.2" in text
    assert "| λ = 1 is best | Worst of these attacks, per image | **does not hold** |" in text
    more = "| the more guidance the better | APGD-ce, exact | **does not hold** | 4 minus 0: -40.00 points"
    assert more in text
    assert text.count("**") == 2 * 9


def test_a_choice_changes_one_setting_and_is_compared_with_the_papers(monkeypatch):
    config = Config(n_images=N)
    times, weights = over_t_star(), over_weights()
    monkeypatch.setattr(sweeps, "measure", lambda here: times[here.t_star])
    confirmed = sweeps.confirm(times, weights, config)
    settings = [(row.config.t_star, row.config.guidance_weight) for row in confirmed]
    assert settings == [(0.1, 1), (0.2, 1), (0.1, 1)]
    frame = sweeps.confirmation_table(confirmed)
    column = "Minus the paper's: Worst of these attacks, per image"
    assert frame[column].str[:6].tolist() == ["–", "+15.00", "–"]
    assert set(frame["n"]) == {str(N)}


def test_without_guidance_coup_is_reverse_only(results_folder):
    config = Config(n_images=4, n_draws=2)
    found = sweeps.sweep(config, "guidance_weight", [0.0, 1.0])
    assert (found[0]["adaptive"] == found[0]["from_reverse"]).all()
    names = {path.name for path in results_folder.rglob("score-*.json")}
    assert any(name.startswith("score-reverse-on-") for name in names)
    rows = sweeps.rows(found, config, "guidance_weight")
    assert [(row.keys["guidance_weight"], row.keys["defence"]) for row in rows] == [
        (0, "reverse"),
        (1, "coup"),
    ]


def test_every_weight_faces_what_is_made_against_the_papers(results_folder):
    config = Config(budget="smoke")
    sweeps.measure(config)
    attacks = {path for path in results_folder.glob("*/*.json") if not path.name.startswith("score-")}
    for weight in (0.0, 4.0):
        row = sweeps.measure(sweeps.at(config, "guidance_weight", weight))
        assert {"worst", "recorded", "transferred"} < set(row)
    targets = [path.name.split("-on-")[0] for path in results_folder.rglob("score-*-coup-exact-*.json")]
    assert sorted(targets) == ["score-coup"] * 3 + ["score-reverse"]  # λ = 4 on its own and on λ = 1's
    made = {path for path in results_folder.glob("*/*.json") if not path.name.startswith("score-")} - attacks
    assert (
        sum("-coup-" in path.name for path in made) == 2
    )  # λ = 4's own by both gradients; λ = 1's were there


def test_the_figure_rings_the_best_and_marks_the_papers_choice():
    config = Config(n_images=N)
    times, weights = over_t_star(), over_weights()
    figure = sweeps.figure(times, times, weights, config)
    left, right = figure.axes
    for axes, height in ((left, 95), (right, 80)):
        rings = [item.get_offsets()[0, 1] for item in axes.collections if hasattr(item, "get_sizes")]
        assert [ring for ring in rings if ring] == pytest.approx([height, height])
    assert [text.get_text() for text in right.get_xticklabels()] == ["0", "1", "4"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"COUP, clean", "COUP, exact", "COUP, first-order", "COUP, worst of these", "the paper's"} < labels
    plt.close(figure)
