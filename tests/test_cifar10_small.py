"""cifar10-small in parts: killed and resumed, out of time, without a package, and as notebooks read it."""

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import random_cifar

from coup_lib import paths
from coup_lib.evaluation.records import reading_only
from coup_lib.paths import DATA_VARIABLE, WEIGHTS
from coup_lib.studies import grids
from workflow import cifar10_small as session

ROOT = Path(__file__).parents[1]
# Networks that are tiny, and digits in place of CIFAR under attack; processes that it starts read it, too.
PROGRAM = """
from coup_lib.networks.small import NETWORKS, PatchedDDPMpp
from workflow import cifar10_small as session

sizes = {"width": 8, "multipliers": (1, 1), "blocks": 1, "attention_at": (8,)}
NETWORKS["cifar10"]["score-small"] = lambda: PatchedDDPMpp(**sizes)
session.NETWORKS = {name: session.NETWORKS[name] for name in ("score-small", "card")}
session.TABLES = {"fig2b": session.Records("02_ablation", {"profile": "digits", "classifier": "cnn-small"})}
session.STEPS = (*session.NETWORKS, *session.TABLES)
if __name__ == "__main__":
    session.main()
"""
MISSING = ("IPython", "ipykernel", "jupyter_client", "papermill", "mistune", "torchsde", "autoattack")


def digests(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")}


def code_of(notebook):
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def environment(tmp_path):
    """Random images in place of CIFAR-10, and weights of digits where the run looks for weights."""
    random_cifar.write(tmp_path)
    shutil.copytree(WEIGHTS, tmp_path / "out" / "smoke" / "weights")
    (tmp_path / "program.py").write_text(PROGRAM)
    return os.environ | {DATA_VARIABLE: str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_part_that_is_killed_is_gone_on_with(environment, tmp_path, monkeypatch):
    command = [sys.executable, "program.py", "--out", "out", "--smoke"]
    given = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE}
    out, before = tmp_path / "out" / "smoke", digests(WEIGHTS)
    made = lambda: [*(out / "results").glob("digits/*.json")]  # noqa: E731
    killed = subprocess.Popen(command, **given)
    end = time.monotonic() + 300
    while not made() and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and children
    assert not psutil.wait_procs(children, timeout=60)[1], "processes outlived the one that started them"
    early = {path: path.stat().st_mtime_ns for path in made()}

    second = subprocess.run(command, **given, timeout=300)
    assert second.returncode == 0
    assert second.stdout.splitlines()[-1] == "done: score-small, card, fig2b; left: nothing"
    assert "score-small:" not in second.stdout, "trained again"
    assert {path: path.stat().st_mtime_ns for path in early} == early
    assert digests(WEIGHTS) == before != digests(out / "weights")
    noted = json.loads((out / "session.json").read_text())
    assert noted["score-small"]["steps"] >= 1 and noted["score-small"]["left"] == 0
    monkeypatch.setattr(paths, "RESULTS", out / "results")
    with reading_only():
        grids.compute("02_ablation", {"classifier": "cnn-small"})


@pytest.fixture
def kept(monkeypatch):
    """What a part changes in the environment is as before after the test."""
    for name in ("COUP_RESULTS", "COUP_WEIGHTS", "COUP_SMOKE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.setattr(session, "load_split", lambda *given: None)


def failing(*given, **more):
    raise RuntimeError("nothing there")


def test_missing_images_are_said_before_anything_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", failing)
    with pytest.raises(SystemExit, match="2"):
        session.main(["--out", str(tmp_path / "out")])
    assert f"error: no whole cifar10 at {tmp_path}: expected the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_time_nothing_is_begun_and_the_last_line_says_what_is_left(kept, tmp_path, capsys):
    (tmp_path / "smoke").mkdir()
    session.note(tmp_path / "smoke", "fig2b", left=90.0)
    with pytest.raises(SystemExit) as ended:
        session.main(["--out", str(tmp_path), "--smoke", "--minutes", "0", "--only", "card", "fig2b"])
    assert not ended.value.code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "done: nothing; left: card, fig2b; about 1:30 min for 1 of them"
    with pytest.raises(SystemExit, match="2"):
        session.main(["--out", str(tmp_path), "--only", "fig3"])
    assert "--only: invalid choice: 'fig3' (choose from 'score-small', " in capsys.readouterr().err


def test_a_step_without_its_package_is_named_and_left_out(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "find_spec", lambda name: None if name == "torchsde" else name)
    monkeypatch.setattr(session, "run", lambda *given, end: pytest.fail(f"{given} was begun"))
    with pytest.raises(SystemExit):
        session.main(["--out", str(tmp_path), "--smoke", "--only", "stronger"])
    assert capsys.readouterr().out.splitlines() == [
        "stronger is left out, for want of torchsde",
        "done: nothing; left: stronger",
    ]


def test_it_starts_where_nothing_is_installed_that_it_can_do_without():
    program = f"import sys; sys.modules.update(dict.fromkeys({MISSING})); import workflow.cifar10_small"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", session.TABLES)
def test_notebooks_know_every_parameter_that_a_step_gives_them(name):
    step = session.TABLES[name]
    (cell,) = (code for code in code_of(step.run.partition("@")[0]) if code.startswith("# Parameters"))
    known = {node.target.id for node in ast.parse(cell).body if isinstance(node, ast.AnnAssign)}
    assert {*step.given, "precision"} <= known
    assert grids.of_run(step.run, step.given) and " -p classifier resnet" in step.papermill
