"""The benchmarks' report from made-up measurements: its ratios, its fits, and what it writes."""

import json

import pytest

from benchmarks import report
from coup_lib import paths

DEFENCES = ("reverse", "coup")
METHODS = {report.OURS: 2.0, "sdeint": 1.5, report.DIFFPURE: 3.0}
# A machine that slows down: ratios within rounds are steady, seconds are not.
DRIFT = (1.0, 1.1, 10.0)


def drifting(seconds):
    return {name: [value * drift for drift in DRIFT] for name, value in seconds.items()}


def made_up():
    """pytest-benchmark's JSON, as far as the report reads it."""
    found = []

    def add(group, **info):
        found.append({"group": group, "name": "test", "stats": {}, "extra_info": info})

    for name in report.PROBLEMS:
        for defence in DEFENCES:
            given = {"problem": name, "defence": defence, "device": "cpu", "precision": "float32"}
            timed = given | {"reference": "floor", "seconds": drifting({"ours": 1.2, "floor": 1.0})}
            add("forward", **timed)
            exact = {"cosines": {"ours": [1.0, 0.5]}, "flop": {"ours": 6e9, "product": 2e10}}
            pulled = drifting({"ours": 1.2, "floor": 1.0, "product": 2.0})
            add("gradient", **timed | exact | {"seconds": pulled, "activations": "replayed"})
            cosines = {method: [1.0, 0.0] if method == report.DIFFPURE else [1.0, 1.0] for method in METHODS}
            peers = {"reference": report.OURS, "seconds": drifting(METHODS), "cosines": cosines}
            speeds = {"float32": 2.0, "bfloat16": 1.0}
            cheaper = {"seconds": drifting(speeds), "reference": "float32", "n_images": 128}
            cheaper |= {"cosines": {"bfloat16": [1.0, 0.9]}, "robust": {"float32": 60.0, "bfloat16": 61.25}}
            left = {"changed": {"float32": 0, "bfloat16": 2}}
            add("cheaper", **given | cheaper | left)
            add("peers", **given | peers, memory_mib={report.OURS: 100.0})
    for name, quick in {"resnet20": 1.3, "Standard": 1.4}.items():
        timed = {"seconds": drifting({"frozen layers": quick, "PyTorch's own": 2.0}), "n_images": 1}
        exact = {"reference": "PyTorch's own", "cosines": {"frozen layers": [1.0]}}
        add("second order", problem=name, threads=1, **timed | exact)
    add("cost", work="images", seconds={str(n): [3e-3 * n**0.9] * 3 for n in (8, 128, 32)})
    add("cost", work="processes", seconds={"1": [4.0], "2": [2.0]})
    add("notebook", n_images=32, seconds={"now": [16.0], "before": [32.0]}, reference="now")
    add("operations", gflop={"guidance": 21.0})
    for group in ("profile", "kernels"):
        add(group, problem="digits", shares={"solver": 0.25, "rest": 0.75})
    machine = {"cpu": "A", "cores": 2, "threads": 2, "gpu": None, "system": "L", "python": "3", "torch": "2"}
    return {"machine_info": machine | {}, "commit_info": {"author": "somebody"}, "benchmarks": found}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "raw.json").write_text(json.dumps(made_up()))
    report.main([str(tmp_path / "raw.json")])
    return tmp_path


def test_ratios_are_taken_within_rounds_and_seconds_are_medians(folder):
    row = json.loads((folder / "results" / "cpu.json").read_text())["groups"]["forward"][0]
    assert row["ratio"]["ours"] == [1.2, 1.2, 1.2]
    assert row["seconds"] == {"ours": 1.32, "floor": 1.1}
    assert row["rounds"] == 3
    assert report.ratio([2, 2, 9], [1, 4, 3]) == [1.25, 2, 2.5]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.05])
def test_a_fit_finds_the_exponent(power):
    work = (4096, 256, 1024)  # in whatever order
    assert report.exponent({str(n): 0.02 * n**power for n in work}) == pytest.approx(power)


def test_the_page_has_every_number_and_the_summary_the_main_ones(folder):
    page = (folder / "figures" / "benchmarks" / "cpu.md").read_text()
    for text in (
        "| **1.20** [1.20, 1.20] | ≤ 1.25 |",
        "| **1.20** [1.20, 1.20] | ≤ 1.10 | 4.5 (50%) | 0.7500 (0.5000) |",
        f"| COUP: {report.DIFFPURE} | 3.3 s | **1.50** [1.50, 1.50] |  | 0.5000 (0.0000) |",
        f"| COUP: {report.OURS} | 2.2 s | 1 | 100 MiB | 1.0000 (1.0000) |",
        "| COUP: bfloat16 | **0.50** [0.50, 0.50] | 0.9500 (0.9000) | 61.25 % | 60.00 % | 2 of 128 |",
        "| WRN-28-10 | 1 | 1 | 1.54 s | 2.2 s | **0.70** [0.70, 0.70] | 1.0000 (1.0000) |",
        "| images | 8 | 128 | **0.90** |",
        "| processes | 1 | 2 | **-1.00** |",
        "2.00 images per second (1.00 before)",
        "| solver | 25.0 % |",
    ):
        assert text in page
    assert (folder / "figures" / "benchmarks" / "cpu_cost.png").exists()
    paragraph = (folder / "figures" / "benchmarks" / "summary.md").read_text()
    assert "| digits | COUP | bfloat16 | 0.50 | 2 of 128 |" in paragraph
    assert "takes 1.50 times as long" in paragraph and "images 0.90, processes -1.00" in paragraph
    assert "takes 0.65 (ResNet-20) and 0.70 (WRN-28-10) times as long" in paragraph
    assert "Not measured on a GPU." in paragraph


def test_what_is_committed_names_nobody_and_is_small(folder):
    text = (folder / "results" / "cpu.json").read_text()
    assert "somebody" not in text and len(text) < 20_000
    assert json.loads(text)["machine"] == made_up()["machine_info"]
