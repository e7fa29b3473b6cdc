"""Sources × targets on a few digits, and how draws become accuracies."""

import json
import re
import shutil
import threading
import time
from dataclasses import replace

import filelock
import numpy as np
import pytest
import torch
from torch import nn

from coup_lib import paths
from coup_lib.attacks import NAMES, AttackResult
from coup_lib.defences import DEFENCES, PURIFIERS
from coup_lib.evaluation import bench, records
from coup_lib.evaluation import config as settings
from coup_lib.evaluation import run as evaluate
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.noise import image_seeds
from coup_lib.evaluation.outcomes import (
    Accuracy,
    Difference,
    Predictions,
    Transfer,
    most_frequent,
    worst_case,
    worst_of,
)
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.records import config_hash
from coup_lib.evaluation.specs import CLEAN
from coup_lib.purify import FixedNoise, Purifier, images_per_call

TINY = {"n_images": 4, "n_iter": 2, "eot": 2, "n_draws": 2, "n_steps": 3}


@pytest.fixture
def in_chunks(monkeypatch):
    """Change the profile's chunk size for one test."""

    def change(size):
        profile = replace(settings.PROFILES["digits"], chunk_size=size)
        monkeypatch.setitem(settings.PROFILES, "digits", profile)

    return change


def score(report, selection, labels=(0, 0, 0), robust=None, average=(0, 0, 0)):
    return Predictions(*map(np.array, (labels, report, average, selection)), robust)


def attack_hash(source, **changes):
    return config_hash(Evaluation(Config(**TINY | changes)).attack_settings(source)[1])


def test_ways_of_counting():
    report = [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 2]]
    robust = np.array([True, True, False])
    found = score(report, [1, 1, 1], robust=robust, average=[0, 1, 2])
    assert found.decided("single").tolist() == [1, 0.75, 0.25]
    assert found.decided("worst_draw").tolist() == [1, 0, 0]
    assert found.decided("majority").tolist() == [1, 1, 0]
    draws = np.array([[2, 0, 0, 2], [-1, -1, 1, 1], [3, 3, 1, -1], [-1, -1, -1, 0]])  # -1 is no answer
    assert most_frequent(draws).tolist() == [0, -1, 3, -1]
    assert found.decided("averaged").tolist() == [1, 0, 0]
    assert found.counted.tolist() == [1.0, 1.0, 0.0]


def test_a_borrowed_attack_has_no_count_of_its_own():
    found = score([[0]] * 3, [1, 1, 1])
    with pytest.raises(ValueError, match="no count of its own"):
        _ = found.counted
    with pytest.raises(ValueError, match="without its clean draw"):
        score([[0]] * 3, [1, 1, 1], robust=np.ones(3, dtype=bool)).counted_with(found)


def test_the_worst_source_is_chosen_per_image_and_rescored():
    """Chosen by `selection`, not by the reported draws: the luckier report would make the last one 0."""
    first = score([[0, 0], [1, 1], [0, 0]], [1.0, 0.0, 0.4])
    second = score([[1, 1], [0, 0], [1, 1]], [0.0, 1.0, 0.6])
    assert worst_of([first, second]).tolist() == [0, 0, 1]


def test_the_worst_case_never_looks_at_the_draws_that_it_reports():
    """Where sources are equally strong, choosing by the reported draws counts luck as skill."""
    generator = np.random.default_rng(0)
    draws = (generator.random((8, 2, 400, 10)) < 0.3).astype(int)  # wrong, of 8 sources alike
    scores = [
        score(report, 1 - select.mean(1), np.zeros(400, int), None, report[:, 0]) for report, select in draws
    ]
    found = worst_case(scores)
    assert abs(found.right.mean() - 0.7) < 0.015 and found.n_sources == 8
    assert all(found.expected.mean() <= one.selection.mean() + 1e-12 for one in scores)


