"""The published networks: one list of them, and getting and reading them safely.

Each has its place under `paths.model_dir()`: <dataset>/<kind>/<file>. The kind of RobustBench's models is
their threat model, as its loader looks for <dataset>/Linf/<name>.pt, and so they are named here; of others it
is "score" or "classifier". A file put there by hand is used and nothing is fetched.

Nothing is used unseen. A file whose SHA-256 is not known is read at its first use, and if that succeeds the
SHA-256 is recorded in <model_dir>/SHA256SUMS and holds from then on. Reading never runs code from the file.

    python -m coup_lib.artefacts             what there is, and what of it is here
    python -m coup_lib.artefacts NAME...     fetch these
"""

import argparse
import hashlib
import importlib.util
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from coup_lib.checkpoints import SUMS, CheckpointError, read_sums, write_sums
from coup_lib.download import WebPage, download
from coup_lib.paths import MODELS_VARIABLE, model_dir

BLOCK = 1 << 20
DRIVE_PAGE = "https://drive.google.com/file/d/{}/view"
# confirm=t answers the question that Drive asks before it serves a file too large for its virus scan.
DRIVE_FILE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"

# Training scripts save their options and best accuracy beside the weights. These classes only hold values.
SCALARS = ("?", "u1", "i4", "i8", "f2", "f4", "f8")
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in SCALARS),
    # The function that rebuilds a numpy scalar, under its name before and since numpy 2.
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Artefact:
    """A published file.

    place: where it belongs under model_dir(). source: an address that a person can open. licence: of the
    weights, as far as stated. size: bytes; about, from the number of parameters, where the SHA-256 is not
    known. by_hand: what to do where the source cannot simply be fetched. package: "package/file" of an
    installed package that ships it.
    """

    place: str
    what: str
    source: str
    licence: str
    size: int
    sha256: str = ""
    by_hand: str = ""
    package: str = ""

    @property
    def address(self) -> str:
        """Where the bytes are served."""
        page = re.fullmatch(DRIVE_PAGE.replace(".", r"\.").format("([^/]+)"), self.source)
        return DRIVE_FILE.format(page[1]) if page else self.source

    @property
    def amount(self) -> str:
        """The size for people."""
        return f"{'' if self.sha256 else 'about '}{_amount(self.size)}"


AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
WRN_28_10 = 4 * 36_490_000

