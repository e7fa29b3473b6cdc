"""What users rely on in the notebooks: listed parameters, refused mistakes, any folder."""

import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import random_cifar
from forked import Papermill

from coup_lib import paths
from coup_lib.evaluation import run
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.progress import Plan
from coup_lib.reporting import readme
from coup_lib.studies import grids

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


VERDICTS = re.compile(r"\*\*(holds|does not hold|is not decided)\*\*")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_says_what_came_out_and_how_long_it_takes(path):
    first = nbformat.read(path, 4).cells[0].source
    template, told = re.search(r"<!-- filled\n(.*?)\n-->\n(.*?)\n<!-- end -->", first, re.DOTALL).groups()
    assert re.search(r"\*\*Time:\*\* \d+\.\d minutes", told)
    assert re.match(r"\*\*(Verdict|What it does)", told) and "{" not in told
    assert not VERDICTS.search(template), "a verdict is taken from a table"
    found = VERDICTS.findall(told)
    assert found[:1] != ["holds"], "failures come first"
    assert found or path.stem[:2] in ("09", "10", "11")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_is_in_step_with_the_committed_tables(path):
    regenerated = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "figures"], cwd=ROOT)
    if regenerated.returncode:
        pytest.skip("figures were regenerated here; notebooks quote the committed ones")
    first = nbformat.read(path, 4).cells[0].source
    assert readme.filled(first) == first, "run `make readme`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_short_readable_and_of_the_size_that_is_said(path):
    notebook = nbformat.read(path, 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = [line for output in outputs for line in output.get("text", "").splitlines()]
    assert len(printed) <= 8 and not any(" gone" in line or "done in" in line for line in printed)
    for output in outputs:
        data = output.get("data", {})
        assert not re.search(r"Config\(|Parameters\(", data.get("text/plain", ""))
        if "image/png" in data:
            assert len(output.metadata["image/png"]["alt"]) > 40
    budget = notebook.metadata["papermill"]["parameters"].get("budget", "quick")
    assert f"`-p budget {budget}`" in notebook.cells[0].source or budget == "quick"


def test_long_work_begins_with_a_line_that_says_what_is_to_be_done(capsys, monkeypatch):
    config = Config(n_images=2, n_iter=1, eot=1, n_steps=2)
    plans = []
    monkeypatch.setattr(run, "Plan", lambda *given, **how: plans.append(how["after"]) or Plan(*given, **how))
    experiment, other = grids.grid("01_case_study", config, eps_factors=[1.0, 2.0])
    grids.prepare([experiment, other])
    experiment.predictions()
    other.predictions()
    assert plans[0] > plans[1] == 0
    capsys.readouterr()
    (experiment,) = grids.grid("01_case_study", replace(config, seed=1), eps_factors=[1.0])
    grids.prepare([experiment])
    said = r"To do: 1 attacks and 1 evaluations of what they found; about 0:\d\d min on cpu\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    experiment.predictions()
    assert "all 2 done in 0:" in capsys.readouterr().err
    grids.prepare([experiment])
    experiment.predictions()
    assert capsys.readouterr().err == "Every attack is on record, so none is run.\n"


def begin(path, given):
    """Runs a notebook's first cells up to its settings, with a cell of papermill's among them."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    before = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    sources = [cell.source for cell in cells]
    shell = SimpleNamespace(input_transformers_cleanup=[])  # as much of IPython's as the cells ask for
    namespace = {"get_ipython": lambda: shell, "In": []}
    for source in [*sources[:before], f"# Parameters\n{given}", sources[before]]:
        namespace["In"].append(source)
        lines = source.splitlines(keepends=True)
        for transform in shell.input_transformers_cleanup:
            lines = transform(lines)
        exec("".join(lines), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_mistyped_parameter_stops_every_notebook(path):
    with pytest.raises(ValueError, match="unknown parameter 'normm'; this notebook knows "):
        begin(path, "normm = 'l2'")


@pytest.mark.parametrize("notebook", ["04_autoattack", "10_your_defence"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("norm = 'l3'", "norm: expected one of linf, l2; got 'l3'"),
        ("n_images = 9999", "n_images.*: expected a whole number of at least . and at most 512; got 9999"),
        ("seed = -1", "seed: expected a whole number of at least 0 and at most .*; got -1"),
    ],
)
def test_mistakes_stop_at_once(notebook, given, message):
    with pytest.raises(ValueError, match=message):
        begin(ROOT / "notebooks" / f"{notebook}.ipynb", given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("lambda 2", r"ValueError: unknown parameter 'lambda'; did you mean guidance_weight\?"),
        ("eot_counts 3", "ValueError: eot_counts: expected a list of whole numbers; got 3"),
    ],
)
def test_papermill_ends_with_what_is_wrong_in_one_line(tmp_path, given, line):
    """Before Python reads the parameters, and in the notebook's own cell."""
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "05_bpda.ipynb")]
    command += [str(tmp_path / "out.ipynb"), "-p", *given.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    told = run.stderr.split("Exception encountered at")[1].strip().splitlines()[1:]
    assert len(told) == 1 and re.fullmatch(line, told[0]), told
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    (error,) = (out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error")
    assert error["traceback"] == told


def test_outputs_lie_beside_the_notebooks_whatever_folder_they_are_run_from(tmp_path, monkeypatch):
    for name in ("COUP_RESULTS", "COUP_PUBLISHED", "COUP_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for smoke, outputs in (("1", ROOT / "build" / "smoke"), ("", ROOT / "build")):
        monkeypatch.setenv("COUP_SMOKE", smoke)
        found = runpy.run_path(paths.__file__)
        assert (found["RESULTS"], found["FIGURES"]) == (outputs / "results", outputs / "figures")
        assert found["PUBLISHED"] == (outputs / "results" if smoke else ROOT / "results")
    monkeypatch.setenv("COUP_RESULTS", str(tmp_path))  # nothing stands behind a place of its own
    assert runpy.run_path(paths.__file__)["PUBLISHED"] == tmp_path


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    """Real images where COUP_DATA has them; else random pixels in the same layout."""
    if os.environ.get("COUP_DATA"):
        return Path(os.environ["COUP_DATA"])
    root = tmp_path_factory.mktemp("cifar")
    for classes in (10, 100):
        random_cifar.write(root, classes, train=200, test=40)
    return root


def test_the_papers_tier_runs_the_same_notebooks_from_any_folder(tmp_path, cifar_root):
    """At smoke size: other data, DDPM++ or EDM's network at their smallest, the same code."""
    folder, results, figures = (tmp_path / name for name in ("a folder with spaces", "results", "figures"))
    folder.mkdir()
    places = {"COUP_DATA": cifar_root, "COUP_MODELS": tmp_path / "no models"}
    places |= {"COUP_RESULTS": results, "COUP_FIGURES": figures}
    given = "-p subset first -p eps 4/255 -p n_images 2 -p n_iter 1 -p eot 1 -p n_steps 2 -p n_draws 1"
    names = {name: str(path) for name, path in places.items()}
    with closing(Papermill(tmp_path / "log", folder, COUP_SMOKE="1", **names)) as papermill:
        for notebook, profile, more in (
            ("04_autoattack", "cifar10", "-p norm l2 -p n_targets 1 -p square_queries 1"),
            ("05_bpda", "cifar100", "-y '{eot_counts: [1], purifications: 2}'"),
        ):
            path = ROOT / "notebooks" / f"{notebook}.ipynb"
            papermill(f"'{path}' out.ipynb -p profile {profile} {given} {more}")
            text = (folder / "out.ipynb").read_text()
            assert f"override: profile = '{profile}'" in text and "override: eps = '4/255'" in text
            assert list(folder.iterdir()) == [folder / "out.ipynb"]
    for name in ("cifar10/table2.png", "cifar10/likelihood_l2_claims.md", "cifar100/table3_linf.png"):
        assert (figures / name).exists()
