"""What holds for every setting and every path, tried on settings and paths that nobody picked by hand."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
from closed_forms import GaussianMixtureScore, SmoothClassifier
from hypothesis import given, settings
from hypothesis import strategies as st

from coup_lib.attacks import ATTACKS, NORMS
from coup_lib.data import SIZES, SPLITS
from coup_lib.defences import DEFENCES
from coup_lib.evaluation.config import PROFILES, PURPOSES, Config, from_notebook
from coup_lib.evaluation.profiles import BUDGETS
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import config_hash
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.gradients import GRADIENTS
from coup_lib.guidance import Guided, to_state
from coup_lib.purify import coup, diffpure, reverse_only, standard_normal
from coup_lib.sde import T_END, VPSDE
from coup_lib.solver import solve, time_grid
from coup_lib.studies.toy import ToySettings, prop2_bound

# The same examples every time: what fails here fails everywhere.
repeatable = settings(derandomize=True, deadline=None, max_examples=25, database=None)

# Settings


def written(numbers):
    """A number, or the same one as papermill may hand it over."""
    return st.one_of(numbers, numbers.map(str))


NAMES = ("profile", "budget", "norm", "gradient", "precision", "device", "split", "purpose")
COUNTS = written(st.integers(1, 10_000)) | st.integers(1, 50).map(float)
FRACTIONS = st.builds("{}/{}".format, st.integers(1, 99), st.integers(100, 999))
VALID = {
    "budget": st.sampled_from(BUDGETS),
    "norm": st.sampled_from([*NORMS, "Linf", "L2", "LINF"]),
    "gradient": st.sampled_from(GRADIENTS),
    "precision": st.sampled_from(["float32", "bfloat16"]),
    "device": st.sampled_from(["auto", "cpu"]),
    "split": st.sampled_from(SPLITS),
    "purpose": st.sampled_from(PURPOSES),
    "eps": written(st.floats(1e-6, 1)) | FRACTIONS,
    "t_star": written(st.floats(0.01, PROFILES["digits"].t_max)),
    "guidance_weight": written(st.floats(-999, 1000)),
    "n_images": written(st.integers(1, min(SIZES["digits"].values()))),
    "n_steps": written(st.integers(1, 900)),
    "n_iter": COUNTS,
    "eot": COUNTS,
    "n_targets": COUNTS,
    "square_queries": COUNTS,
    "n_draws": COUNTS,
    "seed": written(st.integers(0, 2**31)),
}
some_settings = st.fixed_dictionaries({}, optional=VALID)
shards = st.integers(1, 9).flatmap(
    lambda count: st.fixed_dictionaries({"num_shards": st.just(count), "shard": st.integers(0, count - 1)})
)

NOT_A_NUMBER = st.sampled_from([math.nan, math.inf, -math.inf, "", "eight", "8/0", "1e999", "0x1", 10**400])
NOT_A_NUMBER |= st.sampled_from([[1], {}, (0.1,), 1j, b"?"])
NOT_A_COUNT = NOT_A_NUMBER | st.sampled_from([True, False, 1.5, "2.5", 0.999, -1, "-3", -0.5])
NOT_A_NAME = st.text(max_size=9).map("no {}".format) | st.sampled_from([None, 1, 0.5, ["exact"], {}, b"cpu"])
INVALID = {
    **dict.fromkeys(NAMES, NOT_A_NAME),
    "subset": NOT_A_NAME.filter(lambda value: value is not None),
    "eps": NOT_A_NUMBER | st.floats(-10, 0) | st.just("-1/8"),
    "t_star": NOT_A_NUMBER | st.floats(-1, 1e-5) | st.floats(0.3001, 10),
    "guidance_weight": NOT_A_NUMBER | st.floats(-1e9, -1000) | st.floats(1001, 1e9),
    "n_images": NOT_A_COUNT | st.integers(513) | st.just(0),
    **dict.fromkeys(("n_iter", "eot", "n_targets", "square_queries"), NOT_A_COUNT | st.just(0)),
    **dict.fromkeys(("n_steps", "n_draws", "num_shards"), NOT_A_COUNT | st.just(0)),
    "seed": NOT_A_COUNT | st.integers(2**31 + 1),
    "shard": NOT_A_COUNT | st.integers(1),
}


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch):
    monkeypatch.delenv("COUP_SMOKE", raising=False)


@repeatable
@given(some_settings, shards)
def test_every_valid_setting_is_taken_and_comes_back_as_it_is(chosen, shard):
    """Through `Config`, its fields as JSON, and the parameters that papermill writes into a notebook."""
    config = Config(**chosen, **shard)
    fields = dataclasses.asdict(config)
    for name, value in chosen.items():
        assert fields[name] == (value.lower() if name in NAMES else pytest.approx(float(Fraction(value))))
    assert Config(**fields) == config
    assert Config(**json.loads(json.dumps(fields))) == config
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in (chosen | shard).items())
    namespace = {"In": ["", cell]}
    exec(cell, namespace)
    assert from_notebook(Config, namespace) == config


@pytest.mark.parametrize("name", INVALID)
@repeatable
@given(st.data())
def test_every_invalid_setting_is_named_with_its_value(name, data):
    value = data.draw(INVALID[name])
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    got = str(value).lower() if name == "norm" else value
    where = " of the test split" * (name == "n_images")
    assert str(error.value).startswith(f"{name}{where}: expected ")
    said, *_ = str(error.value).split("; did you mean")
    assert said.endswith(f"; got {got!r}")


def test_every_field_has_settings_to_refuse():
    """A new field of `Config` must come with values for these tests; the classifier is `zoo`'s to refuse."""
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(INVALID) == fields - {"classifier"}
    assert set(VALID) == fields - {"classifier", "profile", "subset", "shard", "num_shards"}


