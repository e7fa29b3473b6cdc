import pytest

from coup_lib import paths


@pytest.fixture(autouse=True)
def results_folder(tmp_path, monkeypatch):
    """An empty folder, which takes the records of this test: it reads none that another has made."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path