ARTEFACTS = {
    "ddpmpp-deep": Artefact(
        place="cifar10/score/checkpoint_8.pth",
        what="score_sde's DDPM++ deep (VP, continuous), the paper's score network for CIFAR-10",
        source=DRIVE_PAGE.format("16_-Ahc6ImZV5ClUc0vM5Iivf8OJ1VSif"),
        licence="Apache-2.0 (the code's)",
        size=4 * 4 * 106_632_579,  # the weights, their averages and Adam's two moments
    ),
    "cifar10/Linf/Standard": Artefact(
        place="cifar10/Linf/Standard.pt",
        what="RobustBench's WRN-28-10, not adversarially trained; the paper's classifier",
        source=DRIVE_PAGE.format("1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC"),
        licence="MIT",
        size=WRN_28_10,
    ),
    "cifar10/Linf/Wang2023Better_WRN-28-10": Artefact(
        place="cifar10/Linf/Wang2023Better_WRN-28-10.pt",
        what="RobustBench's WRN-28-10 adversarially trained for Linf",
        source=DRIVE_PAGE.format("1-6MYKJdECDVGaWjj6GgqvaT95BGKhUvI"),
        licence="MIT",
        size=WRN_28_10,
    ),
    "cifar10/L2/Wang2023Better_WRN-28-10": Artefact(
        place="cifar10/L2/Wang2023Better_WRN-28-10.pt",
        what="RobustBench's WRN-28-10 adversarially trained for L2",
        source=DRIVE_PAGE.format("1-fwKiJXEqHHUngt8wKsNnHuD4vAPvPXC"),
        licence="MIT",
        size=WRN_28_10,
    ),
    "wrn-70-16-dropout": Artefact(
        place="cifar10/classifier/wrn-70-16-dropout.pt",
        what="DiffPure's WRN-70-16 with dropout",
        source="https://drive.google.com/drive/folders/1istqcnPNXJ-TQFdxRqNJuInzOtlYOG1b",
        licence="NVIDIA Source Code License, non-commercial (the code's)",
        size=4 * 266_800_000,
        by_hand="take weights.pt from the folder",
    ),
    "resnet20": Artefact(
        place="cifar10/classifier/resnet20-12fca82f.th",
        what="ResNet-20, small enough to try things on a CPU",
        source=f"{AKAMASTER}resnet20-12fca82f.th",
        licence="BSD-2-Clause",
        size=1_099_231,
        sha256="12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    ),
    "resnet56": Artefact(
        place="cifar10/classifier/resnet56-4bfd9763.th",
        what="ResNet-56",
        source=f"{AKAMASTER}resnet56-4bfd9763.th",
        licence="BSD-2-Clause",
        size=3_471_733,
        sha256="4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
    ),
    "resnet18": Artefact(
        place="cifar10/classifier/pyautoattack-resnet18.pt",
        what="ResNet-18 that the wheel of pyautoattack ships: here as soon as coup-lib is installed",
        source="https://pypi.org/project/pyautoattack/0.2.0/",
        licence="MIT",
        size=44_754_497,
        sha256="399f52da9f914c323fa5a6096d60f460a3449a59b64a6405200c1e629f8425a7",
        by_hand="pip install pyautoattack==0.2.0, or take examples/model_test.pt from its wheel",
        package="pyautoattack/examples/model_test.pt",
    ),
    "edm-vp": Artefact(
        place="cifar100/score/edm_cifar100_uncond_vp.pt",
        what="EDM's unconditional VP network for CIFAR-100 as Chen et al. use it",
        source="https://drive.google.com/drive/folders/1mQoH6WbnfItphYKehWVniZmq9iixRn8L",
        licence="none stated; EDM's code is CC BY-NC-SA 4.0",
        size=4 * 55_733_891,
        by_hand="take edm_cifar100_uncond_vp.pt from the folder of EDM checkpoints that Chen et al. name; "
        "if it is not there, ask the authors (https://github.com/huanranchen/DiffusionClassifier)",
    ),
    "wrn-40-2": Artefact(
        place="cifar100/classifier/wrn_40_2.pth",
        what="WRN-40-2, the classifier of Chen et al. for CIFAR-100",
        source="https://github.com/HobbitLong/RepDistiller",
        licence="none stated",
        size=2 * 4 * 2_260_000,  # the weights and SGD's momentum
        by_hand="Chen et al. do not say where theirs is from; layout and normalisation are RepDistiller's: "
        "take the wrn_40_2_vanilla/ckpt_epoch_240.pth that its scripts/fetch_pretrained_teachers.sh names",
    ),
    "cifar100/Linf/Wang2023Better_WRN-28-10": Artefact(
        place="cifar100/Linf/Wang2023Better_WRN-28-10.pt",
        what="RobustBench's WRN-28-10 adversarially trained for Linf on CIFAR-100",
        source=DRIVE_PAGE.format("1-jOu3wKWyw0XnBCXDGR32xn8Bw9GTJgh"),
        licence="MIT",
        size=WRN_28_10,
    ),
}


def load(name: str) -> dict[str, Any]:
    """What an artefact holds, on the CPU: fetched if it is not here, verified, read without running code.

    Raises what `fetch` raises.
    """
    return _read(fetch(name), name)


def fetch(name: str) -> Path:
    """The verified file of an artefact, downloaded if it is not here; a broken download goes on where it was.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: for one that must be put there by hand, saying where and from where.
        ConnectionError: if the source cannot be reached; what has come so far is kept.
        CheckpointError: for a file that is not what it should be: a web page, cut short, with a wrong
            SHA-256, no archive of tensors or one that asks for code to be run.
    """
    file = locate(name)
    if not file.is_file() and not _artefact(name).by_hand:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_name(f".{file.name}.lock")):  # two shards may want it at once
            if not file.is_file():
                _download(name, file)
    return path(name)


