"""The plan before a run: what is counted, and that nothing is computed for it."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coup_lib import paths, purify
from coup_lib.defences import DEFENCES, PURIFIERS
from coup_lib.evaluation import run as evaluate
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.run import CLEAN, Evaluation, Job, Source, calls, planning
from coup_lib.gradients import solve_with_gradient
from coup_lib.guidance import gradient_of, log_confidence
from coup_lib.studies import estimate


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


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
    assert calls(CLEAN, config) == (0, 0)
    assert calls(Source("apgd-ce", "coup"), config) == (21, 0)
    assert calls(Source("apgd-ce", "coup", "bpda", eot=2), config) == (0, 14)
    assert calls(Source("square", "coup"), config) == (0, 11)
    assert calls(Source("standard", "coup"), config) == (7 * 5, 11)


def test_planning_lists_what_a_run_would_do_and_computes_nothing(results, monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(evaluate, "load_classifier", refuse)
    with planning() as jobs:
        columns = Evaluation(Config()).columns(("none", "coup"))
    assert [str(job.source) for job in jobs][:3] == [
        "clean",
        "apgd-ce on none, exact",
        "apgd-ce on reverse, exact",
    ]
    assert jobs[0].targets == ("none", "coup") and not any(job.done for job in jobs)
    assert columns["coup"]["adaptive"].right.mean() == 1
    assert not list(results.iterdir())


def plan(defence, **settings):
    """The jobs of an attack on this defence and of scoring it there."""
    with planning() as jobs:
        Evaluation(Config(**settings)).run({defence: [Source("apgd-ce", defence)]})
    return jobs


def test_a_decision_of_several_purifications_is_counted_as_such(results):
    one, four = (
        estimate.estimate(plan(defence, n_images=2, n_iter=1, eot=1)) for defence in ("reverse", "averaged")
    )
    for head in ("purifications", "network calls"):
        assert four[head] == PURIFIERS["averaged"].draws * one[head] > 0
    assert four["gradients"] == one["gradients"]


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("defence", DEFENCES)
def test_network_calls_are_those_that_are_made(monkeypatch, defence, replayed):
    """Each call and each derivative takes a network's operations once; a counter sees no more and no less."""
    if replayed:
        monkeypatch.setattr(purify, "solve_with_gradient", partial(solve_with_gradient, activation_budget=0))
    config, (x, y) = Config(n_steps=10), (torch.rand(1, 1, 8, 8), torch.tensor([3]))
    classifier = config.classifier
    flop = estimate._score_network(config).flop, estimate._classifier_flop("digits", classifier)
    gradients = ("exact", "first_order", "adjoint")
    if defence == "none" or PURIFIERS[defence].through_score or replayed:
        gradients = gradients[:2]  # no SDE, or a second derivative that torchsde cannot take
    for gradient in (None, *gradients):
        job = Job(config, classifier, Source("apgd-ce", defence, gradient or "exact"), (), "")
        model = Evaluation(config).defence(defence, gradient or "exact")
        for _ in range(2):  # a score is looked at once, before its first gradient
            with estimate.FlopCounter() as counter:
                if gradient:
                    torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x)
                else:
                    with torch.no_grad():
                        model(x)
        counted = estimate.network_calls(job, defence, gradient, replayed=replayed) @ flop
        assert counted == pytest.approx(counter.total, rel=0.03 if gradient is None else 0.15), gradient


@pytest.mark.parametrize("name", estimate.NOTEBOOKS)
def test_every_notebook_has_a_row(results, name):
    row = estimate.estimate(estimate.jobs(name, *estimate._configs(name, {})))
    assert set(row) == set(estimate.TABLE_HEAD) and row["images"] == 4
    assert row["gradients"] > 0 and row["network calls"] > row["gradients"] and row["hours"] > 0
    assert not list(results.iterdir())


SMALLEST = {"n_images": 2, "n_iter": 1, "eot": 1, "n_steps": 2, "n_draws": 1}


@pytest.mark.parametrize("name", ["03_sweeps", "04_autoattack", "05_bpda", "07_stronger_attacks"])
def test_a_plan_is_in_step_with_the_run(results, monkeypatch, capsys, name):
    """What a notebook's run leaves is what was planned; then nothing is left to do."""
    configs = estimate._configs(name, SMALLEST)
    planned = estimate.jobs(name, *configs)
    estimate.show(name, *configs)
    assert capsys.readouterr().out == "", "this is short work"
    monkeypatch.setattr(estimate, "SHORT", 0)
    estimate.show(name, *configs)
    assert "hours" in capsys.readouterr().out
    estimate.NOTEBOOKS[name].run(*configs)
    assert all(job.done for job in estimate.jobs(name, *configs)) and not any(job.done for job in planned)
    records = [path for path in results.glob("*/*.json") if not path.name.startswith("score-")]
    assert len(records) == sum(not job.shared for job in planned)
    capsys.readouterr()
    estimate.show(name, *configs)
    assert capsys.readouterr().out == f"{name}: the record of every attack is here, none is to be computed\n"