def test_luck_does_not_choose_the_source():
    """One source is the strongest on every image: ten draws an image must not talk the attacker out of it."""
    generator = np.random.default_rng(0)
    rates = np.concatenate([[0.6], np.full(30, 0.5)])  # wrong
    draws = generator.random((31, 2, 400, 10)) < rates[:, None, None, None]
    scores = [score(*both.astype(int), np.zeros(400, int)) for both in draws]
    scores = [
        score(one.report, 1 - one.selection.mean(1), np.zeros(400, int), None, one.report[:, 0])
        for one in scores
    ]
    assert abs(worst_case(scores).right.mean() - 0.4) < 0.02


def test_an_image_has_the_source_that_breaks_it():
    """Two sources that each break the half that the other leaves: together they leave nothing."""
    halves = np.repeat([0, 1], 50), np.repeat([1, 0], 50)
    scores = [
        score(np.tile(wrong[:, None], 10), 1.0 - wrong, np.zeros(100, int), None, wrong) for wrong in halves
    ]
    assert worst_case(scores).right.mean() == 0


def test_difference_and_its_verdict():
    right, wrong = np.ones(50), np.zeros(50)
    mixed = np.array([1.0, 0.0] * 25)
    assert Difference.of(right, mixed).verdict == "holds"
    assert Difference.of(wrong, mixed).verdict == "does not hold"
    assert Difference.of(mixed, mixed[::-1]).verdict == "is not decided"
    assert Difference.of(right, mixed).value == 50
    assert str(Difference(-0.004, -1.0, 1.0, 4)) == "+0.00 points [-1.0, +1.0]"
    assert str(Accuracy.of(mixed)).startswith("50.00 [35.")


def test_sources_that_are_the_same_are_one():
    assert against("apgd-ce", "reverse", "first_order") == against("apgd-ce", "reverse")
    assert against("apgd-ce", "averaged", "first_order") == against("apgd-ce", "averaged")
    assert against("apgd-ce", "coup", "first_order") != against("apgd-ce", "coup")
    assert against("apgd-ce", "low-noise", "first_order") != against("apgd-ce", "low-noise")
    assert against("apgd-ce", "none", "bpda") == against("apgd-ce", "none")
    assert against("square", "coup", "first_order") == against("square", "coup")
    assert against("clean", "coup") == CLEAN
    assert against("noise", "coup") == against("noise", "none")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defence": "gan"}, "defence: expected one of none, diffpure, reverse, coup, .*; got 'gan'"),
        ({"attack": "cw"}, "attack: expected one of clean, noise, .*; got 'cw'"),
        ({"gradient": "numeric"}, "gradient: expected one of exact, .*; got 'numeric'"),
        ({"n_iter": 0}, "n_iter: expected a whole number of at least 1; got 0"),
        ({"n_steps": -2}, "n_steps: expected a whole number of at least 1; got -2"),
    ],
)
def test_a_source_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        against(**({"attack": "pgd", "defence": "coup"} | given))


def test_a_source_says_what_it_is():
    start = against("apgd-ce", "reverse", n_steps=5)
    source = against("pgd", "coup", "first_order", eot=3, seed=0, fixed_noise=True, start=start)
    assert str(source) == (
        "pgd on coup, first_order, eot 3, seed 0, fixed noise, from apgd-ce on reverse, exact, n_steps 5"
    )
    assert (str(CLEAN), str(against("square", "coup"))) == ("clean", "square on coup")


OVERRIDES = {
    "n_iter": 3,
    "eot": 3,
    "n_steps": 4,
    "seed": 1,
    "fixed_noise": True,
    "start": against("apgd-ce", "reverse"),
    "gradient": "first_order",
}


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-dlr", "apgd-margin"])
def test_every_override_is_another_record(name):
    sources = [against(name, "coup")]
    sources += [against(name, "coup", **{field: value}) for field, value in OVERRIDES.items()]
    sources.append(against(name, "coup", start=against("apgd-ce", "reverse", seed=1)))
    sources.append(against(name, "reverse"))
    assert len({attack_hash(source) for source in sources}) == len(sources)


