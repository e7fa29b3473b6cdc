"""What notebooks attack, declared once, and what that costs: counted before a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coup_lib import gradients as gradients_module
from coup_lib.attacks import Attack, AttackResult
from coup_lib.defences import DEFENCES, PURIFIERS
from coup_lib.evaluation import bench
from coup_lib.evaluation.bench import Bench, against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Experiment
from coup_lib.evaluation.records import reading_only
from coup_lib.evaluation.specs import CLEAN
from coup_lib.guidance import gradient_of, log_confidence
from coup_lib.networks import zoo
from coup_lib.studies import grids
from workflow import estimate

ROOT = Path(__file__).parents[1]


def configs(name, **given):
    return [Config(**given | fixed) for fixed in grids.NOTEBOOKS[name].settings]


def jobs(name, *given, **own):
    return estimate.jobs(grids.grid(name, *(given or configs(name)), **own))


def test_flop_of_a_convolution_and_its_derivatives():
    """2·9·C·K·H·W forward, and again for the input's gradient; a second derivative inside is no obstacle."""
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    forward = 2 * 9 * 3 * 8 * 16 * 16 * 2
    with estimate.FlopCounter() as counter:
        y = convolution(x)
    assert counter.total == forward
    with estimate.FlopCounter() as counter:
        torch.autograd.grad(y.square().sum(), x)
    assert counter.total == forward
    classifier = nn.Sequential(convolution, nn.SiLU(), nn.Flatten(), nn.Linear(2048, 5)).requires_grad_(False)
    with estimate.FlopCounter() as counter:
        gradient = gradient_of(lambda x: log_confidence(classifier, x), x)
        torch.autograd.grad(gradient.square().sum(), x)
    assert counter.total > 3 * forward


def test_calls_of_the_attacks():
    config = Config(n_iter=7, eot=3, n_targets=2, square_queries=11)
    assert CLEAN.calls(config) == (0, 0)
    assert against("apgd-ce", "coup").calls(config) == (21, 0)
    assert against("apgd-ce", "coup", "bpda", eot=2).calls(config) == (0, 14)
    assert against("square", "coup").calls(config) == (0, 11)
    assert against("rays", "coup").calls(config) == (0, 11)
    assert against("standard", "coup").calls(config) == (7 * 5, 11)


def test_looking_ahead_loads_no_network(results_folder, monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a network was loaded")

    for name in ("load_classifier", "load_score"):
        monkeypatch.setattr(bench, name, refuse)
    monkeypatch.setattr(estimate, "is_here", lambda dataset: False)
    found = jobs("04_autoattack")
    assert [str(job.spec) for job in found][:2] == ["clean", "apgd-ce on none, exact"]
    assert found[0].targets == ("none", "diffpure", "reverse", "coup")
    assert not any(job.done for job in found) and not list(results_folder.iterdir())


def plan(defence, **settings):
    """The jobs of an attack on this defence and of scoring it there."""
    return estimate.jobs([Experiment(Config(**settings), {defence: {"it": against("apgd-ce", defence)}})])


def test_a_decision_of_several_purifications_is_counted_as_such():
    one, four = (
        estimate.estimate(plan(defence, n_images=2, n_iter=1, eot=1)) for defence in ("reverse", "averaged")
    )
    for head in ("purifications", "network calls"):
        assert four[head] == PURIFIERS["averaged"].draws * one[head] > 0
    assert four["gradients"] == one["gradients"]


@pytest.mark.parametrize("replayed", [0, 0.8, 1])
@pytest.mark.parametrize("defence", DEFENCES)
def test_network_calls_are_those_that_are_made(monkeypatch, defence, replayed):
    """Each call and each derivative takes a network's operations once; a counter sees no more and no less."""
    measured = gradients_module.steps_kept
    monkeypatch.setattr(
        gradients_module, "steps_kept", lambda *path: min(round(10 * (1 - replayed)), measured(*path))
    )
    config, (x, y) = Config(n_steps=10), (torch.rand(1, 1, 8, 8), torch.tensor([3]))
    classifier = config.classifier
    flop = estimate.measured_score(config).flop, estimate.classifier_flop("digits", classifier)
    gradients = ("exact", "first_order", "adjoint")
    if defence == "none" or PURIFIERS[defence].differentiates_score or replayed:
        gradients = gradients[:2]  # no SDE, or a second derivative that torchsde cannot take
    for gradient in (None, *gradients):
        spec = against("apgd-ce", defence, gradient or "exact")
        job = estimate.Job(config, classifier, spec, (), (1, 0), 1, done=False)
        model = Bench(config).defence(defence, gradient or "exact")
        for _ in range(2):  # a score is looked at once, before its first gradient
            with estimate.FlopCounter() as counter:
                if gradient:
                    torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x)
                else:
                    with torch.no_grad():
                        model(x)
        counted = estimate.network_calls(job, defence, gradient, replayed=replayed) @ flop
        assert counted == pytest.approx(counter.total, rel=0.03 if gradient is None else 0.15), gradient


