"""What happens to long runs, and what is handed over by mistake: they survive, or end and say why."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from closed_forms import small_problem
from forked import ROOT, Papermill
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_published import Hostile
from torch import nn

from coup_lib import paths
from coup_lib.attacks import Attack
from coup_lib.data import load_split
from coup_lib.defences import DEFENCES, MAXIMISERS, PURIFIERS, build
from coup_lib.evaluation import config, records
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.files import write_atomically
from coup_lib.gradients import GRADIENTS
from coup_lib.networks import checkpoints, zoo
from coup_lib.networks.checkpoints import load_network
from coup_lib.purify import coup, reverse_only
from coup_lib.score import DISCRETE_LEVELS, NoiseScore

# A server that has imported everything and forks when asked: a process to kill costs no seconds to start.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["coup_lib.evaluation.run", "pytest", "hypothesis"])


def start(run, *args):
    process = FORKS.Process(target=run, args=args)
    process.start()
    return process


def finish(run, *args):
    process = start(run, *args)
    process.join(120)
    assert process.exitcode == 0


# Runs to be disturbed; each is called in a process of its own.

CHUNKS, ALONE = 12, records.Worker()


def chunk_of_numbers(chunk):
    return {"value": chunk**2, "x": np.random.default_rng(chunk).random(60 * (chunk + 1))}


def combined(parts):
    return {"values": [part["value"] for part in parts], "x": np.concatenate([part["x"] for part in parts])}


def record_of_numbers(compute=chunk_of_numbers, worker=ALONE):
    return records.ChunkedRecord("digits", "work", {"a": 1}, range(CHUNKS), compute, combined, worker)


def numbers(folder, index=0, count=1):
    """A record that takes next to no time but what its files take."""
    paths.RESULTS = folder
    record_of_numbers(worker=records.Worker(index, count)).finish()


def evaluation(folder, index=0, count=1):
    """An attack and its score, four chunks each."""
    torch.set_num_threads(1)
    paths.RESULTS = folder
    config.PROFILES["digits"] = replace(config.PROFILES["digits"], chunk_size=2)
    tiny = Config(n_images=8, n_iter=1, eot=1, n_draws=1, n_steps=2, shard=index, num_shards=count)
    Evaluation(tiny, verbose=False).predictions({"coup": {"it": against("apgd-ce", "coup")}})


def found(folder):
    """What a run is for: every record but for its provenance, with its arrays byte for byte."""
    there = {}
    for path in folder.rglob("*.json"):
        document = json.loads(path.read_text())
        del document["provenance"]
        there[str(path.relative_to(folder))] = (
            document,
            path.with_suffix(".npz").exists() and path.with_suffix(".npz").read_bytes(),
        )
    return there


def finished_chunks(folder):
    return sorted(folder.glob("*/*.chunk*.npz"))


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """Warm: how long a run lives is to be measured without what the first one waits for."""
    finish(numbers, tmp_path_factory.mktemp("warm"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("run", "kills"), [(numbers, 40), (evaluation, 10)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path, run, kills, workers):
    """SIGKILL, again and again, at moments spread over a run's whole life; two workers die one by one."""
    begun = time.perf_counter()
    finish(run, tmp_path / "undisturbed")
    life, random = time.perf_counter() - begun, Random(0)
    expected, killed, seen = found(tmp_path / "undisturbed"), 0, set()
    lives = 0
    while killed < kills or len(seen) < 3:  # in different places, however fast the machine is
        assert killed < 20 * kills, "every kill was at the same place"
        lives += 1
        folder = tmp_path / f"life {lives}"
        while found(folder) != expected and killed < 20 * kills:
            running = [start(run, folder, index, workers) for index in range(workers)]
            for process in running:
                process.join(random.uniform(0, life))
                process.kill()
                process.join()
            killed += sum(process.exitcode == -signal.SIGKILL for process in running)
            seen.add(len(finished_chunks(folder)))
        finish(run, folder)
        assert found(folder) == expected


@pytest.fixture(scope="module")
def broken_off(server, tmp_path_factory):
    """(the folder of a run that broke off after half of its chunks, that of an undisturbed one)."""
    folder, undisturbed = (tmp_path_factory.mktemp(name) for name in ("broken", "undisturbed"))
    finish(numbers, undisturbed)

    def breaks_off(chunk):
        return chunk_of_numbers(chunk) if chunk < CHUNKS // 2 else 1 / 0

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(paths, "RESULTS", folder)
        record_of_numbers(breaks_off).finish()
    return folder, undisturbed