@pytest.mark.parametrize("field", ["n_iter", "eot", "n_steps", "seed"])
def test_an_override_equal_to_the_configuration_is_the_same_record(field):
    plain = against("apgd-ce", "coup")
    equal = against("apgd-ce", "coup", **{field: getattr(Config(**TINY), field)})
    assert equal != plain and attack_hash(equal) == attack_hash(plain)
    changed = against("apgd-ce", "coup", **{field: OVERRIDES[field]})
    assert attack_hash(changed) == attack_hash(plain, **{field: OVERRIDES[field]})
    start, its_own = (against("pgd", "coup", start=source) for source in (plain, equal))
    assert attack_hash(start) == attack_hash(its_own)


def test_what_an_attack_does_not_spend_does_not_name_its_record():
    """FGSM takes one step, Square asks for no gradient, AutoAttack's standard version averages nothing."""
    assert attack_hash(against("fgsm", "coup"), n_iter=9) == attack_hash(against("fgsm", "coup"))
    assert attack_hash(against("fgsm", "coup"), eot=9) != attack_hash(against("fgsm", "coup"))
    for name in ("square", "standard"):
        source = against(name, "coup")
        assert attack_hash(source, eot=9) == attack_hash(source)
        assert attack_hash(source, square_queries=9) != attack_hash(source)
    for name in ("noise", "clean"):
        assert attack_hash(against(name, "none"), n_iter=9, eot=9) == attack_hash(against(name, "none"))
    assert attack_hash(CLEAN, seed=4, eps=0.3) == attack_hash(CLEAN)
    assert attack_hash(against("noise", "none"), seed=4) != attack_hash(against("noise", "none"))


def test_overrides_reach_the_attack_and_the_defence(results_folder, monkeypatch):
    """A stand-in for the attack that writes down what it was made with."""
    made = []

    class Noted:
        def __init__(self, name, norm, eps, **budget):
            self.told = {"name": name, "norm": norm, "eps": eps} | budget

        def __call__(self, model, x, y, start):
            fixed = isinstance(model, FixedNoise)
            purifier = (model.purified if fixed else model).purifier
            made.append(self.told | {"steps": purifier.n_steps, "fixed": fixed, "start": start})
            made[-1] |= {"gradient": purifier.gradient, "weight": getattr(purifier.score, "weight", None)}
            return AttackResult(x + 0.01, torch.ones(len(y), dtype=torch.bool))

    monkeypatch.setattr(evaluate, "Attack", Noted)
    evaluation = Evaluation(Config(**TINY), verbose=False)
    start = against("pgd", "reverse")
    budget = {"n_iter": 7, "eot": 5, "n_steps": 4, "seed": 3, "guidance_weight": 6}
    overridden = against("pgd", "coup", "first_order", fixed_noise=True, start=start, **budget)
    evaluation.attack(against("pgd", "coup"))
    evaluation.attack(overridden)
    plain, begun, other = made
    assert (plain["n_iter"], plain["eot"], plain["steps"], plain["gradient"]) == (2, 2, 3, "exact")
    assert (other["n_iter"], other["eot"], other["steps"], other["gradient"]) == (7, 5, 4, "first_order")
    assert other["fixed"] and not plain["fixed"] and other["seed"] != plain["seed"] == begun["seed"]
    assert plain["start"] is begun["start"] is None
    assert [record["weight"] for record in made] == [1, None, 6]
    torch.testing.assert_close(other["start"], evaluation.images.x + 0.01)


def test_on_a_cpu_no_more_images_are_taken_than_need_no_replay(monkeypatch):
    evaluation = Evaluation(Config(), verbose=False)
    x, most = torch.rand(2, 1, 8, 8), evaluation.batch.most
    batches = {}
    for kept in (100_000, 40, 0):  # not even one: as many as ever
        monkeypatch.setattr(Purifier, "images_kept", lambda self, x, kept=kept: kept)
        names = ("coup", "coup-averaged", "likelihood", "none")
        batches[kept] = [images_per_call(evaluation.bench.defence(name), x, most) for name in names]
    assert batches == {100_000: [most] * 4, 40: [40, 10, most, most], 0: [most] * 4}
    assert images_per_call(evaluation.bench.defence("coup", "adjoint"), x, most) == most


