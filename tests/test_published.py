"""Published files are fetched whole, verified before use, and read without running their code."""

import argparse
import errno
import hashlib
import importlib.util
import io
import os
import pickle
import re
import sys
import time
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from coup_lib.networks import checkpoints, published
from coup_lib.networks.checkpoints import CheckpointError
from coup_lib.networks.published import ARTEFACTS, Artefact
from coup_lib.paths import model_dir

NAME = "small"
PLACE = "cifar10/classifier/small.pt"
SOURCE = "https://example.org/small.pt"
DRIVE = "https://drive.google.com/file/d/{}/view"
WEIGHTS = {"state_dict": OrderedDict(weight=torch.arange(400_000.0))}


@pytest.fixture
def checkpoint(tmp_path):
    """The bytes of a checkpoint."""
    torch.save(WEIGHTS, tmp_path / "saved.pt")
    return (tmp_path / "saved.pt").read_bytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty model folder."""
    monkeypatch.setenv("COUP_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def fetched(checkpoint, monkeypatch):
    """In place of the network: every download brings the checkpoint; the sources that were asked for."""
    asked = []

    def download(source, file):
        asked.append(source)
        file.write_bytes(checkpoint)

    monkeypatch.setattr(published, "download", download)
    return asked


@pytest.fixture
def register(monkeypatch):
    """Makes NAME an artefact of the list."""

    def put(source=SOURCE, **settings):
        settings = {"place": PLACE, "what": "a test network", "licence": "MIT", "size": 10} | settings
        monkeypatch.setitem(ARTEFACTS, settings.pop("name", NAME), Artefact(source=source, **settings))

    return put


@pytest.fixture
def listed(fetched, register, folder):
    """NAME is listed, its SHA-256 not known."""
    register()
    return folder / PLACE


def put(file: Path, content: bytes) -> Path:
    """Place a file by hand."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def old_format():
    """The bytes of a checkpoint as PyTorch wrote them before 1.6."""
    file = io.BytesIO()
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def used(name):
    """The content of an artefact, taken as it is."""
    return published.load(name, lambda content: content)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"COUP_MODELS": "/m", "TORCH_HOME": "/t", "XDG_CACHE_HOME": "/x"}, "/m"),
        ({"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/x"}, "/t/coup"),
        ({"COUP_MODELS": "", "XDG_CACHE_HOME": "/x"}, "/x/coup"),
        ({}, "/h/.cache/coup"),
        ({"COUP_MODELS": "~/models"}, "/h/models"),
    ],
)
def test_the_environment_says_where_models_lie(variables, expected, monkeypatch):
    for name in ("COUP_MODELS", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | variables).items():
        monkeypatch.setenv(name, value)
    assert model_dir() == Path(expected)


def test_a_download_is_recorded_and_used_again(listed, fetched, folder, checkpoint):
    torch.testing.assert_close(used(NAME), WEIGHTS)
    digest = hashlib.sha256(checkpoint).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  {PLACE}\n"
    assert published.sha256(NAME) == digest == published.file_digest(listed)
    assert published.fetch(NAME) == listed
    assert fetched == [SOURCE]


def test_files_on_drive_are_fetched_by_gdown_and_others_by_torch(tmp_path, monkeypatch):
    asked = []

    def from_drive(*given, **settings):
        asked.append(given)
        Path(given[1]).write_bytes(b"whole")
        return given[1]

    def refuse(*given, **settings):
        raise LookupError("too many users")

    gdown = types.SimpleNamespace(exceptions=types.SimpleNamespace(FileURLRetrievalError=LookupError))
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *given: asked.append(given))
    file, part = tmp_path / "a.pt", tmp_path / ".a.pt.part"
    published.download(SOURCE, file)
    gdown.download = refuse
    with pytest.raises(OSError, match="too many users"):
        published.download(DRIVE.format("1t98-_x"), file)
    gdown.download = lambda *given, **settings: None  # what it does when parts of several attempts are there
    with pytest.raises(OSError, match=r"several .*\.a\.pt\.part\* are there"):
        published.download(DRIVE.format("1t98-_x"), file)
    gdown.download = from_drive
    published.download(DRIVE.format("1t98-_x"), file)
    assert asked == [(SOURCE, str(file)), (DRIVE.format("1t98-_x"), str(part))]
    assert file.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(not importlib.util.find_spec("gdown"), reason="gdown is not installed (an extra)")