def truncated(content, place):
    return content[:place]


def with_a_wrong_byte(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def with_its_end_lost(content, place):
    """The file has its length, but a power cut left zeros where the rest was to go."""
    return content[:place].ljust(len(content), b"\0")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    damage=st.sampled_from([truncated, with_a_wrong_byte, with_its_end_lost]),
    chunk=st.integers(0, CHUNKS // 2 - 1),
    place=st.floats(0, 1, exclude_max=True),
)
def test_a_damaged_chunk_is_made_again(tmp_path_factory, broken_off, damage, chunk, place):
    broken, undisturbed = broken_off
    folder, made = tmp_path_factory.mktemp("damaged"), []
    shutil.copytree(broken, folder, dirs_exist_ok=True)
    file = finished_chunks(folder)[chunk]
    content = file.read_bytes()
    damaged = damage(content, int(place * len(content)))
    assume(damaged != content)  # the end may have been zeros
    file.write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RESULTS", folder)
        record_of_numbers(lambda chunk: made.append(chunk) or chunk_of_numbers(chunk)).finish()
    assert sorted(made) == sorted({chunk} | set(range(CHUNKS // 2, CHUNKS)))
    assert found(folder) == found(undisturbed)


def on_a_full_disk(folder, room):
    """No file may grow beyond `room` bytes; then the limit is lifted, and the same process goes on."""
    paths.RESULTS = folder
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    with pytest.raises(OSError) as error:
        record_of_numbers().finish()
    assert error.value.errno == errno.EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    whole, made = len(finished_chunks(folder)), []
    (folder / "stopped at").write_text(str(whole))
    assert not list(folder.glob("*/.*")), "half a file was left behind"
    record_of_numbers(lambda chunk: made.append(chunk) or chunk_of_numbers(chunk)).finish()
    assert made == list(range(whole, CHUNKS)), "what was whole was lost"


def test_a_run_goes_on_after_the_disk_was_full(tmp_path):
    """Wherever the disk fills up: at the first chunk, at a later one, or at the record's own files."""
    numbers_of = tmp_path / "undisturbed"
    finish(numbers, numbers_of)
    places = set()
    for room in (500, 4000, 10_000):
        folder = tmp_path / str(room)
        folder.mkdir()
        finish(on_a_full_disk, folder, room)
        places.add(int((folder / "stopped at").read_text()))
        assert found(folder) == found(numbers_of)
    assert len(places) == 3 and {0, CHUNKS} < places


def test_threads_that_write_one_file_at_once_leave_one_of_theirs(tmp_path):
    """Each has a file of its own until it is whole; one that cannot write leaves nothing."""
    path, together, errors = tmp_path / "file", threading.Barrier(4), []

    def write(text, temporary):
        temporary.write_text(text)
        together.wait(10)
        if text == "3":
            raise OSError(errno.ENOSPC, "No space left on device")

    def run(index):
        try:
            write_atomically(path, partial(write, str(index)))
        except OSError as error:
            errors.append((index, error.errno))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert errors == [(3, errno.ENOSPC)] and path.read_text() in "012"
    assert list(tmp_path.iterdir()) == [path]


def beside_another(folder, said):
    """`numbers`, slowly, with a line for every chunk that is made here."""

    def slow(chunk):
        time.sleep(0.05)
        print(f"made {chunk}", flush=True)
        return chunk_of_numbers(chunk)

    paths.RESULTS = folder
    with said.open("w") as file, redirect_stdout(file):
        record_of_numbers(slow).finish()


def test_two_runs_that_know_nothing_of_each_other_make_a_record_once(tmp_path):
    said = [tmp_path / "first", tmp_path / "second"]
    both = [start(beside_another, tmp_path / "results", file) for file in said]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    lines = [line for file in said for line in file.read_text().splitlines()]
    made = sorted(line for line in lines if line.startswith("made"))
    assert made == sorted(f"made {chunk}" for chunk in range(CHUNKS))
    finish(numbers, tmp_path / "alone")
    assert found(tmp_path / "results") == found(tmp_path / "alone")


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "results"


def below_proc(tmp_path):
    """A folder of the kernel's: it is there, and root may not write to it either."""
    return Path("/proc/self") if Path("/proc/self").exists() else pytest.skip("no /proc")


def without_permission(tmp_path):
    """Permission bits bind everyone but root."""
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    (tmp_path / "results").mkdir(mode=0o555)
    return tmp_path / "results"


@pytest.mark.parametrize("place", [below_a_file, below_proc, without_permission])
def test_a_results_folder_that_cannot_be_written_ends_the_run_before_its_work(tmp_path, monkeypatch, place):
    monkeypatch.setattr(paths, "RESULTS", place(tmp_path))
    monkeypatch.setattr(Attack, "__call__", lambda *_, **__: pytest.fail("it had begun"))
    with pytest.raises(OSError, match=str(paths.RESULTS / "digits")):
        Evaluation(Config(), verbose=False).columns(["coup"])


# Networks and images that are not what they should be.

SETTINGS = {"guidance_weight": 1.0, "t_star": 0.1, "n_steps": 3, "gradient": "exact"}


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", "test").first(3).x


def networks():
    """(score, classifier) of the digits."""
    return NoiseScore(load_network("digits", "score")), load_network("digits", "cnn-small")


def of_time(value, since):
    """What spoils a score network for all times t ≤ since."""

    def hook(network, inputs, answer):
        _, t = inputs
        return torch.where(t.reshape(-1, 1, 1, 1) <= since, value, answer)

    return hook


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_from_the_score_are_reported_with_their_step(digits, value, gradient):
    """The fifth of ten steps starts at t = 0.06. Infinity would otherwise be clamped to a black image."""
    score, classifier = networks()
    score.network.register_forward_hook(of_time(value, 0.065))
    message = r"from ([a-z.]+\.)?network \(NoiseNet\) in step 4 of 10, t = 0\.06"
    for defence in (
        coup(classifier, score, n_steps=10, gradient=gradient),
        reverse_only(classifier, score, n_steps=10, gradient=gradient),
    ):
        with pytest.raises(FloatingPointError, match=message):
            defence(digits.clone().requires_grad_())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_the_last_step_are_not_clamped_away(digits, value):
    score, classifier = networks()
    score.network.register_forward_hook(of_time(value, 0.015))
    with pytest.raises(FloatingPointError, match=r"in step 9 of 10"):
        reverse_only(classifier, score, n_steps=10)(digits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_from_the_classifier_are_reported(digits, value):
    """As the guide in the first step, or where it decides."""
    score, classifier = networks()
    classifier.register_forward_hook(lambda network, inputs, logits: logits * value)
    with pytest.raises(FloatingPointError, match=r"from classifier \(PatchCNN\) in step 0 of 4, t = 0\.1$"):
        coup(classifier, score, n_steps=4)(digits)
    with pytest.raises(FloatingPointError, match=r"^NaN or infinity from the classifier$"):
        reverse_only(classifier, score, n_steps=4)(digits)


def test_nan_from_a_derivative_is_told_from_that_of_an_output(digits):
    """√ of what is zero everywhere: finite logits, an infinite slope."""
    score, classifier = networks()
    classifier.register_forward_hook(lambda network, inputs, logits: logits + (0 * inputs[0]).sqrt().sum())
    with pytest.raises(FloatingPointError, match=r"from score \(Guided\) in step 0 of 4"):
        coup(classifier, score, n_steps=4)(digits)


def test_a_fault_that_does_not_come_again_is_reported_too(digits):
    score, classifier = networks()
    calls = iter(range(100))
    score.network.register_forward_hook(lambda *hooked: hooked[2] / (next(calls) != 2))
    with pytest.raises(FloatingPointError, match="did not when it was walked once more"):
        reverse_only(classifier, score, n_steps=4)(digits)


@pytest.mark.parametrize("name", MAXIMISERS)
def test_nan_in_likelihood_maximisation_is_not_the_classifiers(digits, name):
    score, classifier = networks()
    score.network.register_forward_hook(lambda network, inputs, answer: answer * torch.nan)
    defence = build(PURIFIERS[name], classifier, score, classifier, **SETTINGS)
    with pytest.raises(FloatingPointError, match="from the purifier"):
        defence(digits)


@pytest.mark.parametrize("name", [name for name in DEFENCES if name != "none"])
def test_a_batch_of_one_is_answered_as_in_any_other_and_has_a_gradient(digits, name):
    score, classifier = networks()
    defence = build(PURIFIERS[name], classifier, score, classifier, **SETTINGS)
    alone, seeds = digits[1:2].clone().requires_grad_(), torch.arange(3)
    logits = defence(alone, seeds=seeds[1:2])
    torch.testing.assert_close(logits, defence(digits, seeds=seeds)[1:2], rtol=1e-3, atol=1e-3)
    (slope,) = torch.autograd.grad(logits.max(), alone)
    assert slope.isfinite().all() and slope.abs().sum() > 0


@pytest.mark.parametrize("build", [coup, reverse_only])
def test_grey_images_are_refused_by_a_colour_model(build):
    """Broadcast, they would be coloured without a word."""
    score = NoiseScore(zoo.small_ddpmpp(), time_scale=DISCRETE_LEVELS)
    defence = build(zoo.small_wrn(), score, n_steps=2)
    with pytest.raises((ValueError, RuntimeError), match=r"\(B, 3, 32, 32\).* got \(2, 1, 32|to have 3 chan"):
        defence(torch.rand(2, 1, 32, 32))
    assert defence(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: 255 * x, r"values in \[0, 1\]; got 0 to 255"),
        (lambda x: 2 * x - 1, r"values in \[0, 1\]; got -1 to 1"),
        (lambda x: x / 0, r"values in \[0, 1\]; got NaN"),
        (lambda x: x[0], r"at least one image, \(B, C, H, W\).*; got shape \(1, 8, 8\)"),
        (lambda x: x[:0], r"at least one image, .*; got shape \(0, 1, 8, 8\)"),
        (lambda x: (255 * x).byte(), r"in floating point; got shape \(3, 1, 8, 8\), torch\.uint8"),
        (lambda x: 0.3 * (2 * x - 1), r"values in \[0, 1\]; got -0\.3 to 0\.3"),
        (lambda x: x.numpy(), r"at least one image, .*; got ndarray"),
        (lambda x: x.half(), r"torch\.float32 like the classifier's weights; got torch\.float16"),
        (lambda x: x.double(), r"torch\.float32 like the classifier's weights; got torch\.float64"),
    ],
)
@pytest.mark.parametrize("name", ["diffpure", "coup", "coup-averaged", "likelihood"])
def test_what_is_no_image_is_refused(digits, name, spoil, message):
    score, classifier = networks()
    defence = build(PURIFIERS[name], classifier, score, classifier, **SETTINGS)
    with pytest.raises(ValueError, match=f"^x: expected .*{message}"):
        defence(spoil(digits))


def test_images_in_float64_are_answered_by_networks_in_float64(digits):
    """To the digits that float32 has."""
    score, classifier = networks()
    seeds = torch.arange(3)
    single = coup(classifier, score, n_steps=3)(digits, seeds=seeds)
    double = coup(classifier.double(), score.double(), n_steps=3)(digits.double(), seeds=seeds)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-3)


def in_train_mode(images):
    """A classifier that answers differently while it is trained."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    for _ in range(3):
        network(images)
    return network.train()


@pytest.mark.parametrize("build", [coup, reverse_only])
def test_a_classifier_in_train_mode_is_put_into_eval_mode(build):
    score, _, x = small_problem()
    classifier, seeds = in_train_mode(x), torch.arange(5)
    defence = build(classifier, score, n_steps=3)
    assert not any(module.training for module in defence.modules())
    state = {key: value.clone() for key, value in classifier.state_dict().items()}
    assert torch.equal(defence(x, seeds=seeds), defence(x, seeds=seeds))
    assert all(torch.equal(value, state[key]) for key, value in classifier.state_dict().items())


@pytest.mark.parametrize(
    "part", ["classifier", "classifier.2", "purifier.score.score", "purifier.score.score.norm"]
)
def test_what_is_put_back_into_train_mode_is_found_and_named(part):
    """Its batch statistics would drift, and answers with them."""
    score, _, x = small_problem()
    score.norm = nn.BatchNorm2d(1)
    defence = coup(in_train_mode(x), score, n_steps=3)
    defence.get_submodule(part).train()
    with pytest.raises(ValueError, match=rf"^{part.removeprefix('purifier.')}: is in train mode"):
        defence(x)
    defence.eval()
    assert defence(x).shape == (5, 3)
    score.norm.train()
    with pytest.raises(ValueError, match=r"^score\..*: is in train mode"):
        defence.purifier.trajectory(x, lambda i, t, state: None)


@pytest.mark.parametrize("who", ["classifier", "score"])
@pytest.mark.parametrize("build", [coup, reverse_only])
def test_a_network_on_another_device_is_named(digits, build, who):
    score, classifier = networks()
    defence = build(classifier, score, n_steps=2)
    {"classifier": classifier, "score": score}[who].to("meta")
    with pytest.raises(ValueError, match=rf"^{who}: expected on cpu, where the images are; it is on meta"):
        defence(digits)


# Files that run code; checkpoints that others published are in test_published.py.


def test_a_pickle_among_our_own_weights_does_not_run(tmp_path):
    """Even one that is listed with its SHA-256: safetensors has no code to run."""
    proof, folder = tmp_path / "executed", tmp_path / "weights"
    checkpoints.save_network(load_network("digits", "score"), "digits", "score", folder=folder)
    path = checkpoints.weights_path("digits", "score", folder)
    torch.save({"weight": Hostile(proof)}, path)
    with pytest.raises(checkpoints.CheckpointError, match="expected SHA-256"):
        load_network("digits", "score", folder=folder)
    checkpoints.record_sum("digits/score.safetensors", zoo.published.file_digest(path), folder)
    with pytest.raises(Exception, match="header too large"):
        load_network("digits", "score", folder=folder)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["wrn-70-16-dropout", "Standard", "ddpmpp-deep"])
def test_a_pickle_in_place_of_a_published_network_does_not_run(tmp_path, monkeypatch, name):
    """By the way that a run takes."""
    proof = tmp_path / "executed"
    monkeypatch.setenv("COUP_MODELS", str(tmp_path))
    monkeypatch.setattr(zoo, "is_smoke", lambda: False)
    listed = "cifar10/Linf/Standard" if name == "Standard" else name
    file = zoo.published.locate(listed)
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps({"state_dict": Hostile(proof)}, protocol=2))
    load = zoo.load_score if name in zoo.SCORES["cifar10"] else zoo.load_classifier
    with pytest.raises(checkpoints.CheckpointError):
        load("cifar10", name)
    assert not proof.exists()


def test_a_pickle_in_a_records_arrays_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    record_of_numbers().finish()
    (arrays,) = tmp_path.glob("*/*.npz")
    np.savez(arrays, x=np.array([Hostile(tmp_path / "executed")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        record_of_numbers().finish()
    assert not (tmp_path / "executed").exists()


def test_a_copied_notebook_runs_on_any_path_and_says_when_its_kernel_is_not_there(tmp_path):
    """Saved by an editor under the name of its own environment, on a path with spaces, run from elsewhere."""
    copied = tmp_path / "my notebooks" / "00 toy (copy).ipynb"
    copied.parent.mkdir()
    notebook = json.loads((ROOT / "notebooks" / "00_toy_analysis.ipynb").read_text())
    notebook["metadata"]["kernelspec"]["name"] = "my-env"
    copied.write_text(json.dumps(notebook))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    outputs = {"COUP_RESULTS": str(tmp_path / "re sults"), "COUP_FIGURES": str(tmp_path / "fig ures")}
    with closing(Papermill(tmp_path / "log", folder, COUP_SMOKE="1", **outputs)) as papermill:
        with pytest.raises(AssertionError, match="No such kernel named my-env"):
            papermill(f"'{copied}' 'out put.ipynb'")
        assert not (tmp_path / "re sults").exists()
        (folder / "out put.ipynb").unlink(missing_ok=True)
        papermill(f"'{copied}' 'out put.ipynb' -k python3")
    assert [path.name for path in folder.iterdir()] == ["out put.ipynb"]
    assert (tmp_path / "fig ures" / "toy" / "fig3b.png").exists()
    assert list((tmp_path / "re sults").glob("*/*.json"))
