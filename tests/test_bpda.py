"""Table 3: the sources, the ways to decide, and the verdicts."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from coup_lib import paths
from coup_lib.defences import PAPER
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Score
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.studies import bpda

N = 40


def made_up(n_wrong):
    """N images, the first n_wrong of them always misclassified."""
    report = np.zeros((N, 5), dtype=int)
    report[:n_wrong] = 1
    return Score(np.zeros(N, dtype=int), report, report[:, 0], (report == 0).mean(1), None)


@pytest.fixture
def results():
    lost = {"none": (40, 40), "diffpure": (10, 20), "reverse": (2, 14), "coup": (4, 4)}
    rows = {
        name: {
            "clean": made_up(1),
            "bpda-1": made_up(first),
            "bpda-20": made_up(first),
            "exact": made_up(exact),
        }
        for name, (first, exact) in lost.items()
    }
    return bpda.by_rule(rows)


def test_the_attack_is_table_3s():
    sources = bpda.sources("coup", [1, 20], 5)
    assert list(sources) == ["clean", "bpda-1", "bpda-20", "exact"]
    assert {source.n_iter for name, source in sources.items() if name != "clean"} == {20}
    assert (sources["bpda-20"].gradient, sources["bpda-20"].eot) == ("bpda", 20)
    assert (sources["exact"].gradient, sources["exact"].eot) == ("exact", 5)


def test_counts_are_whole_numbers_each_once():
    assert bpda.checked_counts([20, 1, 20], Config()) == [1, 20]
    for wrong in ("20", [], [1.5], [0]):
        with pytest.raises(ValueError, match="eot_counts: expected"):
            bpda.checked_counts(wrong, Config())


@pytest.mark.parametrize(("profile", "counts"), [("digits", [1, 5, 20]), ("cifar10-small", [1, 5])])
def test_counts_are_the_budgets_own_where_none_are_given(monkeypatch, profile, counts):
    monkeypatch.delenv(paths.SMOKE_VARIABLE)
    assert bpda.checked_counts(None, Config(profile, purpose="sweep")) == counts


def test_three_ways_to_decide_can_disagree():
    """One image: a confident mistake in the mean of the logits, three of four draws right."""
    score = Score(np.array([0]), np.array([[0, 0, 0, 1]]), np.array([1]), np.array([0.75]), None)
    assert [bpda.decided(score, rule).tolist() for rule in bpda.RULES] == [[0.75], [0.0], [1.0]]


def test_ways_to_decide_agree_with_the_scores_own(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    config = Config(n_images=4, n_draws=3)
    scores = Evaluation(config, verbose=False).scores({"coup": bpda.sources("coup", [2], 1)})["coup"]
    for score in scores.values():
        ways = {"single": score.mean, "averaged": score.averaged, "majority": score.majority}
        for rule, accuracy in ways.items():
            assert 100 * bpda.decided(score, rule).mean() == pytest.approx(accuracy.value)


def test_verdicts(results):
    config = Config(n_images=N, eot=5)
    text = bpda.claim_lines(results, 20, config)
    assert "COUP above DiffPure (the paper reports +1.80) | a single draw" in text
    assert "**holds** (+15.00 points" in text  # DiffPure under BPDA
    rival = next(line for line in text.splitlines() if "COUP w/o guidance | a single" in line)
    assert "(-5.00 points" in rival and "**holds** (+25.00 points" in rival
    weaker = bpda.attack_lines(results, 20, config)
    assert "- DiffPure: +25.00 points" in weaker and weaker.count("holds") == 2
    assert "- COUP: +0.00 points [-8.8, +8.8]: is not decided" in weaker
    assert "No defence" not in weaker


def test_tables_and_figure_show_all(results):
    config, headings = Config(n_images=N), bpda.columns([1, 20], 5)
    frame = bpda.paper_table(results, 20, config)
    assert frame["Robustness (%)"].tolist()[:8] == [
        "9.00", "15.00", "54.90", "70.01", "76.22", "0.00", "81.40", "83.20",
    ]  # fmt: skip
    assert frame["Robustness (%)"].str.startswith("90.00 [").sum() == 2  # COUP's, by two rules
    whole, long = bpda.whole_table(results, headings, config), bpda.numbers(results, headings, config)
    assert whole.shape == (len(PAPER) * 3, 4) and len(long) == whole.size
    assert long.query("defence == 'coup' and column == 'exact'")["value"].tolist() == [90] * 3
    figure = bpda.figure(results, headings, config)
    assert [len(axes.containers) for axes in figure.axes] == [len(PAPER)] * 3
    plt.close(figure)
    assert "BPDA with 20 EOT draws" in bpda.caption(20, config)