@pytest.mark.parametrize("name", grids.NOTEBOOKS)
def test_every_notebook_has_a_row(results_folder, name):
    row = estimate.estimate(jobs(name))
    assert row["images"] == 4
    assert row["gradients"] > 0 and row["network calls"] > row["gradients"] and row["hours"] > 0
    assert not list(results_folder.iterdir())


SMALLEST = {"n_images": 2, "n_iter": 1, "eot": 1, "n_steps": 2, "n_draws": 1}


def untouched(x):
    right = torch.ones(len(x), dtype=torch.bool)
    return AttackResult(x, right, judged=right)


@pytest.mark.parametrize("name", [name for name, notebook in grids.NOTEBOOKS.items() if notebook.rest])
def test_the_grid_is_what_the_notebook_runs(results_folder, monkeypatch, name):
    """The attacks that `grids.compute` leaves on record are those of the grid; the notebook adds none.

    Which they are, not what they find: they leave the images as they are.
    """
    monkeypatch.setattr(Attack, "__call__", lambda self, model, x, y, *_, **__: untouched(x))
    given = configs(name, **SMALLEST)
    ahead = [job for job in jobs(name, *given) if job.makes_images]
    assert not any(job.done for job in ahead)
    grids.compute(name, SMALLEST)
    assert all(job.done for job in jobs(name, *given))
    attacked = list(results_folder.glob("*/images/*.json"))
    # What wins in the searches of 03 and 08, and is confirmed, is known after them only.
    assert len(attacked) == len(ahead) or name in ("03_sweeps", "08_beyond")

    namespace = {"get_ipython": lambda: SimpleNamespace(input_transformers_cleanup=[]), "In": []}
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    with reading_only():
        for code in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
            exec(code, namespace)
            namespace |= SMALLEST


def test_an_attack_that_many_settings_read_is_counted_once():
    """Without guidance, λ changes nothing; without a purifier, neither does t*."""
    given = configs("03_sweeps", n_images=5, n_iter=7, eot=1)
    row = estimate.estimate(jobs("03_sweeps", *given, t_stars=[0.05, 0.3], guidance_weights=[0, 2]))
    # Undefended; the reverse SDE at three t*; COUP at these and at another λ, exact and first-order.
    on_validation = 1 + 3 + 2 * (3 + 1)
    on_test = 1 + 1 + 2
    assert row["gradients"] == 5 * 7 * (on_validation + on_test)


@pytest.mark.parametrize(
    ("name", "fewer", "more"),
    [
        ("01_case_study", {"eps_factors": [1]}, {"eps_factors": [1, 2]}),
        ("02_ablation", {"classifiers": ["cnn-small"]}, {}),
        ("03_sweeps", {"t_stars": [0.05, 0.3], "guidance_weights": [0, 2]}, {}),
        ("05_bpda", {"eot_counts": [1]}, {"eot_counts": [1, 5]}),
        ("08_beyond", {"weights": [1.0]}, {"weights": [1.0, 2.0]}),
    ],
)
def test_a_notebooks_own_parameters_count(name, fewer, more):
    assert len(jobs(name, **fewer)) < len(jobs(name, **more))


def test_purifications_count():
    few, many = (estimate.estimate(jobs("05_bpda", purifications=n)) for n in (2, 3))
    assert many["purifications"] > few["purifications"]


def test_paths_whose_activations_do_not_fit_are_replayed(monkeypatch):
    kept = estimate.estimate(plan("coup", n_images=2))["network calls"]
    config = Config(n_images=2)
    again = config.n_images * config.n_iter * config.eot * config.n_steps
    a_step = estimate.bytes_of_a_step(plan("coup", n_images=2)[0])
    for steps in (0, 3):
        monkeypatch.setenv("COUP_ACTIVATIONS", str(a_step * (steps + 0.5) / 2**30))
        left = again * (config.n_steps - steps) / config.n_steps
        assert estimate.estimate(plan("coup", n_images=2))["network calls"] == pytest.approx(kept + left)


