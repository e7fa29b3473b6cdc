"""Papermill for many notebooks: what they import is imported once, and their kernels are forked from it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOOP = """
import shlex, sys, traceback

from papermill.cli import papermill
from workflow.notebooks import fork_kernels

fork_kernels()
for line in sys.stdin:
    try:
        papermill(shlex.split(line), standalone_mode=False)
        print("done", flush=True)
    except Exception:
        traceback.print_exc()
        print("failed", flush=True)
"""


class Papermill:
    """Runs command lines, `notebooks/NAME.ipynb OUTPUT [-p NAME VALUE]`, in a folder until it is closed.

    given: the variables COUP_*; those of the tests' own run are not passed on. log: what is complained of.
    """

    def __init__(self, log: Path, folder: Path = ROOT, **given: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COUP_")}
        kept["PYTHONPATH"] = str(ROOT)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w")}
        command = [sys.executable, "-c", LOOP]
        self.log = log
        self.process = subprocess.Popen(command, cwd=folder, env=kept | given, text=True, **pipes)

    def __call__(self, line: str) -> None:
        """One command; fails where one of the notebook's cells does."""
        self.process.stdin.write(f"--no-progress-bar {line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", self.log.read_text()[-3000:]

    def close(self) -> None:
        """End the process, and with it its kernels."""
        self.process.communicate(timeout=60)