def test_a_start_is_cut_into_the_same_chunks(results_folder, in_chunks, monkeypatch):
    in_chunks(3)
    begun = []
    attack = evaluate.Attack.__call__

    def noted(self, model, x, y, start=None):
        begun.append((x, start))
        return attack(self, model, x, y, start)

    monkeypatch.setattr(evaluate.Attack, "__call__", noted)
    evaluation = Evaluation(Config(**TINY | {"n_images": 7}), verbose=False)
    source = against("noise", "none")
    x_adv = evaluation.x_adv(source)
    begun.clear()
    evaluation.attack(against("pgd", "none", start=source))
    assert [len(x) for x, _ in begun] == [3, 3, 1]
    assert torch.equal(torch.cat([start for _, start in begun]), x_adv)


def test_an_images_noise_does_not_depend_on_the_number_of_images():
    assert image_seeds(0, 2, range(3, 5), 4).tolist() == image_seeds(0, 2, range(8), 4)[3:5].tolist()
    assert image_seeds(0, 2, range(2), 4).tolist() != image_seeds(1, 2, range(2), 4).tolist()
    assert image_seeds(0, 2, range(2), 4).tolist() != image_seeds(0, 3, range(2), 4).tolist()


def test_whoever_shares_the_work_goes_on_with_the_next_score(results_folder):
    """Another process is at the first of three scores; this one makes the others and only then waits."""
    evaluation = Evaluation(Config(**TINY, num_shards=2), verbose=False)
    sources = [CLEAN, against("noise", "none"), against("pgd", "none")]
    rows = {str(source): source for source in sources}
    evaluation.predictions({"none": rows})
    first, *others = (evaluation.prediction_record("reverse", source) for source in sources)
    thread = threading.Thread(target=evaluation.predictions, args=({"reverse": rows},))
    with filelock.FileLock(f"{first.chunk_path(0)}.lock"):
        thread.start()
        deadline = time.monotonic() + 60
        while not all(other.path.exists() for other in others):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not first.path.exists() and thread.is_alive()
    thread.join(60)
    assert all(record.path.exists() for record in (first, *others))


def test_an_unknown_classifier_is_refused():
    expected = "classifier: expected one of cnn-small, cnn-large, cnn-small-linf, cnn-small-l2; got 'resnet'"
    with pytest.raises(ValueError, match=expected):
        Evaluation(Config(), "resnet")


@pytest.mark.parametrize(("attack", "target"), [("pgd", "none"), ("per-step", "reverse")])
def test_a_long_attack_says_how_far_it_is_within_a_chunk(results_folder, capsys, monkeypatch, attack, target):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr("coup_lib.evaluation.progress.time.monotonic", lambda: next(clock))
    size = PROFILES["digits"].chunk_size
    evaluation = Evaluation(Config(n_images=2 * size, n_iter=4, eot=1, n_draws=2, n_steps=2))
    rows = {target: {"attack": against(attack, target)}}
    evaluation.predictions(rows)
    shown = r"\[(\d)/2\] .*: (\d+)% done"
    said = [int(share) for job, share in re.findall(shown, capsys.readouterr().err) if job == "1"]
    assert len(said) >= 8 and said == sorted(said) and said[0] < 25 and said[-1] == 99
    for path in results_folder.glob("digits/score-*.json"):  # attacked images that are made again are no job
        path.unlink()
    shutil.rmtree(results_folder / "digits" / records.APART)
    Evaluation(evaluation.config).predictions(rows)
    assert re.findall(shown, capsys.readouterr().err) == [("2", "50")]


