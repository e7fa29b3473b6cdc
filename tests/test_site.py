"""The site, built as `make docs` builds it, where its packages are installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning_and_every_image_says_what_it_shows(tmp_path):
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs"]
    command += ["-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = [*(tmp_path / "site" / "docs").glob("*.html"), *(tmp_path / "site" / "notebooks").glob("*.html")]
    images = [tag for page in pages for tag in re.findall(r"<img\b[^>]*>", page.read_text())]
    assert len(images) > 30
    for tag in images:
        alt = re.search(r'alt="([^"]*)"', tag)
        assert alt and len(alt[1]) > 20, tag