def path(name: str) -> Path:
    """The verified file of an artefact that is here; raises like `fetch`, FileNotFoundError if it is not."""
    require([name])
    file = locate(name)
    _record(name, _verified(file, name))
    return file


def require(names: Iterable[str]) -> None:
    """Check that these artefacts are here, without the network.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: listing all that are missing: what to get from where, and where to put it.
    """
    missing = [name for name in dict.fromkeys(names) if not locate(name).is_file()]
    if missing:
        raise FileNotFoundError(_instructions(missing))


def obtain(names: Iterable[str]) -> dict[str, Path]:
    """The verified files of several artefacts, what is missing being downloaded.

    Raises like `fetch`; FileNotFoundError lists all that are missing, before anything is downloaded if one of
    them must be put there by hand, or when the network fails.
    """
    names = list(dict.fromkeys(names))
    missing = [name for name in names if not locate(name).is_file()]
    if any(_artefact(name).by_hand for name in missing):
        require(missing)
    try:
        return {name: fetch(name) for name in names}
    except ConnectionError as error:
        missing = [name for name in names if not locate(name).is_file()]
        problem = str(error).splitlines()[0]
        raise FileNotFoundError(f"{problem}\n{_instructions(missing)}") from error


def locate(name: str) -> Path:
    """Where an artefact is or belongs; ValueError for an unknown name."""
    artefact = _artefact(name)
    file = model_dir() / artefact.place
    return file if file.is_file() else _shipped(artefact.package) or file


