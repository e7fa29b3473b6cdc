"""Published records are read back to the last bit."""

import json

import numpy as np
import pytest

from coup_lib import paths
from coup_lib.evaluation import records, store


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "build")
    monkeypatch.setattr(paths, "PUBLISHED", tmp_path)
    return tmp_path


def document(name="score", seed=0, **result):
    generator = np.random.default_rng(seed)
    attack = {"attack": "apgd-ce", "eps": 0.15, "defence": {"name": "coup"}}
    found = {
        "labels": list(range(10)),
        "report": generator.integers(0, 10, (10, 4)).tolist(),
        "selection": generator.random(10, dtype=np.float32).astype(float).tolist(),
    }
    return {
        "name": name,
        "hash": f"{seed:012x}",
        "settings": {
            "attack": attack,
            "seed": seed,
            "target": {"name": "coup", "classifier": "cnn-small"},
            "n_draws": 4,
        },
        "result": found | result,
        "arrays": [],
        "provenance": {"seconds": 1.5, "peak_memory_mib": 7, "commit": "c", "packages": {"torch": "2"}},
    }


@pytest.mark.parametrize(
    "values",
    [
        [0.1] * 9,  # no float32
        [*range(11)],  # not one digit each
        [[1, 2], [3]] * 5,
        [[], [1]] * 5,
        [[1]] * 9,
        [True] * 9,
        [None] * 9,
        [1, 2],
        [1.0] * 9,
        {"exact": [0.5] * 9, "text": "as it is"},
        [["a"]] * 9,
        1.5,
        "words",
        "#12345678",
        "@nobody",
        "=",
        [],
    ],
)
def test_whatever_a_result_holds_comes_back(values):
    made = document(values=values)
    store.publish(paths.PUBLISHED / "digits", [made])
    found = store.published(paths.PUBLISHED / "digits")[store.key(made)]
    assert json.dumps(found, sort_keys=True) == json.dumps(made, sort_keys=True)


def test_what_is_published_again_replaces_its_record_alone():
    first, second = document("b", 1), document("a", 2)
    store.publish(paths.PUBLISHED / "digits", [first, second])
    changed = first | {"result": {"values": [3] * 9}}
    store.publish(paths.PUBLISHED / "digits", [changed])
    found = store.published(paths.PUBLISHED / "digits")
    assert list(found) == [store.key(second), store.key(first)]
    assert found[store.key(first)] == changed and found[store.key(second)] == second


def test_what_records_share_stands_once(folder):
    store.publish(paths.PUBLISHED / "digits", [document(seed=seed) for seed in range(20)])
    assert (folder / "digits" / store.FILE).read_text().count("apgd-ce") == 1
    assert not store.published(folder / "cifar10")


def publish():
    store.move(paths.RESULTS.glob("*/*.json"), paths.PUBLISHED)


def test_published_records_are_read_back_and_a_new_runs_stand_before_them(folder, monkeypatch, capsys):
    def made(value):
        return records.record("digits", "work", {"a": 1}, lambda: {"values": [value] * 9})

    publish()  # with nothing to publish
    first = made(1)
    publish()
    assert sorted(path.name for path in (folder / "digits").iterdir()) == [store.FILE]
    assert made(2) == first  # read back, not made
    path = records.record_path("digits", "work", {"a": 1})
    path.write_text(json.dumps(first | {"arrays": [], "result": {"values": [3] * 9}}))
    assert made(2)["result"]["values"] == [3] * 9
    publish()
    assert made(2)["result"]["values"] == [3] * 9
    assert "1 records published; 1 there are" in capsys.readouterr().out


def test_arrays_are_published_with_their_record_and_chunks_in_work_are_left(folder, monkeypatch):
    def made():
        return records.record("digits", "work", {"a": 1}, lambda: {"x": np.arange(3)})

    made()
    chunk = paths.RESULTS / "digits" / "other-0.chunk0of2-0.npz"
    np.savez(chunk, x=np.zeros(1))
    publish()
    assert chunk.exists() and [path.name for path in chunk.parent.iterdir()] == [chunk.name]
    assert made()["arrays"]["x"].tolist() == [0, 1, 2]


def test_the_table_has_a_row_for_each_accuracy(folder):
    made, attack = document(report=[[0] * 4, [1, 1, 0, 0], *([[9] * 4] * 7), [0] * 4]), document()
    del attack["result"]["report"]
    store.publish(folder / "digits", [made])
    assert (folder / "digits" / store.TABLE).read_text().count("\n") == 2  # and a line of names
    (row,) = store.scores({"attack": attack, "score": made}).to_dict("records")
    assert (row["accuracy"], row["n"], row["draws"]) == (15.0, 10, 4)  # 1 and 1/2 of ten images
    assert row["low"] < 15 < row["high"]
    assert (row["target"], row["surrogate"], row["attack"], row["eps"]) == ("coup", "coup", "apgd-ce", 0.15)
