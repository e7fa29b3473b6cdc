"""Every named gradient against its definition, in float64."""

from functools import partial

import pytest
import torch
from closed_forms import Dropping, relative_error, small_problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coup_lib import gradients
from coup_lib.guidance import (
    DenoisedGuided,
    GuidanceInterval,
    Guided,
    gradient_of,
    log_confidence,
    to_state,
)
from coup_lib.networks.precision import Bfloat16
from coup_lib.purify import Purifier, Vote, coup, diffpure, reverse_only, standard_normal
from coup_lib.score import NoiseScore
from coup_lib.sde import VPSDE
from coup_lib.solver import solve, time_grid

SEEDS = torch.arange(5)
BUILDERS = {"diffpure": diffpure, "reverse": reverse_only, "coup": coup}


def cosine(a, b):
    """Per image, with no epsilon that could hide tiny gradients."""
    a, b = a.flatten(1), b.flatten(1)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def input_gradient(defence, x):
    """The gradient of a fixed mixture of logits."""
    x = x.clone().requires_grad_()
    logits = defence(x, seeds=SEEDS)
    return torch.autograd.grad((logits * torch.arange(1.0, 4.0, dtype=x.dtype)).sum(), x)[0]


def plain_gradient(defence, x):
    """The same by ordinary autograd through every operation of the solver."""
    x = x.clone().requires_grad_()
    purifier = defence.purifier
    noise = standard_normal(SEEDS, purifier.n_steps + 1, x)
    state = purifier.start(to_state(x), noise)
    state = solve(purifier.score, purifier.sde, state, purifier.times, noise[1:])
    logits = defence.classifier(purifier.finish(state))
    return torch.autograd.grad((logits * torch.arange(1.0, 4.0, dtype=x.dtype)).sum(), x)[0]


def build(name, gradient, n_steps=12, t_star=0.1):
    score, classifier, x = small_problem()
    return BUILDERS[name](classifier, score, n_steps=n_steps, t_star=t_star, gradient=gradient), x


@pytest.fixture(params=["kept", "partly kept", "replayed"])
def activations(request, monkeypatch):
    """Run a test with all activations kept, with those of the last two steps, and with none."""
    if request.param == "partly kept":
        measured = gradients.steps_kept
        monkeypatch.setattr(gradients, "steps_kept", lambda *path: min(2, measured(*path)))
    else:
        monkeypatch.setenv("COUP_ACTIVATIONS", {"kept": "1", "replayed": "0"}[request.param])


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_equals_plain_autograd(name, activations):
    defence, x = build(name, "exact")
    assert relative_error(input_gradient(defence, x), plain_gradient(defence, x)) < 1e-9


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_passes_gradcheck(name, activations):
    score, classifier, x = small_problem()
    defence = BUILDERS[name](classifier, score, n_steps=4)
    x = (0.25 + x / 2)[:2]  # away from the clamp's kink
    assert torch.autograd.gradcheck(
        lambda x: defence(x, seeds=SEEDS[:2]), (x.requires_grad_(),), eps=1e-6, atol=1e-7
    )


def test_first_order_is_the_derivative_with_constant_guidance(activations):
    """Against autograd through a solver whose guidance is detached by hand."""
    score, classifier, x = small_problem()
    times, sde = time_grid(0.1, 6), VPSDE()
    guided = Guided(score, classifier, 2.0)

    class Detached(torch.nn.Module):
        def forward(self, x, t):
            return score(x, t) + (guided(x, t) - score(x, t)).detach()

    a, b = to_state(x).requires_grad_(), to_state(x).requires_grad_()
    ours = gradients.solve_with_gradient("first_order", guided, sde, a, times, None)
    theirs = solve(Detached(), sde, b, times)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(x)
    (ours,), (theirs,) = torch.autograd.grad(ours, a, weights), torch.autograd.grad(theirs, b, weights)
    assert relative_error(ours, theirs) < 1e-12


