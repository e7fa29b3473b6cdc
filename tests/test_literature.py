"""The page of the literature shows its data file, whole and unchanged."""

from pathlib import Path

import pandas as pd

from coup_lib.reporting import paper, tables

DOCS = Path(__file__).parents[1] / "docs"


def literature():
    return pd.read_csv(DOCS / "literature.csv", dtype=str, keep_default_na=False)


def test_the_page_has_the_table_of_its_data_file():
    """To renew it, put what this prints between the two comments."""
    table = tables.markdown(literature().set_index("data"))
    shown = (DOCS / "literature.md").read_text().split("<!-- literature -->\n")[1].split("\n<!-- end -->")[0]
    print(table)
    assert shown == table


def test_every_row_says_who_measured_what_how():
    frame = literature()
    assert not (
        frame[["data", "defence", "norm", "eps", "attack", "gradient", "robust", "source"]] == ""
    ).any(axis=None)
    assert frame.robust.astype(float).between(0, 100).all()


def test_the_papers_own_number_is_the_papers_and_stands_beside_the_other():
    frame = literature()
    ours = frame[(frame.defence == "COUP") & (frame.data == "CIFAR-10") & (frame.norm == "Linf")]
    reported = paper.PURIFIERS["linf"]["coup"]
    assert [float(value) for value in ours.robust] == [reported.robustness, 41.72]
