"""How tests are run: every part of `make test`, whatever the others find, and the end says which failed."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = """#!/bin/sh
echo "$(basename $0) $*; ${ONEDNN_MAX_CPU_ISA:-native}"
[ "$(basename $0)" != "$FAILS" ]
"""
LINTERS = ["ruff check .; native", "ruff format --check .; native", "mypy ; native"]


@pytest.fixture
def make(tmp_path):
    """Runs a target with tools that only say how they were called; the one that is named fails."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "mypy", "pytest"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()

    def run(target, fails):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        return subprocess.run(
            ["make", "--silent", target],
            cwd=tmp_path,
            env=environment | {"FAILS": fails},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(("fails", "named"), [("nothing", 0), ("ruff", 2), ("mypy", 1), ("pytest", 2)])
def test_every_part_runs_and_those_that_failed_are_named(make, fails, named):
    run = make("test", fails)
    *linters, tests, numerical, end = run.stdout.split("\n", 5)
    assert linters == LINTERS
    assert tests.endswith("--nbval-lax notebooks tests; native")
    assert numerical.startswith("pytest") and numerical.endswith("tests/test_likelihood.py; AVX2")
    assert end.count(f".venv/bin/{fails}") == named
    assert (run.returncode != 0) == (named > 0) == ("Failed:" in end)


def test_lint_too(make):
    run = make("lint", "mypy")
    assert run.returncode != 0 and run.stdout == "\n".join([*LINTERS, "Failed:", "  .venv/bin/mypy", ""])


def test_notebooks_run_in_forked_kernels_and_one_that_fails_is_named(tmp_path):
    given = {"COUP_RESULTS": tmp_path / "results", "COUP_FIGURES": tmp_path / "figures", "COUP_SMOKE": "1"}
    command = [sys.executable, "-m", "workflow.notebooks", "smoke", "02_ablation", "05_bpda@l3"]
    environment = os.environ | {name: str(value) for name, value in given.items()}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "02_ablation: override: budget = 'smoke' (default 'quick')" in run.stdout
    assert "02_ablation: done" in run.stdout and (tmp_path / "figures/digits").is_dir()
    assert "05_bpda@l3: started" in run.stdout and "05_bpda@l3: done" not in run.stdout
    assert "ValueError: norm: expected one of linf, l2; got 'l3'" in run.stderr


def test_runs_have_folders_of_their_own_and_the_processes_of_one_share_it(monkeypatch):
    def folder():
        kept.append(runpy.run_path(str(ROOT / "conftest.py")))
        return os.environ["COUP_RESULTS"], os.environ["COUP_FIGURES"]

    kept = []  # a run's folder goes with it
    for name in ("COUP_RESULTS", "COUP_FIGURES"):
        monkeypatch.setenv(name, "a user's")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    runs = [folder(), folder()]
    assert len({*runs[0], *runs[1], "a user's"}) == 5
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert folder() == runs[1]
