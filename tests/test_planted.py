"""Planted maskings are flagged and broken by an audit of them alone; honest defences are not flagged."""

import numpy as np
import pytest

from benchmarks import planted
from coup_lib.auditing import protocol
from coup_lib.data import load_split
from coup_lib.evaluation.profiles import Budget

ALL = {one.name: one for one in planted.planted()}
# Flagged by differences that take more images and draws, or broken by more queries.
SLOW = ("COUP's max", "random resizing", "noise for confidences")


def rows():
    """Of the committed table, each row's cells by their headings."""
    lines = [
        line.strip("| ").split(" | ") for line in planted.PAGE.read_text().splitlines() if line[:1] == "|"
    ]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_the_committed_table_has_every_defence_and_reaches_the_goal():
    assert [row["Defence"] for row in rows()] == [*ALL]
    assert sum(one.masked for one in ALL.values()) >= 8 and sum(not one.masked for one in ALL.values()) >= 3
    for row in rows():
        assert (row["Signs"] != "none") == (row["Masked"] == "yes") == ALL[row["Defence"]].masked
        assert float(row["Audit − knowing"].split()[0]) <= 3


@pytest.mark.parametrize("name", [name for name in ALL if name not in SLOW])
def test_a_small_audit_flags_what_is_masked_and_nothing_else(name, tmp_path, monkeypatch):
    effort = Budget(48, n_iter=10, eot=4, n_targets=1, square_queries=60)
    monkeypatch.setitem(protocol.AUDITS, "quick", effort)
    monkeypatch.setitem(protocol.MANY_DRAWS, "quick", 10)
    images, one = load_split("digits", "test").first(48), ALL[name]
    found = planted.audited(one, images, folder=tmp_path)
    assert found.masked("it") == one.masked, found.warnings
    worst = found.worst["it"].right
    knowing = planted.known(one, images, found, n_iter=effort.n_iter, eot=effort.eot)
    assert 100 * (worst.mean() - knowing.mean()) <= 5  # two of 48 images
    assert not one.masked or np.mean(worst) < 0.35 < found.measured.rows["it"]["clean"].right.mean()
