"""Published files are fetched whole, verified before use, and read without running their code."""

import argparse
import errno
import hashlib
import http.server
import io
import os
import pickle
import re
import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from coup_lib.networks import checkpoints, download
from coup_lib.networks import published as artefacts
from coup_lib.networks.checkpoints import CheckpointError
from coup_lib.networks.published import ARTEFACTS, Artefact
from coup_lib.paths import model_dir

NAME = "small"
PLACE = "cifar10/classifier/small.pt"
WEIGHTS = {"state_dict": OrderedDict(weight=torch.arange(400_000.0))}  # more than one block of the download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file; `behaviour` and the log of requested ranges lie in the server object."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.knows_ranges else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(rest)
        self.wfile.write(rest[:cut])

    def log_message(self, *arguments):
        pass


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
def server(checkpoint, monkeypatch):
    """A server of the checkpoint on this machine."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.content, server.kind, server.knows_ranges = checkpoint, "application/octet-stream", True
    server.cuts, server.ranges = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def register(monkeypatch):
    """Makes NAME an artefact of the list."""

    def put(source="http://127.0.0.1:9/nobody-listens", **settings):
        settings = {"place": PLACE, "what": "a test network", "licence": "MIT", "size": 10} | settings
        monkeypatch.setitem(ARTEFACTS, settings.pop("name", NAME), Artefact(source=source, **settings))

    return put


@pytest.fixture
def listed(server, register, folder):
    """NAME is listed with the local server as its source, its SHA-256 not known."""
    register(f"http://127.0.0.1:{server.server_port}/small.pt")
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
    return artefacts.load(name, lambda content: content)


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


def test_a_download_is_whole_recorded_and_used_again(listed, server, folder, checkpoint):
    torch.testing.assert_close(used(NAME), WEIGHTS)
    digest = hashlib.sha256(checkpoint).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  {PLACE}\n"
    assert artefacts.digest(NAME) == digest == artefacts.file_digest(listed)
    assert artefacts.fetch(NAME) == artefacts.path(NAME) == listed
    assert server.ranges == [None]
    assert [file.name for file in listed.parent.iterdir() if not file.name.endswith(".lock")] == [listed.name]


def test_a_broken_download_goes_on_where_it_broke(listed, server, checkpoint):
    server.cuts = [1000, 500_000]
    assert artefacts.fetch(NAME).read_bytes() == checkpoint
    assert server.ranges == [None, "bytes=1000-", "bytes=501000-"]


def test_a_connection_that_breaks_often_still_ends_when_each_time_brings_something(
    listed, server, checkpoint
):
    server.cuts = [1000] * 3 * download.RETRIES
    assert artefacts.fetch(NAME).read_bytes() == checkpoint


def test_a_log_gets_the_progress_now_and_then(listed, monkeypatch, capsys):
    monkeypatch.setattr(download, "BLOCK", 100)
    artefacts.fetch(NAME)
    shown = capsys.readouterr().err.split("\r")
    assert "small: 100%" in shown[-1] and len(shown) < 5


def test_the_next_run_goes_on_too(listed, server, checkpoint):
    part = put(listed.with_name("small.pt.part"), checkpoint[:700])
    assert artefacts.fetch(NAME).read_bytes() == checkpoint
    assert server.ranges == ["bytes=700-"]
    assert not part.exists()


def test_a_server_that_knows_no_ranges_starts_anew(listed, server, checkpoint):
    server.knows_ranges = False
    put(listed.with_name("small.pt.part"), b"x" * 700)
    assert artefacts.fetch(NAME).read_bytes() == checkpoint
    assert server.ranges == ["bytes=700-"]


@pytest.mark.parametrize(("more", "requests"), [(0, 1), (1, 2)])
def test_a_part_with_all_bytes_is_taken_and_one_with_more_is_not(listed, server, checkpoint, more, requests):
    put(listed.with_name("small.pt.part"), checkpoint + b"x" * more)
    assert artefacts.fetch(NAME).read_bytes() == checkpoint
    assert len(server.ranges) == requests


def test_a_server_that_keeps_breaking_off_ends_in_an_error_that_keeps_the_bytes(listed, server):
    server.knows_ranges, server.cuts = False, [900] * 10
    with pytest.raises(ConnectionError, match=r"small.*broke off; 900 bytes are here.*goes on"):
        artefacts.fetch(NAME)
    assert listed.with_name("small.pt.part").stat().st_size == 900
    assert not listed.exists()


def test_a_web_page_instead_of_the_file_leaves_what_came_before(listed, server, checkpoint):
    part = put(listed.with_name("small.pt.part"), checkpoint[:700])
    server.content, server.kind, server.knows_ranges = b"<html>Quota exceeded</html>", "text/html; x=y", False
    with pytest.raises(
        CheckpointError, match=rf"small: .* sent a web page\n.*\n.*{listed}\n.*a test network"
    ):
        artefacts.fetch(NAME)
    assert part.read_bytes() == checkpoint[:700] and not listed.exists()


def test_a_web_page_that_claims_to_be_a_file_is_thrown_away(listed, server):
    server.content = b"\n <!DOCTYPE html><title>Virus scan warning</title>"
    with pytest.raises(CheckpointError, match="sent a web page"):
        artefacts.fetch(NAME)
    assert not listed.exists() and not listed.with_name("small.pt.part").exists()


def test_a_download_with_another_hash_is_refused_kept_and_not_fetched_again(
    server, register, folder, checkpoint
):
    register(f"http://127.0.0.1:{server.server_port}/", sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"small.pt.*expected {'0' * 64}.*\nRemove it and get"):
            artefacts.fetch(NAME)
    assert (folder / PLACE).read_bytes() == checkpoint and len(server.ranges) == 1


def test_a_file_that_does_not_fit_is_refused_with_its_source_and_leaves_no_trace(listed, folder, server):
    """The right one, put in its place, is taken then, and its SHA-256 is what holds."""

    def put_into_network(content):
        return checkpoints.load_state(torch.nn.Linear(2, 1), content, NAME)

    with pytest.raises(CheckpointError) as caught:
        artefacts.load(NAME, put_into_network)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{listed}: {NAME} does not fit Linear: 1 missing, the first bias: ")
    assert ARTEFACTS[NAME].source in str(caught.value)
    assert listed.exists() and not (folder / "SHA256SUMS").exists()
    torch.save(torch.nn.Linear(2, 1).state_dict(), listed)
    assert artefacts.digest(NAME) == artefacts.file_digest(listed) and not artefacts.sha256(NAME)
    artefacts.load(NAME, put_into_network)
    assert artefacts.sha256(NAME) == artefacts.file_digest(listed) and len(server.ranges) == 1


def test_a_full_disk_keeps_what_has_come(listed, server, checkpoint, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.os, "fsync", refuse)
        with pytest.raises(OSError, match=rf"could not download small: .*No space left.*\n.*\n.*{listed}"):
            artefacts.fetch(NAME)
    assert artefacts.fetch(NAME).read_bytes() == checkpoint
    assert server.ranges == [None, f"bytes={len(checkpoint)}-"]


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_fetched(listed, server, folder):
    folder.write_text("no folder")
    with pytest.raises(OSError, match=rf"could not download small: .*{folder}.*\n.*set COUP_MODELS"):
        artefacts.fetch(NAME)
    assert not server.ranges


def test_the_digest_of_a_file_that_is_not_here_is_that_of_the_download(listed, checkpoint):
    assert artefacts.digest(NAME) == hashlib.sha256(checkpoint).hexdigest()


def test_two_at_once_fetch_it_once(listed, server):
    threads = [threading.Thread(target=artefacts.fetch, args=[NAME]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.ranges == [None]


def test_a_file_placed_by_hand_is_used_and_nothing_is_fetched(listed, server, checkpoint):
    put(listed, checkpoint)
    torch.testing.assert_close(used(NAME), WEIGHTS)
    assert server.ranges == []


def test_robustbench_finds_its_models_in_the_same_place(folder, checkpoint):
    file = put(folder / "cifar10" / "Linf" / "Standard.pt", checkpoint)
    assert artefacts.path("cifar10/Linf/Standard") == file


def test_a_file_that_changed_since_its_first_use_is_refused(listed, folder, checkpoint):
    put(listed, checkpoint)
    used(NAME)
    torch.save(WEIGHTS | {"epoch": 1}, listed)
    digests = (hashlib.sha256(listed.read_bytes()).hexdigest(), hashlib.sha256(checkpoint).hexdigest())
    why = rf"{digests[0]}, expected {digests[1]} as at its first use; .* out of {folder / 'SHA256SUMS'}"
    with pytest.raises(CheckpointError, match=why):
        artefacts.path(NAME)
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
    threads = [threading.Thread(target=record, args=[str(index)]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
        artefacts.path(NAME)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{listed}: ") and problem in first
    assert f"  {listed}" in rest and any(f"from {ARTEFACTS[NAME].source}" in line for line in rest)
    assert "weights_only" not in str(caught.value)
    assert not (folder / "SHA256SUMS").exists()


def test_an_archive_with_a_flipped_bit_is_refused(listed, folder, checkpoint):
    """As a download leaves it that went on with another file's beginning: torch reads it without a word."""
    spoilt = bytearray(checkpoint)
    spoilt[len(spoilt) // 2] ^= 1
    torch.load(put(listed, spoilt), weights_only=True)
    with pytest.raises(CheckpointError, match=rf"{listed}: damaged: the check sum of \S+data/0 in it"):
        used(NAME)
    assert not (folder / "SHA256SUMS").exists()


def test_a_known_size_tells_that_a_file_is_cut_short(folder, register, checkpoint):
    register(sha256=hashlib.sha256(checkpoint).hexdigest(), size=len(checkpoint))
    file = put(folder / PLACE, checkpoint[:-1])
    with pytest.raises(
        CheckpointError, match=rf"cut short, {len(checkpoint) - 1:,} of {len(checkpoint):,} bytes"
    ):
        artefacts.path(NAME)
    file.write_bytes(checkpoint)
    assert artefacts.path(NAME) == file


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


def test_code_in_a_plain_pickle_does_not_run(listed, tmp_path):
    proof = tmp_path / "executed"
    put(listed, pickle.dumps(Hostile(proof), protocol=2))
    with pytest.raises(CheckpointError):
        used(NAME)
    assert not proof.exists()


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
    file = artefacts.path("resnet18")
    assert file.parts[-3:] == ("pyautoattack", "examples", "model_test.pt")
    assert used("resnet18")["conv1.weight"].shape == (64, 3, 3, 3)
    assert artefacts.digest("resnet18") == ARTEFACTS["resnet18"].sha256 == artefacts.file_digest(file)


def test_all_that_is_missing_is_listed_at_once_without_the_network(folder, register, checkpoint):
    names = ["ddpmpp-deep", "wrn-70-16-dropout", "cifar10/Linf/Standard", "resnet18", NAME]
    register()
    put(folder / PLACE, checkpoint)
    with pytest.raises(FileNotFoundError) as caught:
        artefacts.require(names)
    message = str(caught.value)
    for name in names[:3]:
        artefact = ARTEFACTS[name]
        assert all(
            part in message for part in (str(folder / artefact.place), artefact.source, artefact.amount)
        )
    assert "take weights.pt from the folder" in message
    assert message.endswith("python -m coup_lib.networks.published ddpmpp-deep cifar10/Linf/Standard")
    assert "small.pt" not in message and "pyautoattack" not in message
    artefacts.require(["resnet18", NAME])


def test_what_needs_a_missing_file_is_said_where_it_is_told(folder):
    names = ["cifar10/Linf/Standard", "wrn-70-16-dropout"]
    with pytest.raises(FileNotFoundError) as caught:
        artefacts.obtain(names, {"wrn-70-16-dropout": "02_ablation"})
    lines = str(caught.value).splitlines()
    told = zip(names, ("fetched", "by hand"), ("", ", needed by 02_ablation"), strict=True)
    for name, way, needed_by in told:
        artefact = ARTEFACTS[name]
        place = lines.index(f"  {folder / artefact.place}")
        assert lines[place + 1] == f"    {artefact.what} ({artefact.amount}){needed_by}"
        assert lines[place + 2].startswith(f"    {way} from {artefact.source}")


def test_nothing_is_downloaded_before_what_must_come_by_hand_is_there(listed, server):
    with pytest.raises(FileNotFoundError, match=r"(?s)wrn_40_2\.pth.*small\.pt"):
        artefacts.obtain(["wrn-40-2", NAME])
    assert server.ranges == []


def test_offline_the_message_lists_all_that_is_still_missing(folder, register, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    register()
    register(name="other", place="cifar10/L2/other.pt")
    with pytest.raises(FileNotFoundError) as caught:
        artefacts.obtain([NAME, "other", "resnet18"])
    assert "refused" in str(caught.value) and str(caught.value).count("small.pt") == 1
    assert str(folder / PLACE) in str(caught.value) and str(folder / "cifar10/L2/other.pt") in str(
        caught.value
    )


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"artefact: expected one of ddpmpp-deep, .*; got 'ddpm'"):
        used("ddpm")


def test_the_list_is_sound():
    """Places are unique and follow the rule; what can be fetched is served over https."""
    places = [artefact.place for artefact in ARTEFACTS.values()]
    assert len(set(places)) == len(places)
    for name, artefact in ARTEFACTS.items():
        kind = artefact.place.split("/")[1]
        assert re.fullmatch(r"cifar100?/(Linf|L2|score|classifier)/[\w.-]+\.(pt|pth|th)", artefact.place)
        assert kind not in ("Linf", "L2") or artefact.place == f"{name}.pt"
        assert artefact.source.startswith("https://") and artefact.licence and artefact.size > 1e6
        assert artefact.by_hand or artefact.address.startswith(
            ("https://drive.usercontent.google.com/download?id=1", "https://github.com/akamaster/")
        )
        assert not artefact.sha256 or re.fullmatch("[0-9a-f]{64}", artefact.sha256)


def test_the_command_lists_all_and_fetches_what_is_named(listed, checkpoint, capsys):
    artefacts.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if f" {NAME}: " in line] == ["missing"]
    assert all(any(f" {name}: " in line for line in lines) for name in ARTEFACTS)
    artefacts.main([NAME])
    assert capsys.readouterr().out == f"{listed}\n"
    assert listed.read_bytes() == checkpoint
    artefacts.main([])
    assert f"here     {'about 1e-05 MB':>14}  {NAME}: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="take weights"):
        artefacts.main(["wrn-70-16-dropout"])
