"""What is published stays: only a run that is asked to publish changes it, and never for a smaller one."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from coup_lib import paths
from coup_lib.evaluation import records, store
from coup_lib.evaluation.config import Config, from_notebook
from coup_lib.reporting import publishing, tables


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with nothing in it, and a run that writes below its build/."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "build" / "figures")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "build" / "results")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path / "results")
    monkeypatch.setattr(publishing, "written", [])
    monkeypatch.setattr(publishing, "missing", [])
    monkeypatch.delenv("COUP_SMOKE")
    monkeypatch.setattr(records, "asked_for", set())
    return tmp_path


def run(n, budget="full", *, publish=True, **more):
    """A notebook's tables and records."""
    frame = pd.DataFrame({"a": [n]})
    tables.write(frame, Config(n_images=n, budget=budget, **more), "table1", "a caption")
    records.record("digits", "work", {"n": n} | more, lambda: {"values": [n]})
    publishing.finish(publish)


def there(checkout):
    return sorted(path.name for path in (checkout / "figures" / "digits").iterdir() if path.name[0] != ".")


def test_a_run_that_is_not_asked_to_publish_changes_nothing_published(checkout):
    run(512, publish=False)
    assert [path.name for path in checkout.iterdir()] == ["build"]


def test_what_is_published_are_the_tables_and_the_records_of_the_run(checkout, capsys):
    for name in ("another", "attack"):
        records.record("digits", name, {}, lambda: {"values": [1]})
    records.asked_for.clear()  # made by another run, which shares the work with this one
    one = records.ChunkedRecord("digits", "attack", {}, [0], lambda _: {}, lambda parts: {})
    one.share()  # as an attack whose images were scored already: nobody asks for its numbers
    run(512)
    assert there(checkout) == ["measured.json", "table1.csv", "table1.md"]
    assert {name.split("-")[0] for name in store.published(checkout / "results" / "digits")} == {
        "attack",
        "work",
    }
    said = capsys.readouterr().out
    assert "published: 2 figures and tables" in said
    assert str(paths.ROOT) not in said  # it is committed with a notebook's output


def test_attacked_images_are_not_published(checkout):
    records.record(f"digits/{records.APART}", "attack", {}, lambda: {"x_adv": np.zeros(3)})
    run(512)
    assert [path.name for path in (checkout / "results").iterdir() if path.name[0] != "."] == ["digits"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 16}, "n_images = 512; it is not replaced by one of n_images = 16"),
        ({"n": 512, "budget": "quick"}, "budget = full; it is not replaced by one of .*budget = quick"),
        ({"n": 512, "eot": 1}, "eot = 20; it is not replaced by one of eot = 1"),
        ({"n": 512, "eps": 0.001}, "eps = 0.15; it is not replaced by one of eps = 0.001"),
    ],
)
def test_a_table_is_not_replaced_by_one_of_less_effort_or_another_threat(checkout, given, said):
    run(512)
    before = (checkout / "figures" / "digits" / "table1.csv").read_text()
    publishing.written.clear()
    with pytest.raises(ValueError, match=said):
        run(**given)
    assert (checkout / "figures" / "digits" / "table1.csv").read_text() == before
    assert len(store.published(checkout / "results" / "digits")) == 1
    publishing.written.clear()
    run(512)


def test_a_smoke_run_and_a_page_with_gaps_publish_nothing(checkout, monkeypatch):
    monkeypatch.setattr(publishing, "missing", ["Table 1"])
    with pytest.raises(ValueError, match="publish: expected whole results; not on record: Table 1"):
        run(512)
    monkeypatch.setenv("COUP_SMOKE", "1")
    with pytest.raises(ValueError, match="publish: expected whole results; this is a smoke run"):
        publishing.finish(True)
    assert [path.name for path in checkout.iterdir()] == ["build"]


def test_two_that_publish_at_once_lose_nothing(checkout):
    def publish(place):
        document = records.record("digits", f"work-{place}", {}, lambda: {"values": [place]})
        store.publish(checkout / "results" / "digits", [document | {"arrays": []}])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(publish, range(6)))
    assert len(store.published(checkout / "results" / "digits")) == 6


def test_publish_is_true_or_false_before_anything_is_computed(checkout):
    for value in ("yes", 0.5, 2):
        with pytest.raises(ValueError, match="publish: expected one of true, false; got"):
            from_notebook(Config, {"publish": value})
    for value in ("false", "False", False):
        from_notebook(Config, {"publish": value})
        run(512, publish=value)
    assert [path.name for path in checkout.iterdir()] == ["build"]
