"""What users rely on in the notebooks: listed parameters, refused mistakes, any folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def parameter_lines(path):
    cells = nbformat.read(path, 4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    first, *lines = cell.source.splitlines()
    assert first == "# Parameters"
    return lines


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_lists_every_parameter_with_its_help(path):
    listed = papermill.inspect_notebook(str(path))
    lines = parameter_lines(path)
    assert len(listed) == len(lines)
    assert all(parameter["help"] for parameter in listed.values())
    for line in lines:
        assert re.fullmatch(r"\w+: [\w\[\]]+ = [^=]+  # [^=]+", line), line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kernel_and_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"]["name"] == "python"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    tags = [tag for cell in code for tag in cell["metadata"].get("tags", [])]
    assert "injected-parameters" not in tags, "a run with the defaults would obey this cell"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no executed figure"
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("normm", "l2", "unknown parameter 'normm'; this notebook knows budget, "),
        ("norm", "l3", "norm: expected one of linf, l2; got 'l3'"),
        ("eps", "-1", "eps: expected a number greater than 0; got -1"),
        ("n_images", "9999", "n_images: expected a number greater than 0 and at most 512; got 9999"),
    ],
)
def test_mistakes_stop_at_once(tmp_path, parameter, value, message):
    """From another folder, as a user would type it."""
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "04_autoattack.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", parameter, value]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert f"ValueError: {message}" in run.stderr


def test_a_notebook_runs_from_another_folder(tmp_path):
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / "04_autoattack.ipynb"),
        "out.ipynb",
    ]
    command += ["-p", "norm", "l2", "-p", "eps", "8/255"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    text = (folder / "out.ipynb").read_text()
    assert "override: norm = 'l2'" in text and "override: eps = '8/255'" in text
    assert list(folder.iterdir()) == [folder / "out.ipynb"]


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    """Real images where COUP_DATA has them; else random pixels in the same layout."""
    if os.environ.get("COUP_DATA"):
        return Path(os.environ["COUP_DATA"])
    root, random = tmp_path_factory.mktemp("cifar"), np.random.default_rng(0)
    for dataset, classes in (("cifar10", 10), ("cifar100", 100)):
        arrays = {}
        for part, n in (("train", 200), ("test", 40)):
            arrays[f"x_{part}"] = random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
            arrays[f"y_{part}"] = random.integers(0, classes, n)
        np.savez(root / f"{dataset}_exact_subset.npz", **arrays, idx_train=np.arange(200))
    return root


@pytest.mark.parametrize("profile", ["cifar10", "cifar100"])
def test_the_papers_tier_runs_the_same_notebook(tmp_path, cifar_root, profile):
    """At smoke size: other data, DDPM++ or EDM's network at their smallest, the same code."""
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "04_autoattack.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", "profile", profile, "-p", "subset", "first"]
    environment = {**os.environ, "COUP_DATA": str(cifar_root), "COUP_MODELS": str(tmp_path / "no models")}
    environment |= {"COUP_RESULTS": str(tmp_path / "results"), "COUP_FIGURES": str(tmp_path / "figures")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    claims = (tmp_path / "figures" / profile / "likelihood_linf_claims.md").read_text()
    assert "Guidance makes likelihood maximisation more robust* (n = 4" in claims
    assert (tmp_path / "figures" / profile / "table1.png").exists()