def test_in_lower_precision_only_what_is_lowered_is_faster():
    speeds = {"float32": 1.0, "tf32": 10.0, "bfloat16": 20.0}
    attack, scores = np.array([100.0, 40.0]), np.array([7.0, 3.0])
    expected = {"float32": 150, "tf32": 10 + 4 + 10, "bfloat16": 5 + 40 + 10}
    for precision, seconds in expected.items():
        assert estimate.seconds(attack, scores, precision, speeds) == pytest.approx(seconds)


def test_a_run_asks_for_the_networks_that_it_takes(monkeypatch, tmp_path):
    """Of five files Table 1 takes two, and only 02 the one that has to be fetched by hand."""
    monkeypatch.delenv("COUP_SMOKE")
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    given, taken = {"profile": "cifar10", "subset": "first"}, {}
    for name in grids.NOTEBOOKS:
        grid = grids.grid(name, *configs(name, **given))
        taken[name] = set(grids.networks(grid, zoo.missing))
    linf, l2 = (f"cifar10/{norm}/Wang2023Better_WRN-28-10" for norm in ("Linf", "L2"))
    two = {"cifar10/Linf/Standard", "ddpmpp-deep"}
    more = {
        "02_ablation": {"wrn-70-16-dropout"},
        "06_adversarial_training": {linf, l2},
        "08_beyond": {linf, l2},
    }
    assert taken == {name: two | more.get(name, set()) for name in grids.NOTEBOOKS}


def test_data_and_networks_are_looked_for_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    def refuse(*args, **settings):
        raise AssertionError("a network was built")

    monkeypatch.delenv("COUP_SMOKE")
    for name in ("load_score", "load_classifier"):
        monkeypatch.setattr(zoo, name, refuse)
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    monkeypatch.setenv("COUP_DATA", str(tmp_path / "a file"))
    (tmp_path / "a file").touch()
    given = {"profile": "cifar10", "subset": "first"}
    grid = grids.grid("02_ablation", *configs("02_ablation", **given))
    with pytest.raises(FileNotFoundError, match="no whole cifar10 at"):
        grids.obtain(grid)
    monkeypatch.setattr(grids, "load_split", lambda *which: None)
    with pytest.raises(FileNotFoundError, match="wrn-70-16-dropout"):
        grids.obtain(grid)
    with pytest.raises(SystemExit, match="wrn-70-16-dropout"):
        estimate.main(["--profile", "cifar10", "--subset", "first", "--obtain", "02_ablation"])
    estimate.main(["--obtain", "04_autoattack"])  # digits and its networks are in this repository
    assert capsys.readouterr().out == ""


def test_the_command_line(capsys):
    estimate.main(["02_ablation", "05_bpda"])
    out = capsys.readouterr().out
    assert out.startswith("Data and networks are here.\n\n| notebook | images |")
    for part in ("| 02_ablation |", "| all of them |", "images fit into one call"):
        assert out.count(part) == 1
    rows = [line.split("|")[5] for line in out.splitlines() if line.startswith("| 02_ablation |")]
    estimate.main(["--classifier", "cnn-small", "02_ablation"])
    alone = capsys.readouterr().out
    assert "all of them" not in alone
    rows += [line.split("|")[5] for line in alone.splitlines() if line.startswith("| 02_ablation |")]
    assert int(rows[1].replace(",", "")) < int(rows[0].replace(",", ""))
    with pytest.raises(SystemExit, match=r"notebook: expected one of 01_case_study, .*; got '99'"):
        estimate.main(["99"])


PAPERS_TIER = """
import resource, sys, time
from workflow import estimate
estimate.main(["--profile", "cifar10", "--budget", "full"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak / 2**30, time.process_time())
"""


def test_the_papers_tier_is_estimated_in_seconds_and_little_memory(tmp_path):
    """At full size, DDPM++ deep and WRN-70-16: by one call of the first, and none of the second."""
    environment = {name: value for name, value in os.environ.items() if name != "COUP_SMOKE"}
    environment |= {"COUP_DATA": str(tmp_path), "COUP_MODELS": str(tmp_path), "COUP_RESULTS": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-c", PAPERS_TIER], env=environment, stdout=subprocess.PIPE, text=True
    )
    absent = run.stdout.readline()
    assert absent.startswith("Still to be fetched: cifar10, ") and "wrn-70-16-dropout" in absent
    *table, taken = run.communicate(timeout=300)[0].splitlines()
    rows = [line.split(" | ")[0] for line in table if line.startswith("| ")]
    assert rows == [f"| {name}" for name in ("notebook", "---", *grids.NOTEBOOKS, "all of them")]
    peak, seconds = map(float, taken.split())
    assert peak < 2 and seconds < 60
