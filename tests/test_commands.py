"""The commands of the README's table, as typed, at smoke size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"`(papermill notebooks/\S+ .*?)`", (ROOT / "README.md").read_text())


def status():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_no_command_of_the_readmes_table_changes_what_is_committed(tmp_path):
    """At smoke size, as typed, without any variable that says where things go."""
    assert len(COMMANDS) > 8
    before = status()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COUP_")}
    for command in COMMANDS:
        notebook, _, *given = shlex.split(command)[1:]
        line = [
            sys.executable,
            "-m",
            "papermill",
            "--no-progress-bar",
            notebook,
            tmp_path / "out.ipynb",
            *given,
        ]
        subprocess.run(line, cwd=ROOT, env=environment | {"COUP_SMOKE": "1"}, check=True, capture_output=True)
    assert status() == before
