"""Every committed number follows from the committed records: the notebooks at full size write them anew."""

import os
import re
import shutil

import pytest
from forked import ROOT, Papermill

LONG = re.compile(r"-?\d+\.\d{6,}(?:e-?\d+)?")  # a number whose last digits depend on SciPy's version
FULL = "-p budget full"
RUNS = {
    "00_toy_analysis": "",
    "01_case_study": FULL,
    "02_ablation": FULL,
    "03_sweeps": FULL,
    "04_autoattack": FULL,
    "04_autoattack@l2": f"{FULL} -p norm l2",
    "05_bpda": FULL,
    "06_adversarial_training": FULL,
    "07_stronger_attacks": FULL,
    "08_beyond": FULL,
    "08_beyond@l2": f"{FULL} -p norm l2",
    "09_report": FULL,
}


@pytest.fixture(scope="module")
def papermill(tmp_path_factory):
    """With the committed records behind it; (it, the folder of new records, that of figures)."""
    folder = tmp_path_factory.mktemp("numbers")
    results, figures = folder / "results", folder / "figures"
    given = {"COUP_RESULTS": results, "COUP_FIGURES": figures, "COUP_PUBLISHED": ROOT / "results"}
    run = Papermill(folder / "log", **{name: str(path) for name, path in given.items()})
    yield run, results, figures
    run.close()


@pytest.mark.parametrize("name", RUNS)
def test_the_committed_tables_follow_from_the_committed_records(name, papermill):
    """Tables, sentences and numbers to nine digits, nothing computed: an attack would leave a record."""
    run, results, figures = papermill
    shutil.rmtree(figures, ignore_errors=True)
    run(f"notebooks/{name.partition('@')[0]}.ipynb {os.devnull} {RUNS[name]}")
    assert not list(results.rglob("*.json"))
    written = [path for path in figures.rglob("*") if path.suffix in (".csv", ".md")]
    assert written
    for path in written:
        committed = ROOT / "figures" / path.relative_to(figures)
        new, old = path.read_text(), committed.read_text()
        assert LONG.split(new) == LONG.split(old), committed
        numbers = [[float(number) for number in LONG.findall(text)] for text in (new, old)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-12), committed