def digest(name: str) -> str:
    """The SHA-256 of an artefact, as published or as at its first use; fetched, if it is not known yet."""
    return _artefact(name).sha256 or _recorded(name) or file_digest(fetch(name))


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, computed once as long as its size and time stay."""
    return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


def _download(name: str, file: Path) -> None:
    """Fetch, verify and only then move into place."""
    part = file.with_name(f"{file.name}.part")
    try:
        download(ARTEFACTS[name].address, part, name)
        _verified(part, name)
    except ConnectionError as error:
        raise ConnectionError(f"could not download {name}: {error}\n{_instructions([name])}") from error
    except WebPage as error:
        raise _refusal(file, name, f"{error}, not a checkpoint") from error
    except CheckpointError:
        part.unlink()  # nothing to go on with
        raise
    os.replace(part, file)


def _artefact(name: str) -> Artefact:
    if name not in ARTEFACTS:
        raise ValueError(f"expected an artefact out of {', '.join(ARTEFACTS)}; got {name!r}")
    return ARTEFACTS[name]


def _shipped(package: str) -> Path | None:
    """The file in an installed package, which is not imported; None if there is none."""
    root, _, inside = package.partition("/")
    found = importlib.util.find_spec(root) if root else None
    files = [Path(folder) / inside for folder in (found and found.submodule_search_locations) or []]
    return next((file for file in files if file.is_file()), None)


# Verifying


def _verified(file: Path, name: str) -> str:
    """The SHA-256 of a file that is what it should be; CheckpointError for any other."""
    artefact, size = ARTEFACTS[name], file.stat().st_size
    with file.open("rb") as opened:
        if opened.read(512).lstrip().startswith(b"<"):
            raise _refusal(file, name, "this is a web page, not a checkpoint")
    if artefact.sha256 and size < artefact.size:
        raise _refusal(file, name, f"cut short, {size:,} of {artefact.size:,} bytes")
    expected, got = artefact.sha256 or _recorded(name), file_digest(file)
    if expected and got != expected:
        since = "" if artefact.sha256 else f" as at its first use; if it changed on purpose, edit {_sums()}"
        raise _refusal(file, name, f"its SHA-256 is {got}, expected {expected}{since}")
    if not expected:
        _read(file, name)
    return got


@lru_cache
def _digest(file: Path, size: int, modified: int) -> str:
    """file_digest; size and modified tell one content from the next."""
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _sums() -> Path:
    return model_dir() / SUMS


def _recorded(name: str) -> str:
    return read_sums(model_dir()).get(ARTEFACTS[name].place, "") if _sums().is_file() else ""


def _record(name: str, sha256: str) -> None:
    """Keep the SHA-256 of a first use."""
    if ARTEFACTS[name].sha256 or _recorded(name):
        return
    sums = (read_sums(model_dir()) if _sums().is_file() else {}) | {ARTEFACTS[name].place: sha256}
    try:
        write_sums(sums, model_dir())
    except OSError as error:  # a folder that many share is often read-only
        warnings.warn(f"cannot record the SHA-256 of {name} in {_sums()}: {error}", stacklevel=3)


def _read(file: Path, name: str) -> dict[str, Any]:
    """The dictionary in a checkpoint; classes other than tensors and `HARMLESS` are refused, not run."""
    try:
        with _harmless():
            # Mapped, the optimiser's state is never read; the format before PyTorch 1.6 cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # torch's own message advises to switch the protection off, so it is not shown.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        problem = (
            f"it asks for {asked[1]}, which is no harmless class; nothing of it was run"
            if asked
            else "cut short, or no archive of tensors"
        )
        raise _refusal(file, name, problem) from None
    if not isinstance(content, dict):
        raise _refusal(file, name, f"expected a dictionary of tensors, got a {type(content).__name__}")
    return content


def _harmless() -> AbstractContextManager[Any]:
    """Lets torch.load build the classes in `HARMLESS`; before PyTorch 2.6, tensors and plain values only."""
    return torch.serialization.safe_globals(HARMLESS) if torch.__version__ >= "2.6" else nullcontext()


# Telling


def _refusal(file: Path, name: str, problem: str) -> CheckpointError:
    """What is wrong with a file, what was expected and how to get it."""
    return CheckpointError(f"{file}: {problem}.\nRemove it and get the right one. {_instructions([name])}")


def _instructions(names: list[str]) -> str:
    """What to get from where, and where to put it."""
    items = "\n".join(
        f"  {model_dir() / ARTEFACTS[name].place}\n"
        f"    {ARTEFACTS[name].what} ({ARTEFACTS[name].amount})\n"
        f"    from {ARTEFACTS[name].source}" + f"; {ARTEFACTS[name].by_hand}" * bool(ARTEFACTS[name].by_hand)
        for name in names
    )
    fetched = [name for name in names if not ARTEFACTS[name].by_hand]
    command = f"\nWith internet: python -m coup_lib.artefacts {' '.join(fetched)}" if fetched else ""
    return f"Needed, under this very name (another folder: set {MODELS_VARIABLE}):\n{items}{command}"


def _amount(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _listing() -> str:
    """All artefacts, and which of them are here."""
    lines = [f"in {model_dir()}"]
    for name, artefact in ARTEFACTS.items():
        state = "here" if locate(name).is_file() else "by hand" if artefact.by_hand else "missing"
        lines.append(f"{state:8} {artefact.amount:>14}  {name}: {artefact.what}")
        lines.append(f"{'':25}{artefact.place}; {artefact.licence}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m coup_lib.artefacts", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="to fetch; none: list all")
    names = parser.parse_args(arguments).names
    try:
        for file in obtain(names).values():
            print(file)
    except (ValueError, OSError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    if not names:
        print(_listing())


if __name__ == "__main__":
    main()