class Wrapped(nn.Module):
    """What a user puts around a score: as a module of its own, or where no walk over modules finds it."""

    def __init__(self, score, hidden=False):
        super().__init__()
        self.scores = [score] if hidden else nn.ModuleList([score])

    def forward(self, x, t):
        return self.scores[0](x, t)


WRAPPINGS = {
    "once": Wrapped,
    "twice": lambda guided: Wrapped(Wrapped(guided)),
    "out of sight": lambda guided: Wrapped(guided, hidden=True),
    "between times": GuidanceInterval,
    "between times, wrapped": lambda guided: Wrapped(GuidanceInterval(guided)),
    "as a score to be guided": lambda guided: Guided(guided, guided.classifier, 0.0),
    "compiled": lambda guided: torch.compile(guided, backend="eager"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_first_order_and_exact_are_what_they_are_however_the_score_is_wrapped(wrapping, activations):
    score, classifier, x = small_problem()
    guided = Guided(score, classifier)

    def gradient_by(score, gradient):
        purifier = Purifier(score, n_steps=4, gradient=gradient)
        at = x.clone().requires_grad_()
        return torch.autograd.grad(purifier(at, SEEDS).square().sum(), at)[0]

    bare, exact = (gradient_by(guided, gradient) for gradient in ("first_order", "exact"))
    assert relative_error(bare, exact) > 1e-2
    wrapped = WRAPPINGS[wrapping](guided)
    assert relative_error(gradient_by(wrapped, "first_order"), bare) < 1e-12
    if wrapping != "compiled":
        assert relative_error(gradient_by(wrapped, "exact"), exact) < 1e-12


def test_guidance_by_what_is_guided_has_the_same_values_whether_held_or_not():
    """There an inner guidance is differentiated on the way forward: it has to be, in every gradient."""
    score, classifier, x = small_problem()
    guided = DenoisedGuided(Guided(score, classifier), classifier)
    state, t = to_state(x).requires_grad_(), torch.tensor(0.05, dtype=torch.float64)
    torch.testing.assert_close(gradients.FirstOrder(guided)(state, t), guided(state, t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("late", [False, True])
def test_first_order_refuses_a_gradient_of_which_it_cannot_tell_what_it_is(late, activations):
    """Guidance that somebody wrote anew, on the whole path or on its last step only."""
    score, classifier, x = small_problem()

    class Own(nn.Module):
        def forward(self, x, t):
            if late and t > 0.03:
                return score(x, t)
            return score(x, t) + gradient_of(lambda x: log_confidence(classifier, x), x)

    purifier = Purifier(Own(), n_steps=4, gradient="first_order")
    assert purifier(x, SEEDS).shape == x.shape
    with pytest.raises(ValueError, match=r"first_order cannot tell guidance from score.*Guided takes a grad"):
        purifier(x.requires_grad_(), SEEDS)


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_guidance_in_compiled_code_is_refused_where_it_is_to_be_differentiated(gradient):
    """PyTorch leaves its second derivative out there, without a word."""
    score, classifier, _ = small_problem()
    compiled, inside = torch.compile(Guided(score, classifier)), Guided(torch.compile(score), classifier)
    for wrapped in (compiled, Wrapped(compiled)):
        with pytest.raises(ValueError, match=f"inside of guidance, not around it, for gradient='{gradient}'"):
            Purifier(wrapped, gradient=gradient)
        assert Purifier(wrapped, gradient="bpda").score is wrapped
    assert Purifier(inside, gradient=gradient).score is inside
    guided = Guided(score, classifier)
    guided.compile()
    with pytest.raises(ValueError, match="inside of guidance"):
        Purifier(guided, gradient=gradient)


# --- networks that draw random numbers ---


class NoisyScore(nn.Module):
    """A score with noise in it, from a generator of its own."""

    def __init__(self, score):
        super().__init__()
        self.score, self.source = score, torch.Generator()

    def forward(self, x, t):
        noise = torch.randn(x.shape, generator=self.source, dtype=x.dtype)
        return self.score(x, t) * (1 + 0.5 * noise)


def random_problem(name, gradient="exact"):
    score, _, x = small_problem()
    classifier = Dropping().double()
    settings = {"n_steps": 6, "gradient": gradient}
    return BUILDERS[name](classifier, NoisyScore(score), **settings), x


def afresh(defence):
    """All random numbers but the purifier's own noise begin anew."""
    torch.manual_seed(5)
    next(m for m in defence.modules() if isinstance(m, NoisyScore)).source.manual_seed(6)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_random_networks_are_differentiated_as_they_were(name, gradient, activations):
    """Kept or replayed: the gradient at the random numbers of the forward pass, and none drawn besides."""
    defence, x = random_problem(name, gradient)
    afresh(defence)
    found = input_gradient(defence, x)
    after = torch.rand(3)
    defence.purifier.gradient = "exact"
    if gradient == "first_order":
        defence.purifier.score = gradients.FirstOrder(defence.purifier.score)
    afresh(defence)
    assert relative_error(found, plain_gradient(defence, x)) < 1e-9
    assert torch.equal(torch.rand(3), after)


def test_pulling_back_draws_no_random_numbers(activations):
    defence, x = random_problem("coup")
    x = x.requires_grad_()
    logits = defence(x, seeds=SEEDS)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = torch.autograd.grad(logits.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.autograd.grad(logits.sum(), x)[0], first)


def test_adjoint_refuses_random_networks():
    defence, x = random_problem("coup", "adjoint")
    assert defence(x, seeds=SEEDS).shape == (5, 3)
    with pytest.raises(ValueError, match="draws random numbers, which adjoint cannot draw again"):
        input_gradient(defence, x)


def test_adjoint_converges_to_exact_as_the_step_shrinks():
    errors = []
    for n_steps in (20, 80, 320):
        exact, x = build("coup", "exact", n_steps)
        adjoint, _ = build("coup", "adjoint", n_steps)
        errors.append(relative_error(input_gradient(adjoint, x), input_gradient(exact, x)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_adjoint_on_a_noise_free_path_is_close():
    score, classifier, x = small_problem()
    guided, times = Guided(score, classifier), time_grid(0.1, 400)
    state = to_state(x).requires_grad_()
    pulled = {}
    for name in ("exact", "adjoint"):
        end = gradients.solve_with_gradient(name, guided, VPSDE(), state, times, None)
        pulled[name] = torch.autograd.grad(end, state, torch.ones_like(x))[0]
    assert float(cosine(pulled["exact"], pulled["adjoint"]).min()) > 0.9999


def test_bpda_is_the_identity_through_the_purifier():
    defence, x = build("diffpure", "bpda")
    x = x.clone().requires_grad_()
    purified = defence.purifier(x, SEEDS)
    weights = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(purified, x, weights)[0], weights)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("gradient", ["first_order", "adjoint", "bpda"])
def test_every_gradient_has_the_same_forward_pass(name, gradient):
    reference, x = build(name, "exact")
    other, _ = build(name, gradient)
    x = x.requires_grad_()
    torch.testing.assert_close(other(x, seeds=SEEDS), reference(x, seeds=SEEDS), rtol=0, atol=1e-15)


def test_a_replay_keeps_the_states_only():
    """What its graph saves are the states before the steps, and nothing else."""
    saved = {}
    for n_steps in (5, 15):
        defence, x = build("coup", "exact", n_steps)
        end = gradients.solve_with_gradient(
            "exact", defence.purifier.score, VPSDE(), x.requires_grad_(), time_grid(0.1, n_steps), None, 0
        )
        saved[n_steps] = sum(tensor.numel() for tensor in end.grad_fn.saved_tensors)
    assert saved == {5: 5 * x.numel(), 15: 15 * x.numel()}


class Counting(nn.Module):
    """A score that counts its calls, and says whether a GPU's convolutions would be deterministic in them."""

    def __init__(self, score):
        super().__init__()
        self.score, self.settings = score, []

    def forward(self, x, t):
        self.settings.append(torch.backends.cudnn.deterministic)
        return self.score(x, t)


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "guided by large convolutions"])
def test_what_is_kept_is_what_was_foreseen(kind, images):
    """Of whole paths: copies of weights in bfloat16, too, and layers that keep less in a larger batch."""
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1))
    score, x = NoiseScore(Conditioned(network)), torch.rand(images, 3, 32, 32)
    if kind == "bfloat16":
        score = NoiseScore(Bfloat16(Conditioned(network)))
    if kind.startswith("guided"):
        middle = [layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU())]
        score = Guided(score, nn.Sequential(nn.Conv2d(3, 32, 3), *middle, nn.Flatten(), nn.Linear(28800, 5)))
    score, times, kept = score.eval().requires_grad_(False), time_grid(0.1, 4), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients.solve_with_gradient("exact", score, VPSDE(), x.requires_grad_(), times, None, 2**40)
    weights = {tensor.data_ptr() for tensor in (*score.parameters(), *score.buffers())}
    counted = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    assert 0.8 < gradients.activation_bytes(score, VPSDE(), x, times) / counted < 1.25