def test_gdown_goes_on_with_a_broken_download_and_leaves_other_files_alone(tmp_path, monkeypatch):
    """gdown itself, its requests answered here: first the connection breaks, then the rest comes."""
    import gdown
    import requests

    ranges, answers = [], [b"first ", b"", b"second"]

    class Answer(requests.Response):
        def iter_content(self, chunk_size):
            yield content
            if content == b"first ":
                raise requests.ConnectionError("broken")

    def get(self, url, headers=None, **_):
        nonlocal content
        content = answers.pop(0)
        ranges.append((headers or {}).get("Range"))
        answer = Answer()
        answer.status_code = 200
        answer.headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": 'filename="a.pt"',
        }
        return answer

    content = b""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gdown.download.__globals__["requests"].Session, "get", get)
    file, other = put(tmp_path / "models/a.pt", b""), put(tmp_path / "models/a.pt.old", b"another")
    file.unlink()
    with pytest.raises(OSError, match="broken"):
        published.download(DRIVE.format("1"), file)
    assert not file.exists()
    published.download(DRIVE.format("1"), file)
    assert file.read_bytes() == b"first second" and other.read_bytes() == b"another"
    assert ranges == [None, None, "bytes=6-"]


def test_without_gdown_the_message_says_how_to_get_it(folder, register, monkeypatch):
    register(DRIVE.format("1"))
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ImportError, match=rf"pip install 'coup-lib\[cifar\]', or put it at {folder / PLACE}"):
        published.fetch(NAME)


def test_a_web_page_instead_of_the_file_is_refused_with_the_source(listed, monkeypatch):
    page = b"\n <!DOCTYPE html><title>Virus scan warning</title>"
    monkeypatch.setattr(published, "download", lambda source, file: file.write_bytes(page))
    with pytest.raises(CheckpointError, match=rf"{listed}: this is a web page.*\n.*\n.*\n.*\n.*{SOURCE}"):
        published.fetch(NAME)


def test_a_download_with_another_hash_is_refused_kept_and_not_fetched_again(
    fetched, register, folder, checkpoint
):
    register(sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"small.pt.*expected {'0' * 64}.*\nRemove it and get"):
            published.fetch(NAME)
    assert (folder / PLACE).read_bytes() == checkpoint and len(fetched) == 1


def test_a_file_that_does_not_fit_is_refused_with_its_source_and_leaves_no_trace(listed, folder, fetched):
    """The right one, put in its place, is taken then, and its SHA-256 is what holds."""

    def put_into_network(content):
        return checkpoints.load_state(torch.nn.Linear(2, 1), content, NAME)

    with pytest.raises(CheckpointError) as caught:
        published.load(NAME, put_into_network)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{listed}: {NAME} does not fit Linear at 2 names, such as weight: ")
    assert ARTEFACTS[NAME].source in str(caught.value)
    assert listed.exists() and not (folder / "SHA256SUMS").exists()
    torch.save(torch.nn.Linear(2, 1).state_dict(), listed)
    assert published.fetch(NAME) == listed and not published.sha256(NAME)
    published.load(NAME, put_into_network)
    assert published.sha256(NAME) == published.file_digest(listed) and len(fetched) == 1


def test_a_download_that_fails_is_told_with_what_to_do(listed, monkeypatch):
    def refuse(source, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(published, "download", refuse)
    with pytest.raises(OSError, match=rf"could not download small: .*No space left.*\n.*\n.*{listed}"):
        published.fetch(NAME)


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_fetched(listed, fetched, folder):
    folder.write_text("no folder")
    with pytest.raises(OSError, match=rf"could not download small: .*{folder}.*\n.*set COUP_MODELS"):
        published.fetch(NAME)
    assert not fetched


def test_two_at_once_fetch_it_once(listed, fetched):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(published.fetch, [NAME] * 4))
    assert listed.exists() and fetched == [SOURCE]


def test_a_file_placed_by_hand_is_used_and_nothing_is_fetched(listed, fetched, checkpoint):
    put(listed, checkpoint)
    torch.testing.assert_close(used(NAME), WEIGHTS)
    assert not fetched