@repeatable
@given(t_star=st.floats(1.1e-5, 0.3), n_steps=st.integers(1, 100_000))
def test_steps_that_the_solver_refuses_are_refused_before_a_network_is_loaded(t_star, n_steps):
    if t_star / n_steps > T_END:
        assert len(time_grid(t_star, Config(t_star=t_star, n_steps=n_steps).n_steps)) == n_steps + 1
    else:
        with pytest.raises(ValueError, match=f"got {t_star} / {n_steps}"):
            Config(t_star=t_star, n_steps=n_steps)


sources = st.builds(
    AttackSpec,
    st.sampled_from(ATTACKS),
    st.sampled_from(DEFENCES),
    st.sampled_from(GRADIENTS),
    *[st.none() | st.integers(1, 99)] * 3,
    seed=st.none() | st.integers(0, 99),
    fixed_noise=st.booleans(),
)


@repeatable
@given(some_settings, sources, st.integers(2, 9))
def test_a_records_settings_survive_the_record(chosen, source, count):
    """Read back from JSON they name the same record; who shares the work does not change them."""
    alone = Evaluation(Config(**chosen)).attack_settings(source)
    shared = Evaluation(Config(**chosen, shard=count - 1, num_shards=count)).attack_settings(source)
    assert shared == alone
    assert config_hash(json.loads(json.dumps(alone[1], allow_nan=False))) == config_hash(alone[1])


@repeatable
@given(
    st.lists(st.floats(0.001, 50), max_size=6, unique=True).map(sorted),
    st.integers(1, 10_000),
    st.floats(0.001, 1),
)
def test_settings_of_the_toy_study_come_back_as_they_are(weights, n_runs, t_star):
    text = ",".join(map(str, [0, *weights]))
    toy = ToySettings(lambdas=text, n_runs=str(n_runs), t_star=str(t_star))
    assert toy.weights == (0, *weights) and (toy.n_runs, toy.t_star) == (n_runs, t_star)
    assert ToySettings(**json.loads(json.dumps(dataclasses.asdict(toy)))) == toy


# The solver, in float64 on closed forms

BUILDERS = {"diffpure": diffpure, "reverse": reverse_only, "coup": coup}


FEW, MANY = st.integers(1, 12), st.integers(20, 60)  # steps


