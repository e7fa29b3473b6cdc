"""Table 3: the sources, the ways to decide, and the verdicts."""

from itertools import chain

import matplotlib.pyplot as plt
import pytest
from made_up import scored

from coup_lib import paths
from coup_lib.defences import LABELS, PAPER
from coup_lib.evaluation.config import Config
from coup_lib.reporting import paper, tables
from coup_lib.studies import bpda

N = 40


@pytest.fixture
def results():
    lost = {"none": (40, 40), "diffpure": (10, 20), "reverse": (2, 14), "coup": (4, 4)}
    rows = {
        name: dict.fromkeys(("bpda-1", "bpda-20"), scored(first))
        | {"clean": scored(1), "exact": scored(exact)}
        for name, (first, exact) in lost.items()
    }
    return bpda.by_rule(rows)


def test_the_attack_is_table_3s():
    sources = bpda.experiment(Config(eot=5), [1, 20]).attacks["coup"]
    assert list(sources) == ["clean", "bpda-1", "bpda-20", "exact"]
    assert {source.n_iter for name, source in sources.items() if name != "clean"} == {20}
    assert (sources["bpda-20"].gradient, sources["bpda-20"].eot) == ("bpda", 20)
    assert (sources["exact"].gradient, sources["exact"].eot) == ("exact", 5)


def test_counts_are_whole_numbers_each_once():
    assert bpda.checked_counts([20, 1, 20], Config()) == [1, 20]
    for wrong in ("20", [], [1.5], [0]):
        with pytest.raises(ValueError, match="eot_counts: expected"):
            bpda.checked_counts(wrong, Config())
    with pytest.raises(ValueError, match="purifications: expected a whole number of at least 1; got 0"):
        bpda.experiment(Config(), [1], 0)  # not the budget's own


@pytest.mark.parametrize(("profile", "counts"), [("digits", [1, 5, 20]), ("cifar10-small", [1, 5])])
def test_counts_are_the_budgets_own_where_none_are_given(monkeypatch, profile, counts):
    monkeypatch.delenv(paths.SMOKE_VARIABLE)
    assert bpda.checked_counts(None, Config(profile, purpose="sweep")) == counts


def test_verdicts(results):
    config = Config(n_images=N, eot=5)
    claims = tables.coup_claims(results["single"], paper.BPDA)
    rival, diffpure = tables.claims(claims, bpda.headings([20], config.eot)).splitlines()[2:4]
    assert "DiffPure (the paper reports +1.80)" in diffpure and "**holds** (+15.00 points" in diffpure
    assert "(-5.00 points" in rival and "**holds** (+25.00 points" in rival
    purifiers = {LABELS[name]: row for name, row in results["single"].items() if name != "none"}
    weaker = tables.attack_claims(purifiers, "BPDA is the weaker attack", "bpda-20", "exact", "BPDA − exact")
    assert "DiffPure: BPDA is the weaker attack | **holds** (+25.00" in weaker and weaker.count("holds") == 2
    assert "COUP: BPDA is the weaker attack | **is not decided** (+0.00 points [-8.8, +8.8])" in weaker


def test_tables_and_figure_show_all(results):
    config, headings = Config(n_images=N, n_draws=5), bpda.headings([1, 20], 5)
    rows = bpda.rows(results, config)
    assert [row.shown["Decided by"] for row in rows["averaged"]] == ["mean logits of 5"] * len(PAPER)
    long = tables.long_form([*chain(*rows.values())], headings)
    assert len(long) == len(PAPER) * 3 * 4
    assert long.query("defence == 'coup' and column == 'exact'")["value"].tolist() == [90] * 3
    figure = bpda.figure(rows, headings)
    assert [len(axes.containers) for axes in figure.axes] == [len(PAPER)] * 3
    plt.close(figure)