def test_columns_and_their_records(results_folder, capsys):
    config = Config(n_images=6, n_draws=3)
    columns = Evaluation(config).columns(("none", "reverse", "coup"))
    names = ["clean", "adaptive", "first_order", "from_none", "from_reverse"]
    assert list(columns["coup"]) == names  # the others' are there already: from_none, from_reverse
    transfers = [Transfer("coup", "adaptive"), Transfer("coup", "first_order")]
    assert list(columns["none"]) == list(columns["reverse"]) == names + transfers
    assert columns["reverse"]["adaptive"] is columns["reverse"]["from_reverse"]
    assert columns["none"]["adaptive"] is columns["none"]["from_none"]
    assert columns["coup"]["clean"].report.shape == (6, 3) and columns["coup"]["clean"].average.shape == (6,)
    said = capsys.readouterr().err
    assert "[1/8] cnn-small: clean: started" in said and "all 8 done in" in said

    path = next(results_folder.rglob("score-coup-on-cnn-small-linf-apgd-ce-coup-first_order-*.json"))
    record = json.loads(path.read_text())
    assert record["settings"]["attack"]["gradient"] == "first_order"
    assert record["settings"]["target"]["guidance_weight"] == 1.0
    assert set(record["result"]) == {"labels", "report", "average", "selection"}
    assert {len(record["result"][name]) for name in ("labels", "report", "average", "selection")} == {6}

    files = {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")}
    again = Evaluation(config, verbose=False).columns(("none", "reverse", "coup"))
    assert (again["coup"]["first_order"].report == columns["coup"]["first_order"].report).all()
    assert {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")} == files


def test_autoattacks_columns_are_standard_and_the_other_half_of_rand(results_folder, capsys):
    evaluation = Evaluation(Config(**TINY))
    columns = evaluation.columns(("none", "reverse", "coup"), autoattack=True)
    transfers = [Transfer(other, name) for other in ("none", "reverse") for name in ("standard", "dlr")]
    assert list(columns["coup"])[5:] == ["standard", "dlr", *transfers]
    for defence, row in columns.items():
        of_its_own = {"seed": evaluation.config.seed + 1}  # the second half of "rand" draws other noise
        for name, attack, more in (
            ("standard", "standard", {}),
            ("adaptive", "apgd-ce", {}),
            ("dlr", "apgd-dlr", of_its_own),
        ):
            robust = evaluation.attack(against(attack, defence, **more))["result"]["robust"]
            assert row[name].counted.tolist() == robust
        judged = evaluation.attack(against("apgd-dlr", defence, **of_its_own))["result"]["judged"]
        assert row["dlr"].attack_judged.tolist() == judged
        first = row["adaptive"]
        assert first.counted_with(row["dlr"]).tolist() == (first.counted * judged).tolist()
        assert row["clean"].attack_robust is None
    # What is found on one is tried on all.
    for name, attack, more in (("standard", "standard", {}), ("dlr", "apgd-dlr", of_its_own)):
        found = evaluation.prediction("coup", against(attack, "reverse", **more))
        assert (columns["coup"][Transfer("reverse", name)].report == found.report).all()
        found = evaluation.prediction("reverse", against(attack, "coup", **more))
        assert (columns["reverse"][Transfer("coup", name)].report == found.report).all()
    assert columns["coup"]["from_reverse"].attack_robust is None
    assert columns["none"]["from_none"].attack_robust is not None
    said = evaluation.warnings("coup")
    assert len(said) == len(set(said)) > 0 and "randomized" in " ".join(said)


def test_a_new_target_has_the_attack_run_again_where_its_images_are_gone(results_folder, monkeypatch, capsys):
    """Scores that are on record are read back without images."""
    source, config = against("pgd", "reverse", start=against("pgd", "none")), Config(**TINY)
    rows = {target: {"it": source} for target in ("reverse", "coup")}
    there = Evaluation(config, verbose=False).predictions(rows)
    shutil.rmtree(results_folder / "digits" / records.APART)
    assert (
        Evaluation(config, verbose=False).predictions(rows)["coup"]["it"].report == there["coup"]["it"].report
    ).all()
    assert not (results_folder / "digits" / records.APART).exists()
    for path in results_folder.glob("digits/score-coup-*.json"):
        path.unlink()
    again = Evaluation(config, verbose=False).predictions(rows)
    assert (again["coup"]["it"].report == there["coup"]["it"].report).all()
    said = capsys.readouterr().err
    assert said.count("they are made again from the seed") == 2 and "not to the bit" not in said


def test_scores_do_not_depend_on_the_chunks(results_folder, in_chunks):
    config = Config(n_images=6, n_draws=4)
    found = []
    for size in (64, 4):
        in_chunks(size)
        found.append(Evaluation(config, verbose=False).prediction("coup", CLEAN))
        for path in results_folder.rglob("*.json"):
            path.unlink()
    whole, chunked = found
    assert (whole.report == chunked.report).all() and (whole.average == chunked.average).all()
    np.testing.assert_allclose(whole.selection, chunked.selection, atol=1e-6)


def test_average_is_the_class_of_the_mean_logits(results_folder):
    config = Config(n_images=12, n_draws=5)
    evaluation = Evaluation(config, verbose=False)
    source = against("noise", "none")
    found, model = evaluation.prediction("diffpure", source), evaluation.bench.defence("diffpure")
    x = evaluation.x_adv(source)
    seeds = image_seeds(config.seed, evaluate.REPORT, range(12), 5)
    logits = torch.stack([model(x, seeds=seeds[:, draw]) for draw in range(5)])
    assert found.average.tolist() == logits.mean(0).argmax(1).tolist()
    assert found.report.tolist() == logits.argmax(2).T.tolist()


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_is_built_attacked_and_scored(results_folder, name):
    evaluation = Evaluation(Config(**TINY), verbose=False)
    found = evaluation.predictions({name: {"clean": CLEAN, "pgd": against("pgd", name)}})[name]
    assert found["pgd"].report.shape == (4, 2)
    assert found["pgd"].attack_robust.shape == (4,) and found["clean"].attack_robust is None
    x_adv = evaluation.x_adv(against("pgd", name))
    assert float((x_adv - evaluation.images.x).abs().max()) == pytest.approx(0.15, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_is_a_source(results_folder, name):
    evaluation, source = Evaluation(Config(**TINY), verbose=False), against(name, "coup")
    assert len(evaluation.attack(source)["result"]["robust"]) == 4
    assert evaluation.x_adv(source).shape == (4, 1, 8, 8)


def test_a_robust_guide_is_part_of_what_names_a_record():
    linf, l2 = (Evaluation(Config(norm=norm)) for norm in ("linf", "l2"))
    guides = {evaluation.bench.settings("robust-guide")["guide_sha256"] for evaluation in (linf, l2)}
    assert len(guides) == 2
    for name in DEFENCES:
        robust = name in PURIFIERS and PURIFIERS[name].robust_guide
        assert ("guide_sha256" in linf.bench.settings(name)) == robust
    built = linf.bench.defence("robust-guide")
    assert built.classifier is linf.bench.classifier is not built.purifier.score.classifier


def test_only_the_settings_that_matter_name_a_record():
    weak, strong = (Evaluation(Config(guidance_weight=weight)) for weight in (1, 2))
    same = against("apgd-ce", "reverse")
    assert weak.attack_settings(same) == strong.attack_settings(same)
    other = against("apgd-ce", "coup")
    assert weak.attack_settings(other) != strong.attack_settings(other)


def test_memory_running_out_halves_the_batch(results_folder, capsys, monkeypatch):
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
    monkeypatch.setattr(bench, "load_classifier", lambda dataset, name: small)
    config = Config(n_images=20, n_iter=3, eot=2, n_draws=2)
    shares = []
    for limit in (1000, 8):
        Small.limit = limit
        monkeypatch.setattr(paths, "RESULTS", results_folder / str(limit))
        row = Evaluation(config).columns(("none", "reverse"))["reverse"]
        shares.append({name: score.right for name, score in row.items()})
    assert "out of memory: going on with at most 5 images at once" in capsys.readouterr().err
    assert all((shares[0][name] == shares[1][name]).all() for name in shares[0])
    Small.limit = 0
    monkeypatch.setattr(paths, "RESULTS", results_folder / "none")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Evaluation(config).columns(("none",))
