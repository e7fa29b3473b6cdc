"""The plan before a run: what is counted, and that nothing is computed for it."""

import pytest
import torch
from torch import nn

from coup_lib import estimate, evaluate, paths
from coup_lib.config import Config
from coup_lib.defences import PURIFIERS
from coup_lib.evaluate import CLEAN, Evaluation, Source, calls, planning
from coup_lib.guidance import gradient_of, log_confidence


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
    assert columns["coup"]["adaptive"].mean.value == 100
    assert not list(results.iterdir())


def test_a_decision_of_several_purifications_is_counted_as_such(results, monkeypatch):
    def row(defence):
        source = Source("apgd-ce", defence)
        run = estimate.Notebook(({},), lambda config: Evaluation(config).run({defence: [source]}))
        monkeypatch.setitem(estimate.NOTEBOOKS, defence, run)
        return estimate.estimate(defence, Config(n_images=2, n_iter=1, eot=1, n_steps=2))

    one, four = row("reverse"), row("averaged")
    for head in ("purifications", "network calls"):
        assert four[head] == PURIFIERS["averaged"].draws * one[head] > 0
    assert four["gradients"] == one["gradients"]


@pytest.mark.parametrize("name", estimate.NOTEBOOKS)
def test_every_notebook_has_a_row(results, name):
    row = estimate.estimate(name, *estimate._configs(name, {}))
    assert set(row) == set(estimate.TABLE_HEAD) and row["images"] == 4
    assert row["gradients"] > 0 and row["network calls"] > row["gradients"] and row["hours"] > 0
    assert not list(results.iterdir())


@pytest.mark.parametrize("name", ["03_sweeps", "04_autoattack", "05_bpda", "07_stronger_attacks"])
def test_a_plan_is_in_step_with_the_run(results, capsys, name):
    """What a notebook's run leaves is what was planned; then nothing is left to do."""
    configs = estimate._configs(name, {})
    planned = estimate.jobs(name, *configs)
    estimate.show(name, *configs)
    assert "hours" in capsys.readouterr().out
    estimate.NOTEBOOKS[name].run(*configs)
    assert all(job.done for job in estimate.jobs(name, *configs)) and not any(job.done for job in planned)
    records = [path for path in results.rglob("*.json") if not path.name.startswith("score-")]
    assert len(records) == sum(not job.shared for job in planned)
    capsys.readouterr()
    estimate.show(name, *configs)
    assert capsys.readouterr().out == f"{name}: the record of every attack is here, none is to be computed\n"


def test_an_attack_that_many_settings_read_is_counted_once(results):
    """Without guidance, λ changes nothing; without a purifier, neither does t*."""
    configs = estimate._configs("03_sweeps", {"n_images": 5, "n_iter": 7, "eot": 1})
    row = estimate.estimate("03_sweeps", *configs, t_stars=[0.05, 0.3], guidance_weights=[0, 2])
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
        estimate.estimate("05_bpda", *estimate._configs("05_bpda", {}), purifications=n) for n in (2, 3)
    )
    assert many["purifications"] > few["purifications"]


def test_longer_paths_cost_more(results):
    def flop(n_steps):
        config = Config(n_steps=n_steps)
        job = evaluate.Job(config, config.classifier, Source("apgd-ce", "reverse"), ("reverse",), "", False)
        return estimate.unit(job, "reverse", "exact").flop

    short, long, longer = flop(10), flop(20), flop(30)
    assert longer - long == pytest.approx(long - short) and long > 1.5 * short


@pytest.mark.parametrize("defence", ["reverse", "coup"])
def test_paths_that_are_replayed_are_gone_twice(results, monkeypatch, defence):
    config = Config()
    job = evaluate.Job(config, config.classifier, Source("apgd-ce", defence), (defence,), "", False)
    kept, forward = estimate.unit(job, defence, "exact").flop, estimate.unit(job, defence, None).flop
    monkeypatch.setattr(estimate, "ACTIVATION_BUDGET", 0)
    decision = estimate.unit(job, "none", None).flop
    assert estimate.unit(job, defence, "exact").flop == pytest.approx(kept + forward - decision)


def test_the_command_line(results, capsys):
    estimate.main(["02_ablation", "05_bpda"])
    out = capsys.readouterr().out
    for part in ("| 02_ablation |", "| all of them |", "images fit into one call", "All networks are here."):
        assert part in out
    rows = [line.split("|")[5] for line in out.splitlines() if line.startswith("| 02_ablation |")]
    estimate.main(["--classifier", "cnn-small", "02_ablation"])
    alone = capsys.readouterr().out
    rows += [line.split("|")[5] for line in alone.splitlines() if line.startswith("| 02_ablation |")]
    assert int(rows[1].replace(",", "")) < int(rows[0].replace(",", ""))
    with pytest.raises(ValueError, match=r"expected a notebook out of 01_case_study, .*; got '99'"):
        estimate.main(["99"])


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
    config = Config(n_images=20, n_iter=3, eot=2)
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
