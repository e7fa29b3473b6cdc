"""Tables, sentences, figures and progress lines from made-up scores."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_up import scored

from coup_lib import paths
from coup_lib.defences import DEFENCES, LABELS
from coup_lib.evaluation import progress
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import RULES, Accuracy, Predictions, Transfer, worst_case
from coup_lib.evaluation.progress import Plan, foretell
from coup_lib.reporting import compare, paper, plots, readme, tables

N = 40


def all_but(n_first, n_last=0):
    """(N,) bool: false for the first n_first and the last n_last images."""
    places = np.arange(N)
    return (places >= n_first) & (places < N - n_last)


@pytest.fixture
def config():
    return Config(n_images=N)


@pytest.fixture
def results():
    def row(exact, first_order):
        return {
            "clean": scored(1),
            "standard": scored(exact, robust=all_but(exact + 1)),
            "adaptive": scored(exact, robust=all_but(exact)),
            "dlr": scored(exact, robust=all_but(N), judged=all_but(exact - 2, 2)),
            "first_order": scored(first_order, robust=all_but(first_order)),
            "from_none": scored(3),
            "from_reverse": scored(4),
        }

    rows = {"none": (38, 38), "diffpure": (16, 16), "reverse": (14, 14), "coup": (4, 20)}
    columns = {defence: row(*wrong) for defence, wrong in rows.items()}
    recorded = {name: worst_case(list(each.values())) for name, each in columns.items()}
    return tables.per_image_accuracy(columns, recorded)


def test_rand_is_what_ce_and_dlr_leave_together(results):
    assert results["coup"]["own_rand"].tolist() == all_but(4, 2).astype(float).tolist()  # one clean draw
    assert results["coup"]["rand"].mean() == results["coup"]["dlr"].mean() == 1 - 4 / N  # on fresh noise


def test_robustness_is_the_worse_of_standard_and_rand(results):
    assert results["coup"]["own_standard"].mean() == 1 - 5 / N
    assert results["coup"]["standard"].mean() == 1 - 4 / N  # the images on fresh noise, like every column
    assert results["coup"]["autoattack"].mean() == results["coup"]["own_rand"].mean() == 1 - 6 / N
    assert results["none"]["autoattack"].mean() == 0
    assert results["coup"]["recorded"].mean() == 1 - 20 / N
    row = {"clean": scored(1), "from_none": scored(2), "standard": scored(2, robust=all_but(9))}
    row |= {name: scored(2, robust=all_but(3), judged=all_but(3)) for name in ("adaptive", "dlr")}
    assert tables.per_image_accuracy({"coup": row})["coup"]["autoattack"].mean() == 1 - 9 / N


def test_without_autoattack_there_are_no_columns_of_it():
    """A table of APGD alone, whose counts are all on fresh noise."""
    row = {"clean": scored(1), "adaptive": scored(4, robust=all_but(30)), "from_none": scored(3)}
    found = tables.per_image_accuracy({"coup": row})["coup"]
    assert list(found) == ["clean", "adaptive", "from_none", "transferred", "worst"]
    assert found["adaptive"].mean() == found["worst"].mean() == 1 - 4 / N


def test_transfers_count_and_have_one_column():
    own = {"clean": scored(1), "adaptive": scored(8), "from_none": scored(3), "from_reverse": scored(8)}
    rows = {"reverse": own | {Transfer("coup", "adaptive"): scored(5)}, "coup": own}
    found = tables.per_image_accuracy(rows)
    assert list(found["reverse"]) == list(found["coup"]) == [*own, "transferred", "worst"]
    # Images made against the reverse SDE are no transfer to itself; to COUP they are.
    assert found["reverse"]["transferred"].mean() == 1 - 5 / N
    assert found["coup"]["transferred"].mean() == 1 - 8 / N
    assert found["reverse"]["worst"].mean() == 1 - 8 / N


def test_decisions_by_several_draws_stand_beside_the_same_on_clean_images():
    """Right in two of three draws: of one draw two times in three, of all never, of the majority always."""
    labels, report = np.zeros(N, dtype=int), np.tile([0, 0, 1], (N, 1))
    attacked = Predictions(labels, report, report[:, 2], np.full(N, 2 / 3))
    clean = Predictions(labels, 0 * report, labels, np.ones(N))
    longer = Predictions(labels, np.tile(report, 2), labels, np.ones(N))  # of six draws: not among these
    found = tables.by_count({"coup": {"clean": clean}}, {"coup": worst_case([clean, attacked, longer])}, 3)[
        "coup"
    ]
    shares = {name: right.mean() for name, right in found.items()}
    assert [shares[name] for name in RULES] == pytest.approx([2 / 3, 0, 1, 0])
    assert all(shares[f"clean_{name}"] == 1 for name in RULES)
    assert set(tables.count_headings(3)) == {*RULES, *(f"clean_{name}" for name in RULES)}


def test_a_claim_is_judged_under_the_protocol_and_in_the_worst_case(results):
    claims = tables.coup_claims(results, paper.PURIFIERS["linf"], "here: ")
    text = tables.claims(claims, tables.judged("autoattack"))
    first, second = text.splitlines()[2:4]
    assert first.startswith("| here: COUP is more robust than Reverse SDE | **holds** (+25.00 points")
    assert "| **does not hold** (-15.00 points" in first
    assert "than DiffPure (the paper reports +2.41) | **holds**" in second
    assert text.endswith("n = 40; paired differences with 95 % intervals.")


def test_the_papers_rows_and_ours_are_told_apart(results, config):
    rows = tables.rows(results, config, {"Decided by": "a single draw"})
    table_1 = paper.LITERATURE["linf"], paper.PURIFIERS["linf"].values()
    frame = tables.beside_paper(*table_1, rows, "autoattack")
    assert list(frame["Source"].unique()) == [
        "quoted by the paper",
        "reported by the paper",
        "measured here, digits, n = 40, a single draw",
    ]
    ours = str(Accuracy.of(results["coup"]["autoattack"]))
    assert frame.loc["COUP", "Robustness (%)"].tolist() == ["73.05", ours]
    table_3 = tables.beside_paper(paper.BPDA_LITERATURE, paper.BPDA.values(), [], "")
    assert table_3.loc["GDMP (Wang et al. 2022)"].tolist() == ["93.50", "76.22", "quoted by the paper"]
    assert table_3.loc["COUP"].tolist() == ["90.04", "83.20", "reported by the paper"]
    likelihood = tables.beside_paper([], paper.LIKELIHOOD.values(), [], "")
    assert likelihood["Accuracy (%)"].tolist() == ["–", "–"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_reported_number_is_a_percentage_above_chance(norm):
    rows = [*paper.PURIFIERS[norm].values(), *paper.LITERATURE[norm]]
    assert all(0 <= row.robustness <= row.accuracy <= 100 for row in rows)
    assert set(paper.PURIFIERS[norm]) < set(DEFENCES)


def test_the_figure_shows_every_accuracy_with_its_interval(results, config, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    figure, axes = plt.subplots()
    columns = tables.headings(results["coup"], config)
    plots.robustness_panel(axes, tables.rows(results, config), columns)
    assert len(axes.containers) == len(results)
    for (defence, row), container in zip(results.items(), axes.containers, strict=True):
        assert container.get_label() == LABELS[defence]
        heights = container.lines[0].get_ydata()
        np.testing.assert_allclose(heights, [100 * row[name].mean() for name in columns])
    plots.save(figure, "digits", "panel", "Accuracies")
    assert {path.suffix for path in (tmp_path / "digits").iterdir()} == {".png"}
    monkeypatch.setenv(paths.PDF_VARIABLE, "1")
    plots.save(figure, "digits", "panel", "Accuracies")
    assert {path.suffix for path in (tmp_path / "digits").iterdir()} == {".png", ".pdf"}


@pytest.mark.parametrize("sideways", [False, True])
def test_error_bars_reach_the_ends_of_the_interval(sideways):
    right = [all_but(8).astype(float), np.zeros(N)]
    figure, axes = plt.subplots()
    plots.points(axes, [0, 1], right, sideways=sideways, fmt="o")
    (bars,) = axes.containers[0].lines[2]
    ends = np.array([segment[:, 0 if sideways else 1] for segment in bars.get_segments()])
    expected = [[one.low, one.high] for one in map(Accuracy.of, right)]
    np.testing.assert_allclose(ends, expected, atol=1e-9)
    plt.close(figure)


def test_the_same_figure_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    monkeypatch.setenv(paths.PDF_VARIABLE, "1")
    files = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        shown = plots.save(figure, "digits", "line", "A line from 1 to 2")
        assert shown.alt == "A line from 1 to 2" and not plt.fignum_exists(figure.number)
        files.append([(tmp_path / "digits" / f"line.{kind}").read_bytes() for kind in ("png", "pdf")])
        assert files[-1][0] == shown.data, "notebooks show what is written"
    assert files[0] == files[1]


def test_readme_blocks_are_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "figures" / "digits").mkdir(parents=True)
    (tmp_path / "figures" / "digits" / "table1.md").write_text("| new |\n")
    text = "before\n<!-- digits/table1 -->\nold\n<!-- end -->\nafter <!-- other -->\n"
    filled = readme.filled(text)
    assert filled == "before\n<!-- digits/table1 -->\n| new |\n<!-- end -->\nafter <!-- other -->\n"
    assert readme.filled(filled) == filled


def test_compare_says_what_agrees(tmp_path):
    values = {"same": (60, 60), "close": (62, 60), "far": (80, 60), "new": (50, None)}
    for name, pair in values.items():
        for folder, value in zip(("mine", "theirs"), pair, strict=True):
            if value is not None:
                result = {"labels": [0] * 100, "report": [[0]] * value + [[1]] * (100 - value)}
                path = tmp_path / folder / "digits" / f"score-{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"result": result, "arrays": []}))
    found = dict(compare.compare(tmp_path / "mine", tmp_path / "theirs"))
    assert found["score-same"] == "identical: 60.00 %"
    assert found["score-close"] == "agrees: 62.00 against 60.00 [49.7, 69.7] %"
    assert found["score-far"].startswith("DIFFERS: 80.00")
    assert found["score-new"] == "no committed record to compare with"


def test_progress_leaves_finished_jobs_out_of_the_estimate(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    plan = Plan([0.0, 10.0, 30.0], verbose=True)
    plan.start("first")
    plan.start("second")
    clock[0] = 20.0
    plan.advance(1, 2)
    clock[0] = 30.0
    plan.advance(1.5, 2)
    clock[0] = 40.0
    plan.advance(2, 2)
    plan.start("third")
    clock[0] = 80.0
    plan.advance(299, 300)
    assert capsys.readouterr().err.splitlines() == [
        "[2/3] second: started; 0:00 gone",
        "[2/3] second: 50% done; 0:20 gone, about 2:20 left",
        "[2/3] second: 75% done; 0:30 gone, about 2:10 left",
        "[3/3] third: started; 0:40 gone, about 2:00 left",
        "[3/3] third: 99% done; 1:20 gone, about 0:00 left",
    ]


def test_what_was_foretold_is_counted_beside_the_jobs_in_hand(capsys, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("coup_lib.evaluation.progress.FORETOLD", {})
    left = {tmp_path / "attack": 30.0, tmp_path / "score-attack": 30.0}
    progress.FORETOLD[tmp_path / "given up"] = 99.0
    foretell(left, 2.0, "cpu")
    plan = Plan([10.0, 10.0], verbose=True, after=40.0)
    plan.start("first")
    clock[0] = 20.0
    plan.advance(1, 1)
    plan.start("second")
    assert left == progress.FORETOLD
    assert capsys.readouterr().err.splitlines() == [
        "To do: 1 attacks and 1 evaluations of what they found; about 2:00 min on cpu",
        "[1/2] first: started; 0:00 gone",
        "[2/2] second: started; 0:20 gone, about 0:20 left, 1:40 with all that follows",
    ]


def test_nothing_is_said_of_what_is_read_back_nor_twice_in_a_moment(capsys, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    plan = Plan([0.0, 0.0], verbose=True)
    for label in ("first", "second"):
        plan.start(label)
        plan.advance(1, 2)
    plan.end()
    assert capsys.readouterr().err == ""
    plan = Plan([1.0, 1.0], verbose=True)
    for label in ("first", "second"):
        plan.start(label)
        plan.advance(1, 2)
    plan.end()
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["[1/2] first: started; 0:00 gone", "all 2 done in 0:00"]


def test_in_a_notebook_a_line_takes_the_place_of_the_one_before(monkeypatch):
    cleared = []
    monkeypatch.setattr("IPython.get_ipython", object)
    monkeypatch.setattr("IPython.display.clear_output", lambda wait: cleared.append(wait))
    plan = Plan([1.0], verbose=True)
    plan.start("first")
    plan.end()
    assert cleared == [True, True]


def test_a_label_is_broken_where_it_is_told(results, config):
    figure, axes = plt.subplots()
    names = {"clean": "Clean", "adaptive": "BPDA, EOT 20"}
    plots.robustness_panel(axes, tables.rows(results, config), names, width=7)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["Clean", "BPDA,\nEOT 20"]
    plt.close(figure)


def test_the_caption_says_how_much_of_the_papers_protocol_was_spent(config):
    caption = tables.caption(config)
    assert "40/512 images, 2/100 iterations" in caption and "Square" not in caption
    full = Config(n_images=512, n_iter=100, eot=20, n_targets=9, square_queries=5000)
    caption = tables.caption(full, spent=tables.SPENT, note="A note.")
    assert "512/512 images" in caption and "5000/5000 Square queries" in caption
    assert caption.endswith(" per image. A note.")
    both = tables.caption(Config(norm="linf"), Config(norm="l2"))
    assert "L∞, eps = 0.15; t* = 0.1 and L2, eps = 0.5; t* = 0.075, N" in both


def test_files_are_what_is_shown(results, config, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    rows = tables.rows(results, config, {"Classifier": "small"}, classifier="cnn-small")
    shown = tables.write_accuracies(rows, "table1", "A caption.")
    assert (tmp_path / "digits" / "table1.md").read_text() == shown
    read = pd.read_csv(tmp_path / "digits" / "table1.csv").set_index(["classifier", "defence", "column"])
    assert read.loc[("cnn-small", "coup", "recorded"), ["value", "n"]].tolist() == [50, N]
    assert f"| COUP | small | {Accuracy.of(results['coup']['clean'])} |" in shown


def test_what_a_row_has_not_is_a_dash_in_the_table_and_no_line_in_the_file(results, config):
    rows = tables.rows({"none": {"clean": results["none"]["clean"]}, "coup": results["coup"]}, config)
    names = {"clean": "Clean", "adaptive": "APGD"}
    assert tables.accuracies(rows, names)["APGD"].tolist()[0] == "–"
    assert len(tables.long_form(rows, names)) == 3