class Conditioned(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, labels):
        return self.network(x)


@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_the_last_steps_are_kept_for_which_there_is_room(gradient):
    """Of five, those that fit are walked once and the others twice."""
    score, classifier, x = small_problem()
    guided, times, sde = Guided(score, classifier), time_grid(0.1, 5), VPSDE()
    path = (gradient, guided, sde, to_state(x), times)
    followed = gradients.FirstOrder(guided) if gradient == "first_order" else guided
    a_step, an_image = (
        gradients.activation_bytes(followed, sde, *given)
        for given in ((path[3], times[:2]), (path[3][:1], times))
    )
    assert gradients.images_kept(*path, 7 * an_image + 1) == 7
    found = []
    for kept in range(7):
        budget, counting = int(a_step * (kept + 0.5)), Counting(guided)
        assert gradients.steps_kept(*path, budget) == min(kept, 5)
        state = to_state(x).requires_grad_()
        gradients.steps_kept(gradient, counting, sde, state, times, budget)  # measures a step once
        counting.settings.clear()
        end = gradients.solve_with_gradient(gradient, counting, sde, state, times, None, budget)
        found.append(torch.autograd.grad(end.square().sum(), state)[0])
        replayed = max(0, 5 - kept)
        # What is walked a second time is walked alike: on a GPU, too.
        assert counting.settings == [True] * replayed + [False] * (5 - replayed) + [True] * replayed
        assert torch.backends.cudnn.deterministic is False
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=0, atol=1e-14)