def test_a_file_that_changed_since_its_first_use_is_refused(listed, folder, checkpoint):
    put(listed, checkpoint)
    used(NAME)
    torch.save(WEIGHTS | {"epoch": 1}, listed)
    digests = (hashlib.sha256(listed.read_bytes()).hexdigest(), hashlib.sha256(checkpoint).hexdigest())
    why = rf"{digests[0]}, expected {digests[1]} as at its first use; .* out of {folder / 'SHA256SUMS'}"
    with pytest.raises(CheckpointError, match=why):
        published.fetch(NAME)
    (folder / "SHA256SUMS").unlink()
    assert used(NAME)["epoch"] == 1


def test_the_first_use_of_a_second_file_keeps_the_line_of_the_first(listed, folder, register, checkpoint):
    register(name="other", place="cifar10/L2/other.pt")
    put(listed, checkpoint)
    put(folder / "cifar10/L2/other.pt", checkpoint)
    used(NAME)
    used("other")
    assert [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()] == [
        "cifar10/L2/other.pt",
        PLACE,
    ]


def test_lines_that_others_record_at_the_same_time_stay(folder, monkeypatch):
    folder.mkdir()
    read = checkpoints.read_sums

    def slowly(place):
        found = read(place)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(checkpoints, "read_sums", slowly)
    record = partial(checkpoints.record_sum, digest="0" * 64, folder=folder)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, "0123"))
    assert sorted(read(folder)) == ["0", "1", "2", "3"]


def test_a_folder_that_cannot_be_written_is_used_with_a_warning(listed, monkeypatch, checkpoint):
    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(checkpoints, "write_atomically", refuse)
    put(listed, checkpoint)
    with pytest.warns(UserWarning, match="cannot record the SHA-256 of small"):
        used(NAME)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda content: b"<!DOCTYPE html>" + content, "a web page"),
        (lambda content: content[: len(content) // 2], "cut short, 8"),
        (
            lambda content: old_format()[:100_000],
            "cut short, 100,000 bytes where about 1e-05 MB are expected",
        ),
        (lambda content: b"", "cut short, 0 bytes"),
        (lambda content: pickle.dumps({"state_dict": [1.0]}, protocol=2), "no archive of tensors"),
        (lambda content: b"\x00" * 100, "no archive of tensors"),
    ],
    ids=["page", "half", "half an old one", "empty", "pickle", "zeros"],
)
def test_what_is_no_checkpoint_is_refused_with_what_to_do(listed, folder, checkpoint, spoil, problem):
    put(listed, spoil(checkpoint))
    with pytest.raises(CheckpointError) as caught:
        published.fetch(NAME)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{listed}: ") and problem in first
    assert f"  {listed}" in rest and any(f"from {ARTEFACTS[NAME].source}" in line for line in rest)
    assert "weights_only" not in str(caught.value)
    assert not (folder / "SHA256SUMS").exists()


