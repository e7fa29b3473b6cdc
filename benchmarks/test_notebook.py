"""A whole 04_autoattack on digits, and where its time goes."""

import cProfile
import os
import pstats
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DEVICE, KEEP, ours, problem, sizes, take_turns
from torch.profiler import ProfilerActivity, profile

from coup_lib import paths
from coup_lib.defences import PAPER
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.paths import ROOT, is_smoke

N_IMAGES = 4 if is_smoke() else 32
# Another checkout, whose notebook is timed in the same rounds: what it was like before a change.
BEFORE = os.environ.get("COUP_BEFORE")

# Who spends the time, by the file or the built-in function that it is spent in; the first that fits.
SPENDERS = {
    "derivatives, by autograd": ("run_backward",),
    "convolutions and products": ("conv2d", "linear", "matmul", "conv2d_input"),
    "rest of the networks": ("/torch/", "torch.", "/networks/", "/score.py", "/guidance.py", "/hessian.py"),
    "solver": ("/solver.py", "/sde.py", "/gradients.py"),
    "noise": ("/purify.py", "randn"),
    "attack": ("/attacks.py", "autoattack/"),
    "records": ("/records.py", "/run.py", "/files.py", "/json/", "/numpy/", "posix", "hashlib"),
}


@pytest.mark.benchmark(group="notebook")
def test_notebook(benchmark: Any, tmp_path: Path) -> None:
    """By papermill, from nothing to the last cell, in a process of its own."""
    made: list[Path] = []

    def run(root: Path) -> None:
        made.append(tmp_path / str(len(made)))
        made[-1].mkdir()
        places = {"COUP_RESULTS": str(made[-1] / "results"), "COUP_FIGURES": str(made[-1] / "figures")}
        notebook, executed = str(root / "notebooks" / "04_autoattack.ipynb"), str(made[-1] / "executed.ipynb")
        command = [sys.executable, "-m", "papermill", notebook, executed, "-p", "n_images", str(N_IMAGES)]
        environment = os.environ | places | {"PYTHONPATH": str(root)}
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=root)

    rivals = {"now": lambda: run(ROOT)}
    if BEFORE:
        rivals["before"] = lambda: run(Path(BEFORE).absolute())
    take_turns(benchmark, rivals, 3, warm_up=0, problem="04_autoattack", reference="now", n_images=N_IMAGES)


@pytest.mark.benchmark(group="profile")
def test_profile(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's attacks and scores, with fewer iterations: looking on takes time too."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    config = Config(n_images=N_IMAGES, n_iter=4, square_queries=50, n_targets=1)
    profiler = cProfile.Profile()
    evaluation = Evaluation(config, verbose=False)
    columns = benchmark.pedantic(lambda: profiler.runcall(evaluation.columns, PAPER, autoattack=True))
    assert set(columns) == set(PAPER)
    benchmark.extra_info.update(device=DEVICE.type, problem="04_autoattack", shares=_shares(profiler))


def _shares(profiler: cProfile.Profile) -> dict[str, float]:
    """Spender → its share of the time."""
    seconds = dict.fromkeys((*SPENDERS, "rest"), 0.0)
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        seconds[_spender(f"{file}:{function}")] += own
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def _spender(place: str) -> str:
    fitting = (name for name, marks in SPENDERS.items() if any(mark in place for mark in marks))
    return next(fitting, "rest")


@pytest.mark.benchmark(group="kernels")
@pytest.mark.parametrize("name", ["digits", "cifar"])
def test_kernels(benchmark: Any, name: str) -> None:
    """One exact gradient of COUP by share of convolutions and matrix products."""
    given = problem(name, "coup", **sizes(name))
    ours(given, KEEP)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiled:
        benchmark.pedantic(lambda: ours(given, KEEP))
    seconds: dict[str, float] = {"convolutions and products": 0.0, "all else": 0.0}
    for event in profiled.key_averages():
        product = any(part in event.key for part in ("conv", "mm", "linear", "gemm"))
        own = event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        seconds["convolutions and products" if product else "all else"] += own
    shares = {kind: value / sum(seconds.values()) for kind, value in seconds.items()}
    benchmark.extra_info.update(device=DEVICE.type, problem=name, shares=shares)