@st.composite
def problems(draw, n_steps=FEW):
    """(score of a random mixture, classifier, images (B, 1, 2, 2) in [0, 1], seeds (B,), path)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    normal = torch.randn(draw(st.integers(1, 4)), 4, generator=generator, dtype=torch.float64)
    x = torch.rand(draw(st.integers(2, 6)), 1, 2, 2, generator=generator, dtype=torch.float64)
    seeds = torch.randint(2**62, (len(x),), generator=generator)
    score = GaussianMixtureScore(draw(st.floats(0, 1)) * normal, draw(st.floats(0.1, 1)))
    return (
        score,
        SmoothClassifier().double(),
        x,
        seeds,
        {"t_star": draw(st.floats(0.002, 0.3)), "n_steps": draw(n_steps)},
    )


def answer(defence, x, seeds):
    """(logits, the gradient of their weighted sum)."""
    x = x.clone().requires_grad_()
    logits = defence(x, seeds=seeds)
    weights = torch.arange(1, 1 + logits.shape[1], dtype=x.dtype)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), x)[0]


@pytest.mark.parametrize("name", BUILDERS)
@repeatable
@given(problems(), st.randoms(use_true_random=False), st.sampled_from(["exact", "first_order", "adjoint"]))
def test_the_order_of_a_batch_is_the_order_of_its_results(name, problem, random, gradient):
    """Images permuted with their noise: so are logits and gradients. No image knows of its neighbours."""
    score, classifier, x, seeds, path = problem
    order = random.sample(range(len(x)), len(x))
    defence = BUILDERS[name](classifier, score, gradient=gradient, **path)
    for got, expected in zip(answer(defence, x[order], seeds[order]), answer(defence, x, seeds), strict=True):
        torch.testing.assert_close(got, expected[order], rtol=1e-9, atol=1e-12)


@repeatable
@given(problems(), st.sampled_from(["exact", "first_order"]))
def test_no_weight_is_no_guidance_bit_for_bit_and_so_is_its_gradient(problem, gradient):
    score, classifier, x, seeds, path = problem
    guided = answer(coup(classifier, score, guidance_weight=0, gradient=gradient, **path), x, seeds)
    plain = answer(reverse_only(classifier, score, gradient=gradient, **path), x, seeds)
    assert all(map(torch.equal, guided, plain))


def walked(problem, weight):
    """A guided path's (distance (B,), constants of Prop. 2: γ, C_s (B,), C_p (B,), C_x (B,), ‖ε‖ (B,)).

    The constants are the path's own. γ = ½ Σ β dt, the integral as the Euler steps take it. ε is the Gaussian
    into which the derivation collects the noise: that of a step is carried to the end by those after it.
    """
    score, classifier, x, seeds, path = problem
    times, sde, state = time_grid(**path), VPSDE(), to_state(x)
    guided, noise = Guided(score, classifier, weight), standard_normal(seeds, len(times) - 1, x)
    scores, guides = [], []

    def note(index, t, state):
        if index < len(noise):
            t = torch.tensor(t, dtype=state.dtype)
            scores.append(length(score(state, t)))
            guides.append(length(guided.guidance(state, t)))

    end = solve(guided, sde, state, times, noise, note)
    dt, carried = times[:-1] - times[1:], torch.zeros_like(state)
    half = sde.beta(times[:-1]) * dt / 2
    for factor, z in zip(half, noise, strict=True):
        carried = (1 + factor) * carried + (2 * factor).sqrt() * z
    gamma = float(half.sum())
    c_s, c_p = (2 * torch.stack(values).amax(0) for values in (scores, guides))
    return length(end - state), (
        gamma,
        c_s,
        c_p,
        length(state),
        length(carried) / math.expm1(2 * gamma) ** 0.5,
    )


def length(x):
    """(B,) of x (B, ...)."""
    return x.flatten(1).norm(dim=1)


@repeatable
@given(problems(FEW | MANY), st.floats(0, 5))
def test_proposition_2_bounds_how_far_an_image_is_moved(problem, weight):
    """With e^γ - 1 in place of Eq. 8's γ, as its assumptions allow (see notebook 00), for every path."""
    distance, constants = walked(problem, weight)
    assert (distance <= prop2_bound(*constants, rigorous=True) * (1 + 1e-12)).all()


@repeatable
@given(problems(MANY), st.floats(0, 5))
def test_proposition_2_holds_as_printed_on_these_paths(problem, weight):
    """Eq. 8 itself, with the integral γ(t*): not implied, and yet never broken by a mixture's score."""
    distance, (_, *constants) = walked(problem, weight)
    sde, t_star = VPSDE(), torch.tensor(problem[-1]["t_star"], dtype=torch.float64)
    assert (distance <= prop2_bound(float(sde.gamma(t_star)), *constants)).all()


@repeatable
@given(problems(FEW), st.floats(0, 2))
def test_a_path_that_shrinks_to_nothing_is_the_identity(problem, weight):
    """Halving t* again and again: each distance is bounded, and the bounds vanish."""
    score, classifier, x, seeds, path = problem
    t_star = path["t_star"]
    while t_star / path["n_steps"] > 2 * T_END:
        t_star /= 2
        distance, constants = walked((score, classifier, x, seeds, path | {"t_star": t_star}), weight)
        bound = prop2_bound(*constants, rigorous=True)
        assert (distance <= bound * (1 + 1e-12)).all()
    assert (bound < 0.15).all()


@pytest.mark.parametrize("name", BUILDERS)
@repeatable
@given(problems(n_steps=st.just(1)))
def test_the_shortest_path_of_every_purifier_returns_the_image(name, problem):
    score, classifier, x, seeds, _ = problem
    purifier = BUILDERS[name](classifier, score, t_star=2 * T_END, n_steps=1).purifier
    assert float((purifier(x, seeds) - x).abs().max()) < 0.02
