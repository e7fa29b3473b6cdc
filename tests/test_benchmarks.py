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
            add("forward", **timed | {"seconds": drifting({"ours": 1.2, "floor": 1.0, "noise": 0.03})})
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
    for precision, quick in {"float32": 1.0, "bfloat16": 0.25}.items():
        add("full size", **full_size(precision, quick))
        hours = {"hours": 100 * quick, "n_images": 512, "expected": {"coup": 2.0}}
        add("table 1", precision=precision, seconds={"coup": [3.0]}, **hours)
    add("cost", work="images", seconds={str(n): [3e-3 * n**0.9] * 3 for n in (8, 128, 32)})
    add("cost", work="processes", seconds={"1": [4.0], "2": [2.0]})
    add("notebook", n_images=32, seconds={"now": [16.0], "before": [32.0]}, reference="now")
    add("operations", gflop={"guidance": 21.0})
    for group in ("profile", "kernels"):
        add(group, problem="digits", shares={"solver": 0.25, "rest": 0.75})
    machine = {"cpu": "A", "cores": 2, "threads": 2, "gpu": None, "system": "L", "python": "3", "torch": "2"}
    return {"machine_info": machine | {}, "commit_info": {"author": "somebody"}, "benchmarks": found}


def full_size(precision, quick):
    """64 images by the paper's networks, a tenth of the path; all activations do not fit."""
    seconds = {"half kept": 4 * quick, "floor, half kept": 3.2 * quick, "product": 1.0}
    seconds |= {report.DIFFPURE: 8.0} if precision == "float32" else {}
    about = {"problem": "full", "images": 64, "defence": "coup", "precision": precision}
    return about | {
        "n_steps": 10,
        "path": 100,
        "seconds": drifting(seconds),
        "references": {"half kept": "floor, half kept"},
        "flop": {"half kept": 8e14, "product": 2e15},
        "memory_mib": {"half kept": 3072.0},
        "cosines": {"ours": [1.0], report.DIFFPURE: [0.75, 0.25]},
    }


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
    assert row["seconds"] == {"ours": 1.32, "floor": 1.1, "noise": 0.033}
    assert row["rounds"] == 3
    assert report.ratio([2, 2, 9], [1, 4, 3]) == [1.25, 2, 2.5]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.05])
def test_a_fit_finds_the_exponent(power):
    work = (4096, 256, 1024)  # in whatever order
    assert report.exponent({str(n): 0.02 * n**power for n in work}) == pytest.approx(power)


def test_the_page_has_every_number_and_the_summary_the_main_ones(folder):
    page = (folder / "figures" / "benchmarks" / "cpu.md").read_text()
    for text in (
        "| **1.20** [1.20, 1.20] | ≤ 1.25 | 2.5% |",
        "| **1.20** [1.20, 1.20] | ≤ 1.05 |  | 4.5 (50%) | 0.7500 (0.5000) |",
        f"| COUP: {report.DIFFPURE} | 3.3 s | **1.50** [1.50, 1.50] |  | 0.5000 (0.0000) |",
        f"| COUP: {report.OURS} | 2.2 s | 1 | 100 MiB | 1.0000 (1.0000) |",
        "| COUP: bfloat16 | **0.50** [0.50, 0.50] | 0.9500 (0.9000) | 61.25 % | 60.00 % | 2 of 128 |",
        "| WRN-28-10 | 1 | 1 | 1.54 s | 2.2 s | **0.70** [0.70, 0.70] | 1.0000 (1.0000) |",
        "| 64 | 10 | float32 | does not fit | does not fit | 4.4 s (**1.25**; 3.0 GiB) | does not fit |",
        "| half kept: 4.4 s | 182 (10% of 1.82e+03) | 2.00 | 1.0000 (1.0000) | 0.5000 (0.2500) | 2.6 |",
        "| half kept: 1.1 s | 727 (40% of 1.82e+03) | 8.00 | 1.0000 (1.0000) | 0.5000 (0.2500) | 10 |",
        "| float32 | 512 | 100 | COUP 2 s, 3 s | 150 |",
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
    assert "bfloat16 1.25 × its floor, 727 (40% of 1.82e+03) TFLOP/s, DiffPure's adjoint 8.00 ×." in paragraph
    assert "float32 150, bfloat16 37.5." in paragraph and "Not measured on a GPU." in paragraph


def measured_again(folder, **machine):
    """A part: of what is there one row anew, and one that is not there yet."""
    part = made_up()
    again = full_size("float32", 2.0), full_size("float32", 3.0) | {"images": 8}
    part["benchmarks"] = [{"group": "full size", "extra_info": info} for info in again]
    part["machine_info"] |= machine
    (folder / "part.json").write_text(json.dumps(part))
    report.main([str(folder / "part.json")])
    return {path.stem: json.loads(path.read_text())["groups"] for path in (folder / "results").glob("*.json")}


def test_a_part_is_put_into_what_was_measured_before(folder):
    before = json.loads((folder / "results" / "cpu.json").read_text())["groups"]
    after = measured_again(folder)["cpu"]
    rows = [(row["images"], row["precision"], row["seconds"]["half kept"]) for row in after["full size"]]
    assert rows == [(64, "float32", 8.8), (64, "bfloat16", 1.1), (8, "float32", 13.2)]
    assert {name: after[name] for name in before if name != "full size"} == {
        name: rows for name, rows in before.items() if name != "full size"
    }
    other = measured_again(folder, cpu="B")["cpu"]
    assert list(other) == ["full size"] and len(other["full size"]) == 2


def test_a_page_has_what_was_measured_on_its_device(folder):
    measured_again(folder, gpu="a card")
    page = (folder / "figures" / "benchmarks" / "gpu.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Benchmarks on gpu",
        "## Large networks",
    ]
    paragraph = (folder / "figures" / "benchmarks" / "summary.md").read_text()
    assert paragraph.count("**Large networks.**") == 2 and "Not measured" not in paragraph


def test_what_is_committed_names_nobody_and_is_small(folder):
    text = (folder / "results" / "cpu.json").read_text()
    assert "somebody" not in text and len(text) < 20_000
    assert json.loads(text)["machine"] == made_up()["machine_info"]
