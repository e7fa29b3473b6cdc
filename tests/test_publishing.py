"""What is published stays: only a run that is asked to publish changes it, and never for a smaller one."""

import pandas as pd
import pytest

from coup_lib import paths
from coup_lib.evaluation import records, store
from coup_lib.evaluation.config import Config
from coup_lib.reporting import publishing, tables


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with nothing in it, and a run that writes below its build/."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "build" / "figures")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "build" / "results")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "results")
    monkeypatch.setattr(publishing, "_written", [])
    monkeypatch.setattr(records, "read_here", set())
    return tmp_path


def run(n, budget="quick", *, publish=True):
    """A notebook's tables and records."""
    frame = pd.DataFrame({"n": [n], "budget": [budget]})
    tables.write(frame, Config(), "table1", "a caption", frame)
    records.record("digits", "work", {"n": n}, lambda: {"values": [n]})
    publishing.finish(publish)


def test_a_run_that_is_not_asked_to_publish_changes_nothing_published(checkout):
    run(512, publish=False)
    assert [path.name for path in checkout.iterdir()] == ["build"]


def test_what_is_published_are_the_tables_and_the_records_of_the_run(checkout, capsys):
    records.record("digits", "another", {}, lambda: {"values": [1]})
    records.read_here.clear()  # made by another run
    run(512)
    assert sorted(path.name for path in (checkout / "figures" / "digits").iterdir()) == [
        "table1.csv",
        "table1.md",
    ]
    assert len(store.published(checkout / "results" / "digits")) == 1
    assert "published: 2 figures and tables" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n", "budget", "refused"), [(16, "full", True), (512, "quick", True), (512, "full", False)]
)
def test_a_table_is_not_replaced_by_one_of_fewer_images_or_a_smaller_budget(checkout, n, budget, refused):
    run(512, "full")
    before = (checkout / "figures" / "digits" / "table1.csv").read_text()
    publishing._written.clear()
    if refused:
        with pytest.raises(ValueError, match=f"has n = 512, budget full, and .* n = {n}, budget {budget}"):
            run(n, budget)
        assert (checkout / "figures" / "digits" / "table1.csv").read_text() == before
        assert len(store.published(checkout / "results" / "digits")) == 1
    else:
        run(n, budget)