def test_room_for_activations_is_what_is_asked_for(monkeypatch):
    assert gradients.free_for_activations(torch.device("cpu")) == 2 * 2**30
    for given, expected in (("0", 0), ("0.5", 2**29), ("40", 40 * 2**30)):
        monkeypatch.setenv("COUP_ACTIVATIONS", given)
        assert gradients.free_for_activations(torch.device("cpu")) == expected
    with gradients.in_one_graph(10):
        assert gradients.free_for_activations(torch.device("cpu")) == 4 * 2**30
    for mistaken in ("much", "-1", "nan", "inf", "1e300", "1e900000000"):
        monkeypatch.setenv("COUP_ACTIVATIONS", mistaken)
        with pytest.raises(ValueError, match=r"COUP_ACTIVATIONS \(GiB\): expected .*; got "):
            gradients.free_for_activations(torch.device("cpu"))


def test_weights_that_ask_for_a_gradient_are_refused_where_steps_are_replayed():
    score, classifier, x = small_problem()
    guided = Guided(score, classifier.requires_grad_(True))
    path = ("exact", guided, VPSDE(), to_state(x).requires_grad_(), time_grid(0.1, 3), None)
    assert gradients.solve_with_gradient(*path, 2**30).requires_grad
    with pytest.raises(ValueError, match="expected frozen weights, of which a replayed step knows no grad"):
        gradients.solve_with_gradient(*path, 0)
    classifier.requires_grad_(False)


