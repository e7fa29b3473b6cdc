"""An audit takes any defence, attacks it by all that the protocol has, and says what it saw."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import scored
from torch import nn

from coup_lib import Defence, audit, coup, load_classifier, load_score, paths
from coup_lib.attacks import Attack
from coup_lib.auditing import protocol
from coup_lib.auditing.defence import (
    Audited,
    StraightThrough,
    as_module,
    as_planes,
    inner_classifiers,
    own_gradients,
)
from coup_lib.auditing.probe import probe
from coup_lib.auditing.signs import HARMLESS, compared, signs, strongest_of
from coup_lib.data import load_split
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.identity import of_content
from coup_lib.evaluation.outcomes import Transfer
from coup_lib.evaluation.profiles import SMOKE
from coup_lib.evaluation.run import attack, predict
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.guidance import Guided
from coup_lib.likelihood import likelihood
from coup_lib.outside import TRIED
from coup_lib.purify import Purified, Purifier, Vote
from coup_lib.score import ScoreDenoiser

EPS = 0.15


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", "test").first(8)


@pytest.fixture(scope="module")
def net():
    return load_classifier("digits", "cnn-small")


def linear(size=64, classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).eval()


class Changed(nn.Module):
    """A function of the image, and then a classifier."""

    def __init__(self, change, classifier):
        super().__init__()
        self.change, self.classifier = change, classifier
        self.eval()

    def forward(self, x):
        return self.classifier(self.change(x))


class Answering(nn.Module):
    """Whatever a function of (its networks, the image) says."""

    def __init__(self, answer, *networks):
        super().__init__()
        self.answer, self.networks = answer, nn.ModuleList(networks)
        self.eval()

    def forward(self, x):
        return self.answer(self.networks, x)


def smoke(defences, x, y, folder, **more):
    return audit(
        defences, x, y, **({"eps": EPS, "budget": "smoke", "verbose": False, "folder": folder} | more)
    )


# --- what it takes ---


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((1, 8, 8), 2), ((3, 6, 10), 3), ((28, 28), 3), ((12,), 2), ((7,), 3), ((2, 3, 4, 5), 3)],
)
def test_images_of_any_shape_and_two_classes_or_more(shape, classes, tmp_path):
    generator = np.random.default_rng(0)
    x, y = generator.random((4, *shape)), generator.integers(0, classes, 4)
    seen = []

    def look(x):
        seen.append(tuple(x.shape[1:]))
        return x

    found = smoke({"mine": Changed(look, linear(int(np.prod(shape)), classes))}, x, y, tmp_path)
    assert set(seen) == {shape}
    assert found.table().loc["mine", "n"] == 4


def test_planes_hold_what_the_images_do():
    shapes = [(1, 8, 8), (28, 28), (12,), (7,), (2, 3, 4, 5)]
    planes = [(1, 8, 8), (1, 28, 28), (1, 3, 4), (1, 1, 7), (1, 10, 12)]
    assert [as_planes(shape) for shape in shapes] == planes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, "x: expected floating point"),
        ({"x": torch.zeros(1, 1, 8, 8), "y": torch.zeros(1).long()}, "x: expected two images or more"),
        ({"x": torch.full((4, 1, 8, 8), 2.0)}, r"x: expected values in \[0, 1\]; got 2 to 2"),
        ({"y": torch.zeros(4)}, "y: expected a whole number for each of 4 images"),
        ({"y": torch.tensor([0, 1, 2, -1])}, "y: expected labels from 0 on; got -1"),
        (
            {"y": torch.tensor([0, 1, 2, 10])},
            "y: expected labels among .*, 0 to 9; got 0 to 10",
        ),
        ({"norm": "l1"}, "norm: expected one of linf, l2; got 'l1'"),
        ({"eps": "8/0"}, "eps: expected a number or a fraction"),
        ({"eps": 8.1, "norm": "l2"}, "eps: expected a number greater than 0 and at most 8; got 8.1"),
        ({"budget": "huge"}, "budget: expected one of smoke, quick, full"),
        ({"defences": {}}, "defences: expected at least one by name"),
        ({"defences": {"a/b": linear()}}, "defences: expected names of letters"),
        ({"defences": {"it": Defence(linear(), {"../up": linear()})}}, "expected names of .* got '../up'"),
        (
            {"defences": {"it": Defence(linear(), {"exact": linear()})}},
            "it: expected other gradients",
        ),
        ({"defences": {"it": "resnet"}}, "it: expected a torch.nn.Module, or a pair .*; got str"),
        ({"defences": {"it": (linear(),) * 3}}, "it: expected a torch.nn.Module, or a pair .*; got tuple"),
        (
            {"defences": {"it": (linear(), nn.Hardtanh(-5, 5).eval())}},
            r"it: expected a pair \(purifier, classifier\); its first part gives shape \(4, 10\)",
        ),
        ({"defences": {"it": linear(size=100)}}, r"images of shape \(1, 8, 8\); it says: mat1 and mat2"),
        ({"defences": {"it": linear(classes=1)}}, "expected logits"),
        (
            {"defences": {"it": linear(), "other": linear(classes=11)}},
            "expected the same classes in all of them",
        ),
    ],
)
def test_bad_input_is_refused_before_any_attack(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Attack, "__call__", lambda *_: pytest.fail("attacked"))
    given = {"defences": {"it": linear()}, "x": torch.rand(4, 1, 8, 8), "y": torch.arange(4)} | change
    with pytest.raises(ValueError, match=message):
        smoke(given.pop("defences"), given.pop("x"), given.pop("y"), tmp_path, **given)


def test_nothing_is_written_among_published_results(digits, net):
    with pytest.raises(ValueError, match="folder: expected one that is not among the published results"):
        smoke({"it": net}, digits.x, digits.y, paths.PUBLISHED / "mine")


def test_a_batch_that_memory_does_not_hold_is_halved(digits, tmp_path, capsys):
    largest = []

    def heavy(x):
        if len(x) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        largest.append(len(x))
        return x

    smoke({"it": Changed(heavy, linear())}, digits.x[:8], digits.y, tmp_path, max_batch=4, eps=0.1)
    assert max(largest) == 2 and "out of memory: going on with at most 2" in capsys.readouterr().err


def test_what_a_defence_does_in_place_is_not_the_callers(digits, net, tmp_path):
    x = digits.x.clone()
    for model in (Changed(lambda x: x.round_(), net), Changed(lambda x: x.mul_(0.5), linear())):
        found = smoke({"it": model}, x, digits.y, tmp_path)
        assert torch.equal(x, digits.x)
        assert {"bpda-ce", "ce"} <= {*found.measured.rows["it"]}


def test_weights_in_float64_get_images_in_float64(digits, tmp_path):
    found = smoke({"it": linear().double()}, digits.x.double(), digits.y, tmp_path)
    assert found.measured.rows["it"]["ce"].right.shape == (8,)


def test_batches_of_grey_planes_have_a_bpda_too(tmp_path):
    x, y = torch.rand(4, 6, 5), torch.arange(4)
    found = smoke({"it": (Changed(torch.round, nn.Identity()), linear(30))}, x, y, tmp_path)
    assert {"bpda-ce", "bpda-margin"} <= {*found.measured.rows["it"]}


# --- what it finds out beforehand ---


def fresh_noise(x):
    return x + 0.3 * torch.randn_like(x)


def common_noise(x):
    return x + 0.3 * torch.randn(x.shape[1:])


def frozen_noise(x):
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def reseeding_noise(x):
    torch.manual_seed(1)
    return x + 0.3 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("change", "random", "alone", "frozen"),
    [
        (torch.clone, False, False, False),
        (fresh_noise, True, False, False),
        (common_noise, True, True, False),
        (lambda x: common_noise(fresh_noise(x)), True, True, False),
        (lambda x: x - x.mean(0), False, True, False),
        (frozen_noise, False, True, True),
        (reseeding_noise, False, True, True),
    ],
)
def test_whether_it_is_random_and_how_it_finds_out_itself(change, random, alone, frozen, digits, net):
    found = probe(Changed(change, net), digits.x, digits.y)
    assert (found.random, found.alone, found.frozen) == (random, alone, frozen)


def test_noise_by_a_generator_of_ones_own_is_recognised(digits, net):
    generator = torch.Generator()
    noisy = Changed(lambda x: x + 0.3 * torch.randn(x.shape, generator=generator), net)
    found = probe(noisy, digits.x, digits.y)
    assert found.random and not found.alone


def test_noise_from_elsewhere_than_torch_is_noise(digits, net):
    generator = np.random.default_rng()
    noisy = Changed(lambda x: x + torch.from_numpy(generator.normal(0, 0.3, x.shape)).float(), net)
    before = generator.bit_generator.state
    found = probe(noisy, digits.x, digits.y)
    assert found.random and found.alone
    assert generator.bit_generator.state == before  # nobody else's numbers are taken


def test_what_is_in_train_mode_is_named_and_only_batch_statistics_are_stopped(digits):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    found = probe(model, digits.x, digits.y)
    assert found.batch_statistics == ("1",) and found.dropping == ("2",)
    assert not model[1].training and model[2].training and found.random


@pytest.mark.parametrize(
    ("change", "error", "zero", "broken"),
    [
        (torch.clone, "", 0, 0),
        (lambda x: (4 * x).round() / 4, "", 1, 0),
        (lambda x: x.detach(), "does not require grad", 0, 0),
        (lambda x: (x * x).sqrt(), "", 0, 1),
    ],
)
def test_a_gradient_that_is_none_is_seen(change, error, zero, broken, digits, net):
    found = probe(Changed(change, net), digits.x, digits.y)
    assert error in found.error and bool(error) == bool(found.error)
    assert (found.zero, found.broken) == (zero, broken)


def test_probabilities_are_attacked_through_their_logarithm(digits, net):
    model = nn.Sequential(net, nn.Softmax(1))
    assert probe(model, digits.x, digits.y).probabilities
    wrapped = Audited(model, digits.x.shape[1:])
    wrapped.probabilities = True
    assert torch.allclose(wrapped(digits.x).softmax(1), net(digits.x).softmax(1), atol=1e-6)


# --- other gradients of it ---


def test_bpda_is_the_inner_classifiers_gradient_at_what_it_was_given(digits, net):
    quantised = (4 * digits.x).round() / 4
    model = Changed(lambda x: (4 * x).round() / 4, net)
    assert inner_classifiers(model, digits.x) == [net]
    x, z = digits.x.clone().requires_grad_(), quantised.clone().requires_grad_()
    through, direct = (
        torch.autograd.grad(f(at).logsumexp(1).sum(), at)[0]
        for f, at in ((StraightThrough(model, [net]), x), (net, z))
    )
    assert torch.equal(through, direct)


def test_several_inner_classifiers_are_averaged_and_what_follows_them_is_left_out(digits, net):
    def vote(members, x):
        votes = torch.stack([member(x).argmax(1) for member in members])
        return nn.functional.one_hot(votes, 10).sum(0).float()

    model = Answering(vote, net, linear())
    members = [*model.networks]
    assert inner_classifiers(model, digits.x) == members
    mean = torch.stack([member(digits.x) for member in members]).mean(0)
    assert torch.allclose(StraightThrough(model, members)(digits.x), mean)


def test_a_classifier_of_larger_coloured_images_is_followed_to_small_grey_ones(digits):
    inner = linear(3 * 16 * 16)
    grown = Changed(lambda x: nn.functional.interpolate(x, (16, 16)).expand(-1, 3, -1, -1).round(), inner)
    x = digits.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(StraightThrough(grown, inner_classifiers(grown, digits.x))(x).sum(), x)
    assert slope.shape == x.shape and bool((slope != 0).any())


def test_the_papers_defences_have_their_gradients_by_name(digits, net):
    defence = coup(net, load_score("digits", "score"), n_steps=2)
    found = own_gradients(defence, digits.x)
    assert {name: model.purifier.gradient for name, model in found.items()} == {
        "first_order": "first_order",
        "bpda": "bpda",
    }
    assert defence.purifier.gradient == "exact"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net, purifier: (purifier, net),
        lambda net, purifier: Vote(Purified(net, purifier), 2),
        lambda net, purifier: nn.Sequential(Purified(net, purifier)).eval(),
    ],
    ids=["pair", "vote", "sequence"],
)
def test_the_papers_purifiers_keep_their_gradients_and_seeds_in_other_modules(wrap, digits, net):
    found = []
    for _ in range(2):  # purifiers that draw fresh entropy, unless they are told
        purifier = Purifier(Guided(load_score("digits", "score"), net), n_steps=2)
        defence = Audited(as_module("it", wrap(net, purifier)), digits.x.shape[1:])
        assert [*own_gradients(defence.model, digits.x)] == ["first_order", "bpda"]
        defence.random = True
        config = Config(n_images=8, n_iter=2, eot=2)
        made = attack(defence, digits, AttackSpec("apgd-ce", "it"), config, place=0, max_batch=64)
        found.append([made.x_adv, made.robust, predict(defence, digits.x, torch.zeros(8, 2).long(), 64)])
    assert all(map(torch.equal, *found))


def test_by_its_first_order_gradient_a_pair_is_the_papers_defence(digits, net):
    purifier = Purifier(Guided(load_score("digits", "score"), net), n_steps=2)
    by_gradient = own_gradients(as_module("it", (purifier, net)), digits.x)["first_order"]
    gradients = []
    for model in (by_gradient, coup(net, load_score("digits", "score"), n_steps=2, gradient="first_order")):
        x = digits.x.clone().requires_grad_()
        (purifier if model is by_gradient else model.purifier).reseed(0)
        gradients.append(torch.autograd.grad(model(x)[:, 0].sum(), x)[0])
    assert purifier.gradient == "exact"
    torch.testing.assert_close(*gradients)


def test_guided_likelihood_maximisation_has_a_first_order_gradient(digits, net):
    denoiser = ScoreDenoiser(load_score("digits", "score"))
    guided, plain = (own_gradients(likelihood(net, denoiser, weight), digits.x) for weight in (1.0, 0.0))
    assert [*guided] == ["first_order", "bpda"] and [*plain] == ["bpda"]


# --- whose record it is ---


def test_a_defence_is_known_by_weights_constants_code_and_answers(digits, net):
    class Halved(Changed):
        def forward(self, x):
            return super().forward(x) / 2

    models = [
        Changed(torch.clone, net),
        Halved(torch.clone, net),
        Changed(lambda x: 1 - x, net),
        Changed(torch.clone, linear()),
        Changed(fresh_noise, net),
    ]
    assert len({of_content(model)[0] for model in models}) == len(models)
    assert of_content(models[0]) == of_content(Changed(torch.clone, net))


def test_code_without_a_source_is_known_too(digits):
    """As in a notebook. The noise comes from NumPy, so that the answers tell nothing."""
    found = []
    for scale in (0.5, 0.5, 5.0):
        written = f"""class Mine(nn.Module):
            def forward(self, x):
                return x.flatten(1)[:, :10] + float(numpy.random.normal(0, {scale}))"""
        exec(written, space := {"nn": nn, "numpy": np})
        found.append(of_content(space["Mine"]().eval())[0])
    assert found[0] == found[1] != found[2]


def test_a_second_audit_reads_back_and_a_changed_defence_is_attacked_anew(digits, net, tmp_path, monkeypatch):
    first = smoke({"it": net, "noisy": Changed(fresh_noise, net)}, digits.x, digits.y, tmp_path)
    made, call = [], Attack.__call__
    monkeypatch.setattr(Attack, "__call__", lambda *given: made.append(given) or call(*given))
    again = smoke({"it": net, "noisy": Changed(fresh_noise, net)}, digits.x, digits.y, tmp_path)
    assert not made
    pd.testing.assert_frame_equal(first.attacks(), again.attacks())
    pd.testing.assert_frame_equal(first.decisions(), again.decisions())
    smoke({"it": linear()}, digits.x, digits.y, tmp_path)
    assert made


@pytest.mark.parametrize("held", ["list", "closure", "default", "global", "buffer", "partial", "numpy"])
def test_what_a_defence_refers_to_is_part_of_it(held, digits, net):
    """Its noise is from a generator of its own, so that answers tell nothing."""
    generator = np.random.default_rng(0)

    def noise(x, scale):
        return x + scale * torch.from_numpy(generator.normal(size=x.shape)).float()

    def made(scale):
        if held == "closure":
            return Changed(lambda x: noise(x, scale), net)
        if held == "default":
            return Changed(lambda x, s=scale: noise(x, s), net)
        if held == "partial":
            return Changed(partial(noise, scale=scale), net)
        if held == "global":
            space = {"scale": scale, "noise": noise}
            exec("def change(x):\n    return noise(x, scale)", space)
            return Changed(space["change"], net)
        model = Changed(lambda x: noise(x, 1), net)
        if held == "buffer":
            model.register_buffer("scale", torch.tensor(scale), persistent=False)
        else:
            model.scale = [scale] if held == "list" else np.float64(scale)
        return model

    one, same, other = (of_content(made(scale))[0] for scale in (0.1, 0.1, 0.5))
    assert one == same != other


def test_an_audit_foretells_its_work_by_the_time_that_a_decision_takes(
    digits, net, tmp_path, capsys, monkeypatch
):
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: len(digits.x) * next(clock))  # a second an image
    smoke({"it": net}, digits.x, digits.y, tmp_path, verbose=True)
    first = capsys.readouterr().err.splitlines()[0]
    said = r"To do: (\d+) attacks and (\d+) evaluations of what they found; about (\d+):\d\d min on cpu"
    attacks, evaluations, minutes = map(int, re.fullmatch(said, first).groups())
    assert evaluations >= attacks > 10
    assert minutes > (2 * SMOKE.n_draws * evaluations + 2 * SMOKE.n_iter) * len(digits.x) / 60
    smoke({"it": net}, digits.x, digits.y, tmp_path, verbose=True)
    assert capsys.readouterr().err == ""


def test_what_is_nested_deeply_is_looked_through(digits, net):
    found = []
    for core in (1, 2):
        model = Changed(fresh_noise, net)
        model.config = ["x", core]
        for _ in range(100):
            model.config = ["x", model.config]
        found.append(of_content(model)[0])
    assert found[0] != found[1]


# --- what it does ---


def audit_settings():
    return protocol.AuditSettings(
        **vars(protocol.AUDITS["smoke"]),
        profile="it",
        budget="smoke",
        norm="linf",
        eps=EPS,
        torch_device=torch.device("cpu"),
        max_batch=64,
        seed=0,
    )


def test_every_defence_faces_its_own_attacks_and_all_that_was_made_against_others(digits, net, tmp_path):
    found = smoke({"mine": (nn.Identity(), net), "plain": net}, digits.x, digits.y, tmp_path)
    mine, plain = (found.measured.rows[name] for name in ("mine", "plain"))
    own = {"clean", "noise", "fgsm", "ce", "long", "dlr", "margin", "low", "standard", "square", "rays"}
    assert {key for key in plain if isinstance(key, str)} == own
    assert {key for key in mine if isinstance(key, str)} == own | {"bpda-ce", "bpda-margin"}
    assert {key.column for key in mine if isinstance(key, Transfer)} == {
        "ce",
        "long",
        "dlr",
        "margin",
        "low",
        "square",
        "rays",
    }
    assert {*found.measured.eps["mine"]} == {0.0, EPS, 0.3, 0.5}


def test_a_random_defence_also_faces_what_looks_at_every_draw(digits, net, tmp_path):
    plain = probe(net, digits.x, digits.y)
    settings = audit_settings()
    rows = [protocol.attacks("it", [], replace(plain, random=random), settings) for random in (False, True)]
    assert rows[1].keys() - rows[0].keys() == {"single", "kept", "em", "vote"}
    assert rows[1]["em"][1].eot is None and rows[0]["low"][1].eot == 1


def test_a_purifier_of_this_library_also_faces_per_step_losses(digits, net, tmp_path):
    mine = coup(net, load_score("digits", "score"), n_steps=2)
    found = smoke({"mine": mine, "plain": net}, digits.x[:2], digits.y[:2], tmp_path)
    assert (
        "steps" in found.measured.rows["mine"] and Transfer("mine", "steps") in found.measured.rows["plain"]
    )
    assert "steps" not in found.measured.rows["plain"]
    text = "Left out: per-step losses, which take a path whose states are shown, of plain."
    assert text in found.save().with_suffix(".md").read_text()


def test_what_leaves_the_ball_stands_apart_from_every_worst_case(digits, net, tmp_path):
    alone, beside = (
        smoke({"plain": net}, digits.x, digits.y, tmp_path / name, outside=name == "outside")
        for name in ("alone", "outside")
    )
    assert alone.measured.rows["plain"].keys() == beside.measured.rows["plain"].keys()
    assert (alone.worst["plain"].right == beside.worst["plain"].right).all()
    assert alone.verdict("plain") == beside.verdict("plain") and not alone.measured.outside
    assert list(beside.outside().index) == [*TRIED.values()]
    pages = [one.save().with_suffix(".md").read_text() for one in (alone, beside)]
    assert ["## Outside the ball" in page for page in pages] == [False, True]


def test_a_defences_other_gradients_by_name(digits, net, tmp_path):
    hidden = Changed(lambda x: x.detach(), net)
    found = smoke({"it": Defence(hidden, gradients={"through": net})}, digits.x, digits.y, tmp_path)
    assert {"through-ce", "through-margin", "square"} <= {*found.measured.rows["it"]}
    assert "ce" not in found.measured.rows["it"]
    assert "on the gradient called bpda, on the gradient called through, on a black" in found.verdict("it")


def test_what_takes_a_part_at_random_or_has_a_gradient_now_and_then_is_attacked(digits, net, tmp_path):
    def either(nets, x):
        return nets[int(torch.rand(()) < 0.5)](x if torch.rand(()) < 0.5 else x.detach())

    found = smoke({"it": Answering(either, net, linear())}, digits.x, digits.y, tmp_path)
    assert 0 < found.probes["it"].missing < 1 and not found.probes["it"].error
    assert {"ce", "bpda-ce"} <= {*found.measured.rows["it"]}
    assert "no gradient in some calls" in found.verdict("it")


def test_no_number_is_no_right_answer(digits, net, tmp_path):
    known = digits.x[1:].clone()

    def undecided(nets, x):
        """Has no answer where the image is other than at first."""
        same = (x[:, None] == known[None]).flatten(2).all(2).any(1)
        return torch.where(same[:, None], nets[0](x), torch.nan)

    found = smoke({"it": Answering(undecided, net)}, digits.x, torch.zeros(8, dtype=torch.int64), tmp_path)
    assert found.probes["it"].unanswered == 1 / 8
    assert found.measured.rows["it"]["ce"].right.mean() == 0
    assert "answers that are no numbers" in found.verdict("it")


def test_what_answers_otherwise_after_many_calls_has_no_bound(digits, net, tmp_path):
    class Tired(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net, 0
            self.eval()

        def forward(self, x):
            self.calls += 1
            return self.net(x) * (-1 if self.calls > 60 else 1)

    found = smoke({"it": Tired(), "plain": net}, digits.x, digits.y, tmp_path)
    assert found.probes["it"].changed and not found.probes["plain"].changed
    assert "This is no bound" in found.verdict("it") and "answers change with use" in found.verdict("it")


def test_images_that_change_each_others_answers_are_judged_one_by_one(digits, net, tmp_path):
    sizes = []

    def mixed(nets, x):
        sizes.append(len(x))
        return nets[0](x) if len(x) == 1 else nets[0](x).roll(1, 1)

    found = smoke({"it": Answering(mixed, net)}, digits.x, digits.y, tmp_path)
    right = net(digits.x).argmax(1) == digits.y
    assert found.measured.rows["it"]["clean"].right.tolist() == right.float().tolist()
    assert "answers depend on the batch" in found.verdict("it")
    assert sizes[-16:] == [*[1] * 15, 8]  # the last is the question whether its answers have changed


def test_gradients_that_turn_at_once_are_a_sign(digits, net):
    def opaque(nets, x):
        """The decisions of a network, with confidences that are noise."""
        logits = nets[0](x)
        best = nn.functional.one_hot(logits.argmax(1), 10)
        return torch.frac(torch.sin(logits * 1e3) * 100).abs() + 2 * best

    assert probe(Answering(opaque, net), digits.x, digits.y).turned
    for honest in (net, Changed(fresh_noise, net), linear()):
        assert not probe(honest, digits.x, digits.y).turned


def test_without_any_gradient_the_verdict_rests_on_a_black_box(digits, net, tmp_path):
    class Closed(nn.Module):
        """Nothing of it can be seen: no part, no gradient."""

        def forward(self, x):
            with torch.no_grad():
                return net(x)

    found = smoke({"it": Closed().eval()}, digits.x, digits.y, tmp_path)
    assert {*found.measured.rows["it"]} == {"clean", "noise", "square", "rays"}
    assert "has no gradient of its own, so this rests on a black box." in found.verdict("it")
    assert found.masked("it") and not found.measured.eps


def test_each_draw_of_a_random_defence_is_a_call_of_its_own(digits, tmp_path):
    """A module that draws one number for the whole batch has as many draws as a gradient averages over."""
    sizes = []

    def shifted(x):
        sizes.append(len(x))
        return x + 0.1 * torch.randn(())

    model = Changed(shifted, linear())
    found = smoke({"it": model}, digits.x, digits.y, tmp_path)
    assert found.probes["it"].alone and max(sizes) == len(digits)
    wrapped = Audited(model, digits.x.shape[1:])
    wrapped.random = wrapped.alone = True
    logits = predict(wrapped, digits.x, torch.arange(5).expand(8, 5), 640)
    assert len({round(float(value), 5) for value in logits[0, :, 0]}) == 5
    assert sizes[-5 * 8 :] == [1] * 40  # or the images of a call would share their draws
    assert torch.equal(logits, predict(wrapped, digits.x, torch.arange(5).expand(8, 5), 640))


def test_decisions_by_many_draws_are_those_of_the_draws(digits, tmp_path, monkeypatch):
    """Right with probability 0.8 in every draw: all of N are with 0.8^N, the majority of many always."""
    monkeypatch.setitem(protocol.AUDITS, "smoke", replace(protocol.AUDITS["smoke"], n_draws=3))
    monkeypatch.setitem(protocol.MANY_DRAWS, "smoke", 100)

    class Unsure(nn.Module):
        def forward(self, x):
            wrong = torch.rand(len(x)) > 0.8
            labels = torch.arange(len(x)) % 8
            return 5 * nn.functional.one_hot(torch.where(wrong, labels + 1, labels), 10).float()

    frame = smoke({"it": Unsure().eval()}, digits.x, torch.arange(8), tmp_path).decisions()
    shares = {
        column: frame[f"Clean: {column}"].str.split().str[0].astype(float) / 100
        for column in ("one draw", "all of N draws", "majority of N", "mean logits of N")
    }
    assert list(frame["N"]) == ["3", "100"]
    assert shares["one draw"].iloc[1] == pytest.approx(0.8, abs=0.06)
    assert shares["all of N draws"].iloc[0] == pytest.approx(0.8**3, abs=0.4)
    assert shares["all of N draws"].iloc[1] == 0
    assert shares["majority of N"].iloc[1] == shares["mean logits of N"].iloc[1] == 1


# --- what it says ---


N = 200


def leaving(share):
    return scored(round(N * (1 - share)), N)


HONEST = {
    "clean": 0.95,
    "noise": 0.94,
    "fgsm": 0.6,
    "ce": 0.4,
    "long": 0.39,
    "dlr": 0.41,
    "margin": 0.4,
    "square": 0.6,
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, None),
        ({"bpda-ce": 0.2}, "another gradient is stronger than its own"),
        ({Transfer("plain", "ce"): 0.2}, "images made against another defence are stronger"),
        ({"square": 0.2}, "an attack that sees less is stronger"),
        ({"fgsm": 0.2}, "an attack that sees less is stronger"),
        ({"long": 0.3}, "more iterations still find something"),
        ({"margin": 0.3}, "another loss is stronger than the cross-entropy"),
        ({"em": 0.2, "kept": 0.2, "low": 0.2, "bpda-ce": 0.2}, None),
        ({"single": 0.6}, "its noise hides the gradient"),
        (dict.fromkeys(("ce", "long", "dlr", "margin", "fgsm", "square"), 0.94) | {"bpda-ce": 0.1},
         "random noise does as much as the gradient"),
        ({"single": 0.42, "bpda-ce": 0.39, Transfer("plain", "ce"): 0.5}, None),
        ({"clean": 0.3}, "clean accuracy is not above chance"),
    ],
)  # fmt: skip
def test_a_sign_is_named_where_an_attack_that_should_be_weaker_is_stronger(change, name, digits, net):
    row = {key: leaving(share) for key, share in (HONEST | change).items()}
    found = signs("it", probe(net, digits.x, digits.y), row, {key: str(key) for key in row}, {})
    assert not found if name is None else name in {sign.name for sign in found}
    assert all(sign.masking != (sign.name in HARMLESS) for sign in found)


@pytest.mark.parametrize(("images", "seen"), [(16, False), (400, True)])
def test_of_few_images_no_gradient_is_shown_to_be_like_noise(images, seen):
    """Noise leaves 75 % of the images, the gradient 69 %, the worst case 25 %."""
    shares = {"noise": 0.75, "ce": 0.69, "worst": 0.25}
    right = {key: (np.arange(images) < round(share * images)).astype(float) for key, share in shares.items()}
    found = compared("it", right, right, {key: key for key in right}, {}, np.arange(images) % 10)
    assert ("random noise does as much as the gradient" in {sign.name for sign in found if sign.seen}) == seen


def test_which_attack_is_the_strongest_is_seen_by_other_draws_than_those_reported():
    lucky, strong = leaving(0.4), leaving(0.5)
    lucky = replace(lucky, selection=np.full(N, 0.6))
    row = {"lucky": lucky, "strong": strong}
    assert strongest_of([*row], {key: score.selection for key, score in row.items()}) == "strong"


@pytest.mark.parametrize(
    ("right", "n", "shown"),
    [
        (0, N, None),
        (60, N, "30.0 % at 0.5, chance 10 %"),
        (1, 3, None),  # the interval is not above chance
        (3, 3, "100.0 % at 0.5, chance 10 %"),
    ],
)
def test_a_large_radius_at_which_images_are_still_right_is_a_sign(right, n, shown, digits, net):
    row, labels = {key: leaving(share) for key, share in HONEST.items()}, np.arange(N) % 10
    row["clean"] = replace(row["clean"], labels=labels, report=labels[:, None])
    by_radius = {0.15: np.ones(n), 0.5: (np.arange(n) < right).astype(float)}
    found = signs("it", probe(net, digits.x, digits.y), row, {key: str(key) for key in row}, by_radius)
    assert [(sign.name, sign.shown) for sign in found] == (
        [("accuracy at a large radius stays above chance", shown)] if shown else []
    )


def test_an_audits_page(digits, net, tmp_path, capsys):
    defences = {"mine": Changed(fresh_noise, net), "plain & simple"[:5]: net}
    found = smoke(defences, digits.x, digits.y, tmp_path, outside=True, verbose=True)
    after = len(protocol.radii((1, 8, 8), "linf", EPS)) + 1 + len(TRIED)  # 1: many draws
    assert capsys.readouterr().err.count(" done in ") == 1 + after
    page = found.save()
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        f"audit.{end}" for end in ("csv", "html", "md", "png")
    }
    assert found.figure().axes[1].get_xlabel() == "L∞ radius, under APGD-ce, n = 4"
    html, text = page.read_text(), (tmp_path / "audit.md").read_text()
    for name in ("mine", "plain"):
        assert f"**{name}**: robust accuracy at most" in text and f"<strong>{name}</strong>: robust" in html
        assert "(L∞, eps = 0.15, n = 8; the worst of" in found.verdict(name)
    assert "data:image/png;base64," in html and 'src="http' not in html
    frame = pd.read_csv(tmp_path / "audit.csv")
    worst = frame[frame.label == "worst case"].set_index("defence")
    assert worst.loc["mine", "value"] == pytest.approx(100 * found.worst["mine"].right.mean())
    assert set(frame.n) == {8}
    assert "**is not decided**" in found.claim("mine", "plain") or "**holds**" in found.claim("mine", "plain")
    assert found.claims == [found.claim("mine", "plain")] and found.claims[0] in text
    with pytest.raises(ValueError, match="defence: expected one of mine, plain; got 'other'"):
        found.claim("mine", "other")