def test_an_attack_that_many_settings_read_is_counted_once(results):
    """Without guidance, λ changes nothing; without a purifier, neither does t*."""
    configs = estimate._configs("03_sweeps", {"n_images": 5, "n_iter": 7, "eot": 1})
    row = estimate.estimate(
        estimate.jobs("03_sweeps", *configs, t_stars=[0.05, 0.3], guidance_weights=[0, 2])
    )
    # Undefended; reverse-only at three t*; COUP at these and at another λ, exact and first-order.
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
def test_a_notebooks_own_parameters_count(results, name, fewer, more):
    configs = estimate._configs(name, {})
    assert len(estimate.jobs(name, *configs, **fewer)) < len(estimate.jobs(name, *configs, **more))


def test_purifications_count(results):
    few, many = (
        estimate.estimate(estimate.jobs("05_bpda", *estimate._configs("05_bpda", {}), purifications=n))
        for n in (2, 3)
    )
    assert many["purifications"] > few["purifications"]


def test_paths_whose_activations_do_not_fit_are_replayed(results, monkeypatch):
    monkeypatch.setattr(estimate, "ACTIVATION_BUDGET", 10**9)
    kept = estimate.estimate(plan("coup", n_images=2))["network calls"]
    monkeypatch.setattr(estimate, "ACTIVATION_BUDGET", 0)
    config = Config(n_images=2)
    again = config.n_images * config.n_iter * config.eot * config.n_steps
    assert estimate.estimate(plan("coup", n_images=2))["network calls"] == kept + again


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
    for name in estimate.NOTEBOOKS:
        planned = estimate.jobs(name, *estimate._configs(name, given))
        taken[name] = set(estimate._networks(planned, estimate.missing))
    linf, l2 = (f"cifar10/{norm}/Wang2023Better_WRN-28-10" for norm in ("Linf", "L2"))
    two = {"cifar10/Linf/Standard", "ddpmpp-deep"}
    more = {
        "02_ablation": {"wrn-70-16-dropout"},
        "06_adversarial_training": {linf, l2},
        "08_beyond": {linf},
    }
    assert taken == {name: two | more.get(name, set()) for name in estimate.NOTEBOOKS}


def test_data_and_networks_are_looked_for_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    def refuse(*args, **settings):
        raise AssertionError("a network was built")

    monkeypatch.delenv("COUP_SMOKE")
    monkeypatch.setattr(estimate, "load_score", refuse)
    monkeypatch.setattr(estimate, "load_classifier", refuse)
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    monkeypatch.setenv("COUP_DATA", str(tmp_path / "a file"))
    (tmp_path / "a file").touch()
    given = {"profile": "cifar10", "subset": "first"}
    configs = estimate._configs("02_ablation", given)
    with pytest.raises(FileNotFoundError, match="no whole cifar10 at"):
        estimate.show("02_ablation", *configs)
    monkeypatch.setattr(estimate, "load_split", lambda *which: None)
    with pytest.raises(FileNotFoundError, match="wrn-70-16-dropout"):
        estimate.show("02_ablation", *configs)
    with pytest.raises(SystemExit, match="wrn-70-16-dropout"):
        estimate.main(["--profile", "cifar10", "--subset", "first", "--obtain", "02_ablation"])
    estimate.main(["--obtain", "04_autoattack"])  # digits and its networks are in this repository
    assert capsys.readouterr().out == ""


def test_the_command_line(results, capsys):
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
from coup_lib.studies import estimate
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
    assert rows == [f"| {name}" for name in ("notebook", "---", *estimate.NOTEBOOKS, "all of them")]
    peak, seconds = map(float, taken.split())
    assert peak < 2 and seconds < 60


def test_memory_running_out_halves_the_batch(results, capsys, monkeypatch):
    """A classifier that takes 8 images at a time: the same numbers, and a line that says so."""

    class Small(nn.Module):
        limit = 1000

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            if len(x) > self.limit:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return self.linear(x.flatten(1))

    torch.manual_seed(0)
    small = Small().eval().requires_grad_(False)
    monkeypatch.setattr(evaluate, "load_classifier", lambda dataset, name, trained: small)
    config = Config(n_images=20, n_iter=3, eot=2, n_draws=2)
    shares = []
    for limit in (1000, 8):
        Small.limit = limit
        monkeypatch.setattr(paths, "RESULTS", results / str(limit))
        row = Evaluation(config).columns(("none", "reverse"))["reverse"]
        shares.append({name: score.right for name, score in row.items()})
    assert "out of memory: going on with at most 5 images at once" in capsys.readouterr().out
    assert all((shares[0][name] == shares[1][name]).all() for name in shares[0])
    Small.limit = 0
    monkeypatch.setattr(paths, "RESULTS", results / "none")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Evaluation(config).columns(("none",))
