"""Every committed number follows from the committed records: the notebooks at full size write them anew."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONG = re.compile(r"-?\d+\.\d{6,}(?:e-?\d+)?")  # a number whose last digits depend on SciPy's version
RUNS = {
    "00_toy_analysis": {},
    "01_case_study": {"budget": "full"},
    "02_ablation": {"budget": "full"},
    "03_sweeps": {"budget": "full"},
    "04_autoattack": {"budget": "full"},
    "04_autoattack@l2": {"budget": "full", "norm": "l2"},
    "05_bpda": {"budget": "full"},
    "06_adversarial_training": {"budget": "full"},
    "07_stronger_attacks": {"budget": "full"},
    "08_beyond": {"budget": "full"},
    "09_report": {"budget": "full"},
}


@pytest.mark.parametrize("run", RUNS)
def test_the_committed_tables_follow_from_the_committed_records(run, tmp_path):
    """Tables, sentences and numbers to nine digits, nothing computed: an attack would leave a record."""
    notebook = ROOT / "notebooks" / f"{run.partition('@')[0]}.ipynb"
    given = [word for pair in RUNS[run].items() for word in ("-p", *pair)]
    folders = {"COUP_RESULTS": tmp_path / "results", "COUP_FIGURES": tmp_path / "figures"}
    environment = {name: value for name, value in os.environ.items() if name != "COUP_SMOKE"}
    environment |= {"COUP_PUBLISHED": str(ROOT / "results")} | {k: str(v) for k, v in folders.items()}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, os.devnull, *given]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    assert not list(folders["COUP_RESULTS"].rglob("*.json"))
    written = [path for path in folders["COUP_FIGURES"].rglob("*") if path.suffix in (".csv", ".md")]
    assert written
    for path in written:
        committed = ROOT / "figures" / path.relative_to(folders["COUP_FIGURES"])
        new, old = path.read_text(), committed.read_text()
        assert LONG.split(new) == LONG.split(old), committed
        numbers = [[float(number) for number in LONG.findall(text)] for text in (new, old)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-12), committed