def test_draws_of_a_vote_share_the_room(monkeypatch):
    """They are pulled back together, so that each may keep a tenth."""
    asked = []
    monkeypatch.setattr(gradients, "steps_kept", lambda *path: asked.append(room()) or 0)
    room = partial(gradients.free_for_activations, torch.device("cpu"))
    score, classifier, x = small_problem()
    Vote(coup(classifier, score, n_steps=2), 10)(x.requires_grad_())
    assert asked == [room() // 10] * 10


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_noise_is_that_of_the_seeds_as_they_were(gradient):
    defence, x = build("coup", gradient)
    seeds, x = SEEDS.clone(), x.clone().requires_grad_()
    expected = torch.autograd.grad(defence(x, seeds=seeds).square().sum(), x)[0]
    logits = defence(x, seeds=seeds)
    seeds += 1000
    assert torch.equal(torch.autograd.grad(logits.square().sum(), x)[0], expected)


class HostReads(TorchDispatchMode):
    """Counts how often a number is asked of a tensor, for which a GPU would have to end its work first."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guided", [Guided, GuidanceInterval, DenoisedGuided])
@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_no_step_waits_for_the_device(guided, gradient, activations):
    """A path, its gradient included, asks as often with three steps as with nine."""
    score, classifier, x = small_problem()
    guide = Guided(score, classifier)
    score = GuidanceInterval(guide, 0.03, 0.1) if guided is GuidanceInterval else guided(score, classifier)
    found = []
    for n_steps in (3, 3, 9):
        purifier, image = Purifier(score, n_steps=n_steps, gradient=gradient), x.clone().requires_grad_()
        with HostReads() as reads:
            torch.autograd.grad(purifier(image, SEEDS).sum(), image)
        found.append(reads.count)
    assert found[1] == found[2] > 0


def test_unknown_gradient_is_refused():
    score, _, _ = small_problem()
    with pytest.raises(ValueError, match="expected one of exact, first_order, adjoint, bpda; got 'exakt'"):
        Purifier(score, gradient="exakt")
    with pytest.raises(ValueError, match="gradient: expected one of exact, first_order, adjoint; got 'bpda'"):
        gradients.solve_with_gradient("bpda", score, VPSDE(), torch.zeros(1, 4), time_grid(0.1, 2), None)


@pytest.mark.parametrize("shape", [(5, 5, 1, 2, 2), (4, 1, 1, 2, 2), (3, 5, 1, 2, 2), (4, 5, 4)])
def test_noise_of_another_shape_is_refused(shape):
    score, _, x = small_problem()
    with pytest.raises(ValueError, match=r"^noise: expected shape \(4, 5, 1, 2, 2\).*; got \("):
        solve(score, VPSDE(), x, time_grid(0.1, 4), torch.zeros(shape))


@pytest.mark.parametrize("noise", [[], [0.5] * 3, [0.5] * 4 + [torch.zeros(5, 1, 2, 2)]])
@pytest.mark.parametrize("walk", [solve, partial(gradients.solve_with_gradient, "exact")])
def test_noise_that_is_too_little_or_not_like_the_images_is_refused(walk, noise):
    score, _, x = small_problem()
    given = [torch.full((1,), one) if isinstance(one, float) else one for one in noise]
    with pytest.raises(ValueError, match="noise: expected"):
        walk(score, VPSDE(), x, time_grid(0.1, 4), given)
