"""The commands of the README's table, as typed, at smoke size."""

import os
import re
import subprocess
from contextlib import closing

from forked import ROOT, Papermill

COMMANDS = re.findall(r"`papermill (notebooks/\S+) out.ipynb( .*?)?`", (ROOT / "README.md").read_text())


def status():
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


def test_no_command_of_the_readmes_table_changes_what_is_committed(tmp_path):
    """At smoke size, as typed, without any variable that says where things go.

    Records that this run's notebooks have made already, with nbval, are read back rather than made again.
    """
    assert len(COMMANDS) > 8
    before = status()
    made = os.environ["COUP_RESULTS"]
    with closing(Papermill(tmp_path / "log", COUP_SMOKE="1", COUP_PUBLISHED=made)) as papermill:
        for notebook, given in COMMANDS:
            papermill(f"{notebook} '{tmp_path}/out.ipynb' {given}")
    assert status() == before
