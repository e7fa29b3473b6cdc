"""The page that puts the paper beside what is measured here."""

from pathlib import Path

import numpy as np
import papermill
import pytest

from coup_lib import paths
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Accuracy
from coup_lib.reporting import tables
from coup_lib.studies import report, sweeps
from coup_lib.studies.report import Line

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def columns(right, worst=None):
    """A defence's columns over 100 images, so many of which it gets right."""
    found = {"adaptive": (np.arange(100) < right).astype(float)}
    return found if worst is None else found | {"recorded": (np.arange(100) < worst).astype(float)}


def claim(right, worst=None, reported=2.41):
    """That a defence beats one that gets no image right."""
    none = columns(0, None if worst is None else 0)
    return report.claim("Table 1", "COUP − DiffPure", reported, columns(right, worst), none, "adaptive")


def test_a_claim_carries_both_verdicts():
    line = claim(20, worst=0)
    assert (line.cells[2], line.n, line.verdict) == ("+2.41 points", 100, "holds")
    assert line.worst_verdict == "is not decided" and str(line.worst).startswith("+0.00")
    assert claim(20, reported=None).cells[2] == "larger"
    assert claim(20).worst_verdict == report.NOTHING


def test_levels_are_not_compared():
    line = report.level("Table 1", "COUP: accuracy", 90.04, np.ones(50))
    assert line.cells[2:5] == ["90.04", str(Accuracy.of(np.ones(50))), "50"]
    assert line.verdict == report.LEVEL


def test_what_is_kept_of_a_classifiers_own_accuracy():
    own, right = np.repeat([1.0, 0.0], [60, 40]), np.repeat([1.0, 0.0], [40, 60])
    line = report.kept("Table 1", "COUP", "93.70", right, own)
    assert (line.reported, line.n, line.verdict) == ("93.70", 100, report.NOTHING)
    assert report.kept("Table 1", "COUP", "93.70", right, np.zeros(100)).here == report.NOTHING


def test_counts_and_table():
    lines = [claim(20, worst=0), claim(0), Line("Table 1", "AWP", 59.18, verdict=report.QUOTED)]
    text = report.counts(lines)
    assert "claims 0 do not hold, 1 are not decided, 1 hold under its own protocol" in text
    assert "Another 1 of the paper's numbers get no verdict" in text
    assert report.table(lines).shape == (3, 7)
    assert list(report.table(lines)["n"]) == ["100", "100", report.NOTHING]


def test_profiles_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    lines = {
        "digits": [claim(20, worst=0), report.level("Table 1", "COUP", 90.04, np.ones(50))],
        "cifar10-small": [claim(0), Line("Prop. 1", "its hypothesis", "assumed")],
    }
    for profile, found in lines.items():
        quoted = Line("Table 1", "AWP", "59.18", verdict=report.QUOTED)
        tables.write(
            report.table([*found, quoted]), Config(profile=profile), "report", f"caption of {profile}"
        )
    head, _, claimed, level, *captions = [line for line in report.side_by_side().splitlines() if line]
    assert "digits: the paper's protocol (n)" in head and "cifar10-small: worst case on record" in head
    cells = [cell.strip() for cell in claimed.strip("|").split("|")]
    assert cells[:3] == ["Table 1", "COUP − DiffPure", "+2.41 points"]
    assert cells[3].startswith("**holds** +20.00 points [") and cells[3].endswith(" (100)")
    assert cells[4].startswith("**is not decided** +0.00 points [") and not cells[4].endswith(")")
    assert cells[5].startswith("**is not decided**") and cells[6] == report.NOTHING
    assert level.endswith("(50) | – | – | – |")
    assert captions == ["caption of digits", "caption of cifar10-small"]
    assert (tmp_path / "side_by_side.md").read_text().strip() == report.side_by_side()


def test_parts_of_the_paper_can_be_chosen():
    lines = report.everything(Config(), [], ["toy"])
    assert [line.where for line in lines] == ["toy"]
    for wrong in (["Table 9"], "toy"):
        with pytest.raises(ValueError, match="parts: expected"):
            report.everything(Config(), [], wrong)


def test_a_classifier_of_fig_2b_can_have_sizes_of_its_own(monkeypatch):
    asked = []

    def measured(evaluation, attacks):
        asked.append((evaluation.config.n_images, evaluation.config.precision))
        return {name: columns(5) for name in attacks}

    monkeypatch.setattr(tables, "measured", measured)
    own = {"cnn-small": {"n_images": 7, "precision": "tf32"}}
    assert len(report.ablation(Config(n_images=5), ["cnn-small", "cnn-large"], own)) == 4
    assert asked == [(7, "tf32"), (5, "float32")]
    for wrong, message in (
        (["cnn-small"], "fig2b: expected .* or the like; got \\['cnn-small'\\]"),
        ({"cnn-small": 256}, "fig2b: expected .* or the like; got {'cnn-small': 256}"),
        ({"resnet20": {}}, "fig2b: expected one of cnn-small; got 'resnet20'"),
        ({"cnn-small": {"eps": 1}}, "fig2b, cnn-small: expected one of n_images, .*; got 'eps'"),
    ):
        with pytest.raises(ValueError, match=message):
            report.everything(Config(), ["cnn-small"], ["toy"], fig2b=wrong)


def test_the_figure_shows_the_papers_number_only_where_there_is_one():
    figure = report.figure([claim(20, worst=3), claim(5, reported=None)])
    (papers,) = [line for line in figure.axes[0].lines if line.get_label() == "the paper"]
    assert papers.get_xdata().tolist() == [2.41]
    assert [text.get_text() for text in figure.axes[0].get_legend().texts][-1].startswith("here")


@pytest.mark.parametrize(
    ("notebook", "parameter", "values"),
    [
        ("03_sweeps", "t_stars", sweeps.T_STARS),
        ("03_sweeps", "guidance_weights", sweeps.WEIGHTS),
        ("09_report", "t_stars", sweeps.T_STARS),
        ("09_report", "guidance_weights", sweeps.WEIGHTS),
    ],
)
def test_the_page_reads_what_the_notebooks_write(notebook, parameter, values):
    found = papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"))[parameter]
    assert found["default"] == str(list(values))


def test_the_report_computes_nothing(tmp_path, monkeypatch):
    """What is not on record shows as such, at once."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    lines = report.everything(Config(n_images=3), ["cnn-small"])
    assert [line.where for line in lines] == list(report.PARTS)
    assert {line.what for line in lines} == {"not on record: run its notebook first"}
    assert not list(tmp_path.rglob("*"))
    assert report.table(lines).shape == (len(report.PARTS), 7)
    assert report.figure(lines).axes
