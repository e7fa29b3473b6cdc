"""The command `coup`: what its sub-commands say of themselves, an audit, and every mistake in one line."""

import re
import sys

import numpy as np
import pytest

from coup_lib import cli, paths
from coup_lib.data import load_split

DEFENCES = """
from torch import nn

from coup_lib import Defence, coup, load_classifier, load_score

classifier = load_classifier("digits", "cnn-small")
pair = nn.Identity(), classifier
more = {"plain": classifier, "with another gradient": Defence(classifier, {"bpda": pair})}
number = 3


def build():
    return coup(classifier, load_score("digits", "score"), 1.0, t_star=0.1, n_steps=2)


def several():
    return more


def of(size):
    return classifier


def broken():
    raise ValueError("of its own")
"""
THREAT = ("--eps", "0.15", "--budget", "smoke")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with defences.py and images.npz in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "defences.py").write_text(DEFENCES)
    images = load_split("digits", "test").first(8)
    np.savez(tmp_path / "images.npz", x=images.x, y=images.y)
    yield tmp_path
    for name in ("defences", "neighbour"):  # each test has its own
        sys.modules.pop(name, None)


def complaint(capsys, *words):
    """The one line that a command ends with, at exit code 2 and before any attack."""
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    out, error = capsys.readouterr()
    assert (caught.value.code, out, error.count("\n")) == (2, "", 1), error
    return error


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_gives_every_default_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*[name] * bool(name), "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and told.startswith(f"usage: coup {name}".strip())
    assert f"coup {name or 'audit'} " in told[told.lower().index("example") :]
    if name in ("audit", "estimate", "train"):
        listed = told[told.index("--help") :]
        assert listed.count("(default: ") >= 7


def test_a_module_and_a_file_are_audited_side_by_side(folder, capsys):
    cli.main(["audit", "coup=defences:build", "defences.py:pair", "--data", "images.npz", *THREAT])
    out = capsys.readouterr().out
    page = folder / "build" / "audit" / "audit.html"
    assert out.endswith(f"\n{page}\n") and page.is_file()
    for name in ("coup", "defences.pair"):
        assert f"\n{name}: robust accuracy at most " in out and f"\n{name} " in out
    assert "eps = 0.15, n = 8" in out


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("defences:build", ["defences.build"]),
        ("./defences.py:classifier", ["defences.classifier"]),
        ("mine=defences:pair", ["mine"]),
        ("defences:more", ["plain", "with another gradient"]),
        ("my=defences:several", ["my plain", "my with another gradient"]),
    ],
)
def test_what_a_target_stands_for(folder, target, names):
    assert list(cli.read_defences([target])) == names


def test_a_file_may_import_its_neighbours(folder):
    (folder / "far").mkdir()
    (folder / "far" / "neighbour.py").write_text("from defences import pair\n")
    (folder / "far" / "mine.py").write_text("from neighbour import pair\n")
    assert list(cli.read_defences(["far/mine.py:pair"])) == ["mine.pair"]


def test_the_first_images_of_a_test_split_are_read():
    x, y = cli.read_images("digits", 3)
    images = load_split("digits", "test")
    assert x.equal(images.x[:3]) and y.equal(images.y[:3])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("defences", r"defences: expected \[NAME=\]MODULE:ATTRIBUTE or \[NAME=\]PATH.py:ATTRIBUTE"),
        ("nowhere:build", "nowhere: expected a module that can be imported from here; No module named 'nowh"),
        ("./nowhere:build", "./nowhere: expected a file of Python"),
        ("..nowhere:build", "..nowhere: expected a file of Python"),
        ("nowhere.py:build", "nowhere.py: expected a file of Python"),
        ("images.npz:build", "images.npz: expected a module .* No module named 'images'"),
        ("wrong.py:build", r"wrong.py: expected a module .* \(wrong.py, line 1\)"),
        ("defences:biuld", "defences:biuld: expected biuld in defences, which has .*, build"),
        ("defences:of", "defences:of: expected .* callable without arguments .*; missing .* 'size'"),
        ("defences:number", r"defences.number: expected a torch.nn.Module, or a pair .*; got int"),
        ("a(b)=defences:pair", r"expected names of letters.*; got 'a\(b\)'"),
    ],
)
def test_a_mistaken_target_is_told_in_one_line(folder, capsys, target, message):
    (folder / "wrong.py").write_text("def build(:\n")
    told = complaint(capsys, "audit", target, "--data", "images.npz", *THREAT)
    assert told.startswith("coup audit: ")
    assert re.search(message, told), told


