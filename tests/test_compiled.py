"""The compiled score network: the same numbers, one program for every batch, and a way on without it."""

import dataclasses
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from one_thread import one_thread  # noqa: F401 (a fixture for all of this file)
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from coup_lib.data import SHAPES, load_split
from coup_lib.defences import PURIFIERS
from coup_lib.evaluation import bench
from coup_lib.evaluation.bench import Bench, against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import CLEAN
from coup_lib.gradients import GRADIENTS
from coup_lib.guidance import FirstOrder, Guided
from coup_lib.networks import compiled
from coup_lib.networks.compiled import LEAST, Compiled, compiled_score
from coup_lib.networks.zoo import load_score
from coup_lib.score import NoiseScore

SHAPE = SHAPES["digits"]
SMALL = {"n_images": LEAST, "n_iter": 2, "eot": 1, "n_steps": 2}


class Convolution(nn.Module):
    """Predicts noise by one convolution: little to compile."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x) * t[:, None, None, None]


@pytest.fixture
def score():
    torch.manual_seed(0)
    return NoiseScore(Convolution()).eval().requires_grad_(False)


@pytest.fixture
def quick(monkeypatch):
    """Traced and split into forward and backward as ever, but left to PyTorch's own kernels: seconds."""
    monkeypatch.setattr(compiled, "Compiled", partial(Compiled, backend="aot_eager"))
    compiled_score.cache_clear()
    yield
    compiled_score.cache_clear()


def slope(network, x, t):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(network(x, t).square().sum(), x)[0]


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
# A quarter of the time: nothing tried out or prepared for programs to come, which do not come.
@inductor.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1})
def test_it_computes_the_score_and_its_gradient(score, capsys):
    fast = Compiled(score, SHAPE)
    assert "compiled in" in capsys.readouterr().out
    counters.clear()
    for n in (LEAST, 3 * LEAST + 1, LEAST - 1, 1):
        for t in (torch.tensor(0.02), torch.tensor(0.3)):
            x = torch.randn(n, *SHAPE)
            with torch.no_grad():
                torch.testing.assert_close(fast(x, t), score(x, t), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(slope(fast, x, t), slope(score, x, t), rtol=1e-4, atol=1e-4)
    assert not counters["stats"]  # what it was built with served all of them


def test_fewer_images_go_through_the_score_itself(score):
    fast, x, t = Compiled(score, SHAPE, "aot_eager"), torch.randn(LEAST, *SHAPE), torch.tensor(0.1)
    seen = []
    fast._run = lambda x, t: seen.append(len(x))
    for n in (1, LEAST - 1, LEAST):
        fast(x[:n], t)
    assert seen == [LEAST]


@pytest.mark.parametrize("n", [LEAST - 1, LEAST])
def test_guidance_inside_of_what_is_compiled_is_differentiated_or_held_as_asked(score, n):
    """PyTorch's compiled code would leave its second derivative out without a word."""
    torch.manual_seed(1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval().requires_grad_(False)
    guided = Guided(score, classifier)
    fast, x, t = Compiled(guided, SHAPE, "aot_eager"), torch.randn(n, *SHAPE), torch.tensor(0.1)
    exact, held = (slope(way(guided), x, t) for way in (nn.Identity(), FirstOrder))
    assert not torch.allclose(exact, held, rtol=1e-2)
    torch.testing.assert_close(slope(fast, x, t), exact)
    torch.testing.assert_close(slope(FirstOrder(fast), x, t), held, rtol=1e-4, atol=1e-4)


def without_gradient(graph, examples):
    if torch.is_grad_enabled():
        raise OSError("no room for what was compiled\nand more")
    return graph


@pytest.mark.parametrize("backend", [without_gradient, "no such compiler"])
def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(score, capsys, backend):
    fast, x, t = Compiled(score, SHAPE, backend), torch.randn(LEAST, *SHAPE), torch.tensor(0.1)
    assert "torch.compile failed, going on without it: " in capsys.readouterr().out
    assert torch.equal(fast(x, t), score(x, t))
    assert torch.equal(slope(fast, x, t), slope(score, x, t))


def gradient(config, name, which, bench=Bench):
    model = bench(config).attacked(against("apgd-ce", name, which))
    data = load_split("digits", "validation").first(config.n_images)
    x = data.x.requires_grad_()
    loss = F.cross_entropy(model(x, seeds=torch.arange(len(x))), data.y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize(
    ("name", "which"),
    [(name, "exact") for name in PURIFIERS] + [("coup", which) for which in GRADIENTS if which != "exact"],
)
def test_every_defence_has_its_gradient(quick, name, which):
    plain, fast = (gradient(Config(**SMALL, compiled=flag), name, which) for flag in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_the_smoothed_maximum_has_its_gradient(quick):
    plain, fast = (gradient(Config(**SMALL, compiled=flag), "smooth-max", "exact") for flag in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_attacks_meet_what_is_compiled_and_scores_do_not(quick):
    evaluation = Evaluation(Config(**SMALL, compiled=True), verbose=False)
    scores = evaluation.predictions({"coup": {"own": against("apgd-ce", "coup"), "clean": CLEAN}})["coup"]
    assert isinstance(evaluation.bench.attacked_score("coup", "exact"), Compiled)
    assert not isinstance(evaluation.bench.defence("coup").purifier.score.score, Compiled)
    assert scores["own"].right.shape == (LEAST,)
    # One program for all settings.
    other = Evaluation(dataclasses.replace(evaluation.config, guidance_weight=2), verbose=False)
    assert other.bench.attacked_score("reverse", "exact") is evaluation.bench.attacked_score("coup", "exact")


def test_a_record_says_whether_its_attack_was_compiled():
    plain = Evaluation(Config(**SMALL), verbose=False)
    fast = Evaluation(dataclasses.replace(plain.config, compiled=True), verbose=False)
    for name, flag in {"coup": True, "reverse": True, "denoised": False, "none": False}.items():
        source = against("apgd-ce", name)
        settings = plain.attack_settings(source)[1] | ({"compiled": True} if flag else {})
        assert fast.attack_settings(source)[1] == settings
    assert fast.bench.settings("coup") == plain.bench.settings("coup")


def test_nothing_is_compiled_before_an_attack_needs_it(monkeypatch):
    monkeypatch.setattr(bench, "compiled_score", None)
    defences = Bench(Config(**SMALL, compiled=True))
    defences.defence("coup")
    for name in ("denoised", "none"):
        defences.attacked(against("apgd-ce", name))


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_a_setting_that_is_no_yes_or_no_is_refused(value):
    with pytest.raises(ValueError, match="compiled: expected one of true, false; got"):
        Config(compiled=value)


def test_the_published_networks_compile(monkeypatch, capsys):
    monkeypatch.setenv("COUP_SMOKE", "1")
    # What the two share, which is nearly all, is split into forward and backward once.
    for dataset, name, backend in (("cifar10", "ddpmpp-deep", "aot_eager"), ("cifar100", "edm-vp", "eager")):
        score = load_score(dataset, name)
        fast = Compiled(score, SHAPES[dataset], backend)
        x, t = torch.randn(LEAST, *SHAPES[dataset]), torch.tensor(0.1)
        torch.testing.assert_close(slope(fast, x, t), slope(score, x, t), rtol=1e-3, atol=1e-2)
    assert "failed" not in capsys.readouterr().out
