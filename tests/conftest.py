import os

import pytest

from coup_lib import paths


@pytest.fixture(autouse=True)
def results_folder(tmp_path, monkeypatch):
    """An empty folder, which takes the records of this test: it reads none that another has made.

    Nothing waits for the disk: tests kill processes, and none cuts the power.
    """
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return tmp_path