def test_two_defences_of_one_name_are_refused(folder, capsys):
    told = complaint(capsys, "audit", "a=defences:pair", "a=defences:build", "--data", "digits", *THREAT)
    assert "defences:build: expected a name of its own" in told


def test_what_a_targets_own_code_raises_keeps_its_traceback(folder):
    with pytest.raises(RuntimeError, match="defences:broken") as caught:
        cli.main(["audit", "defences:broken", "--data", "images.npz", *THREAT])
    assert str(caught.value.__cause__) == "of its own"


def mistaken_data(folder):
    """File → what it is refused for."""
    whole, x, y = (folder / "images.npz").read_bytes(), np.zeros((4, 1, 8, 8), np.float32), np.arange(4)
    (folder / "short.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[300:320] = bytes(20)
    (folder / "damaged.npz").write_bytes(damaged)
    (folder / "empty.npz").write_bytes(b"")
    np.save(folder / "one.npy", x)
    np.savez(folder / "unlabelled.npz", x=x, labels=y)
    np.savez(folder / "objects.npz", x=np.array([{}, {}]), y=y[:2])
    np.savez(folder / "words.npz", x=x, y=np.array(["one"] * 4))
    np.savez(folder / "bytes.npz", x=x.astype(np.uint8), y=y)
    np.savez(folder / "bright.npz", x=x + 2, y=y)
    np.savez(folder / "few.npz", x=x, y=y[:3])
    return {
        "nowhere.npz": "there is no file nowhere.npz",
        "short.npz": "is no .npz file, or is cut short",
        "damaged.npz": "Bad CRC-32",
        "empty.npz": "is no .npz file, or is cut short",
        "one.npy": "is no .npz file, or is cut short",
        "unlabelled.npz": "unlabelled.npz: got x, labels",
        "objects.npz": "allow_pickle=False",
        "words.npz": "numpy.str_",
        "bytes.npz": "expected floating point in",
        "bright.npz": "expected values in",
        "few.npz": "a whole number for each of 4 images",
    }


def test_mistaken_images_are_told_in_one_line(folder, capsys):
    for file, message in mistaken_data(folder).items():
        told = complaint(capsys, "audit", "nowhere:build", "--data", file, *THREAT)
        assert told.startswith("coup audit: --data: expected an .npz file with x and y, or one of digits, ")
        assert message in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "a lot"], "--eps: expected a number or a fraction"),
        (["--norm", "l1"], "--norm: invalid choice: 'l1'"),
        (["--n", "9"], "--n: expected a whole number of at least 2 and at most 8; got 9"),
        (["--device", "abacus"], "device: expected one of auto, cpu"),
        (["--max-batch", "0"], "max_batch: expected a whole number of at least 1"),
        (["--epsilon", "1"], "unrecognized arguments: --epsilon"),
    ],
)
def test_a_mistaken_option_is_told_in_one_line(folder, capsys, words, message):
    assert message in complaint(capsys, "audit", "defences:pair", "--data", "images.npz", *THREAT, *words)


@pytest.mark.parametrize(("words", "message"), [([], "COMMAND"), (["adit"], "invalid choice: 'adit'")])
def test_a_mistaken_command_is_told_in_one_line(capsys, words, message):
    assert message in complaint(capsys, *words)


@pytest.mark.parametrize("name", ["estimate", "train"])
def test_what_is_not_installed_asks_for_a_checkout(name, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"needs a checkout .* there is no .*/(estimate|train)\.py"):
        cli.main([name])