def test_an_archive_with_a_flipped_bit_is_refused(listed, folder, checkpoint):
    """A download that went on with another file's beginning leaves one: torch reads it without a word."""
    spoilt = bytearray(checkpoint)
    spoilt[len(spoilt) // 2] ^= 1
    torch.load(put(listed, spoilt), weights_only=True)
    with pytest.raises(CheckpointError, match=rf"{listed}: damaged: the check sum of \S+data/0 in it"):
        used(NAME)
    assert not (folder / "SHA256SUMS").exists()


def test_a_list_of_tensors_is_no_checkpoint(listed):
    torch.save([torch.ones(2)], put(listed, b""))
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, got a list"):
        used(NAME)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_checkpoint_does_not_run(listed, folder, tmp_path, new_format):
    proof = tmp_path / "executed"
    content = WEIGHTS | {"epoch": Hostile(proof)}
    torch.save(content, put(listed, b""), _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"it asks for (posix|nt)\.mkdir.*nothing of it was run"):
        used(NAME)
    assert not proof.exists() and not (folder / "SHA256SUMS").exists()
    torch.load(listed, weights_only=False)
    assert proof.exists()  # it would have


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older PyTorch reads tensors and plain values only")
@pytest.mark.parametrize("new_format", [True, False])
def test_old_checkpoints_with_options_and_numpy_scalars_are_read(listed, new_format):
    extras = {"opt": argparse.Namespace(lr=0.1, depth=40), "best": np.float64(0.75), "epoch": np.int64(3)}
    torch.save(WEIGHTS | extras, put(listed, b""), _use_new_zipfile_serialization=new_format)
    loaded = used(NAME)
    assert {key: loaded[key] for key in extras} == extras
    torch.testing.assert_close(loaded["state_dict"], WEIGHTS["state_dict"])


@pytest.mark.skipif(torch.__version__ < "2.6", reason="older PyTorch reads tensors and plain values only")
def test_a_numpy_scalar_under_the_name_of_numpy_1_is_read(listed):
    torch.save(WEIGHTS | {"best": np.float64(0.75)}, put(listed, b""), _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    content = listed.read_bytes()
    assert new in content or old in content
    listed.write_bytes(content.replace(new, old))
    assert used(NAME)["best"] == 0.75


def test_the_package_that_ships_a_network_is_found_and_verified():
    file = published.fetch("resnet18")
    assert file.parts[-3:] == ("pyautoattack", "examples", "model_test.pt")
    assert used("resnet18")["conv1.weight"].shape == (64, 3, 3, 3)
    assert published.sha256("resnet18") == ARTEFACTS["resnet18"].sha256 == published.file_digest(file)


def test_all_that_is_missing_is_listed_at_once_before_anything_is_fetched(
    listed, folder, fetched, checkpoint
):
    names = ["ddpmpp-deep", "wrn-70-16-dropout", "cifar10/Linf/Standard", "resnet18", NAME]
    put(listed, checkpoint)
    with pytest.raises(FileNotFoundError) as caught:
        published.obtain(names)
    message = str(caught.value)
    for name, way in zip(names[:3], ("fetched", "by hand", "fetched"), strict=True):
        artefact = ARTEFACTS[name]
        assert f"  {folder / artefact.place}\n    {artefact.what} ({artefact.amount})\n" in message
        assert f"    {way} from {artefact.source}" in message
    assert "take weights.pt from the folder" in message
    assert message.endswith("coup fetch ddpmpp-deep cifar10/Linf/Standard")
    assert "small.pt" not in message and "pyautoattack" not in message
    assert not fetched
    assert list(published.obtain(["resnet18", NAME])) == ["resnet18", NAME]


def test_offline_the_message_lists_all_that_is_still_missing(folder, register, monkeypatch):
    def refuse(source, file):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(published, "download", refuse)
    register()
    register(name="other", place="cifar10/L2/other.pt")
    with pytest.raises(OSError, match="could not download small: nobody answers") as caught:
        published.obtain([NAME, "other", "resnet18"])
    for place in (PLACE, "cifar10/L2/other.pt"):
        assert str(caught.value).count(str(folder / place)) == 1


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"artefact: expected one of ddpmpp-deep, .*; got 'ddpm'"):
        used("ddpm")
    with pytest.raises(ValueError, match=r"got 'Standard'; did you mean cifar10/Linf/Standard\?$"):
        used("Standard")
    name = "Wang2023Better_WRN-28-10"
    all_of_it = f"cifar10/Linf/{name} or cifar10/L2/{name} or cifar100/Linf/{name}"
    with pytest.raises(ValueError, match=rf"did you mean {all_of_it}\?$"):
        used(name)


def test_the_list_is_sound():
    """Places are unique and follow the rule; what can be fetched is served over https."""
    places = [artefact.place for artefact in ARTEFACTS.values()]
    assert len(set(places)) == len(places)
    for name, artefact in ARTEFACTS.items():
        kind = artefact.place.split("/")[1]
        assert re.fullmatch(r"cifar100?/(Linf|L2|score|classifier)/[\w.-]+\.(pt|pth|th)", artefact.place)
        assert kind not in ("Linf", "L2") or artefact.place == f"{name}.pt"
        assert artefact.source.startswith("https://") and artefact.licence and artefact.size > 1e6
        assert artefact.by_hand or artefact.source.startswith(
            ("https://drive.google.com/file/d/1", "https://github.com/akamaster/")
        )
        assert not artefact.sha256 or re.fullmatch("[0-9a-f]{64}", artefact.sha256)


def test_the_command_lists_all_and_fetches_what_is_named(listed, checkpoint, capsys):
    published.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if f" {NAME}: " in line] == ["missing"]
    assert all(any(f" {name}: " in line for line in lines) for name in ARTEFACTS)
    published.main([NAME])
    assert capsys.readouterr().out == f"{listed}\n"
    assert listed.read_bytes() == checkpoint
    published.main([])
    assert f"here     {'about 1e-05 MB':>14}  {NAME}: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="take weights"):
        published.main(["wrn-70-16-dropout"])
