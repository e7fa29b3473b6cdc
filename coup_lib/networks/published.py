"""The published networks: one list of them, and getting and reading them safely.

Each has its place under `paths.model_dir()`: <dataset>/<kind>/<file>. The kind of RobustBench's models is
their threat model, as its loader looks for <dataset>/Linf/<name>.pt, and so they are named here; of others it
is "score" or "classifier". A file put there by hand is used and nothing is fetched.

Nothing is used unseen. Where no SHA-256 is published, that of the first file whose weights fit their network
is recorded in <model_dir>/SHA256SUMS and holds from then on. Reading never runs code from the file, and no
whole file is ever deleted.

    python -m coup_lib.networks.published             what there is, and what of it is here
    python -m coup_lib.networks.published NAME...     fetch these
"""

import argparse
import hashlib
import importlib.util
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import filelock
import numpy as np
import torch

from coup_lib.checks import choice
from coup_lib.networks.checkpoints import SUMS, CheckpointError, read_sums, record_sum
from coup_lib.networks.download import WebPage, download
from coup_lib.paths import MODELS_VARIABLE, model_dir

T = TypeVar("T")

BLOCK = 1 << 20
NOTHING: Mapping[str, str] = MappingProxyType({})
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


def load(name: str, put: Callable[[dict[str, Any]], T]) -> T:
    """What put() makes of an artefact: fetched if it is not here, verified, read without running code.

    put gets the dictionary in the file, tensors on the CPU, and raises CheckpointError if they do not fit. If
    they do, the SHA-256 of a first use is recorded.

    Raises what `fetch` raises, and CheckpointError naming file and source where weights do not fit.
    """
    file, known = fetch(name), sha256(name)
    content = _read(file, name)
    if not known:
        _check_members(file, name)
    try:
        made = put(content)
    except CheckpointError as error:
        raise _refusal(file, name, str(error)) from error
    if not known:
        _record(name, file)
    return made


def fetch(name: str) -> Path:
    """The verified file of an artefact, downloaded if it is not here; a broken download goes on where it was.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: for one that must be put there by hand, saying where and from where.
        ConnectionError: if the source cannot be reached; what has come so far is kept.
        OSError: if the folder cannot be written or the disk is full; what has come so far is kept.
        CheckpointError: for a file that is not what it should be: a web page, cut short, with a wrong
            SHA-256, no archive of tensors or one that asks for code to be run.
    """
    file = locate(name)
    if not file.is_file() and not _artefact(name).by_hand:
        _download(name, file)
    return path(name)


def path(name: str) -> Path:
    """The verified file of an artefact that is here; raises like `fetch`, FileNotFoundError if it is not."""
    require([name])
    file = locate(name)
    _verify(file, name)
    return file


def missing(names: Iterable[str]) -> list[str]:
    """Those of the artefacts that are not here, each once; ValueError for an unknown name."""
    return [name for name in dict.fromkeys(names) if not locate(name).is_file()]


def require(names: Iterable[str], needed_by: Mapping[str, str] = NOTHING) -> None:
    """Check that these artefacts are here, without the network.

    needed_by: what needs an artefact, by its name, to be said if it is missing.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: with `instructions` for all that are missing.
    """
    if absent := missing(names):
        raise FileNotFoundError(instructions(absent, needed_by))


def obtain(names: Iterable[str], needed_by: Mapping[str, str] = NOTHING) -> dict[str, Path]:
    """The verified files of several artefacts, what is missing being downloaded; needed_by as in `require`.

    Raises like `fetch`; FileNotFoundError lists all that are missing, before anything is downloaded if one of
    them must be put there by hand, or when the network fails.
    """
    names = list(dict.fromkeys(names))
    if any(_artefact(name).by_hand for name in missing(names)):
        require(names, needed_by)
    try:
        return {name: fetch(name) for name in names}
    except ConnectionError as error:
        problem = str(error).splitlines()[0]
        raise FileNotFoundError(f"{problem}\n{instructions(missing(names), needed_by)}") from error


def locate(name: str) -> Path:
    """Where an artefact is or belongs; ValueError for an unknown name."""
    artefact = _artefact(name)
    file = model_dir() / artefact.place
    return file if file.is_file() else _shipped(artefact.package) or file


def digest(name: str) -> str:
    """The SHA-256 of an artefact: `sha256`, or else that of its file, fetched if it is not here."""
    file = locate(name)
    return sha256(name) or file_digest(file if file.is_file() else fetch(name))


def sha256(name: str) -> str:
    """The SHA-256 that an artefact must have, as published or as at its first use; "" before that."""
    artefact = _artefact(name)
    return artefact.sha256 or read_sums(model_dir()).get(artefact.place, "")


def is_page(file: Path) -> bool:
    """Whether a file is a web page, by its beginning."""
    with file.open("rb") as opened:
        return opened.read(512).lstrip().startswith(b"<")


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, computed once as long as its size and time stay."""
    return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


def _download(name: str, file: Path) -> None:
    """Fetch, and move into place what is whole; a wrong file is refused there, not deleted."""
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_name(f".{file.name}.lock")):  # two shards may want it at once
            if not file.is_file():
                download(ARTEFACTS[name].address, part, name)
                if is_page(part):
                    part.unlink()  # nothing to go on with
                    raise WebPage(f"{ARTEFACTS[name].address} sent a web page")
                os.replace(part, file)
    except (OSError, WebPage) as error:
        kind = next(kind for kind in (WebPage, ConnectionError, OSError) if isinstance(error, kind))
        raise kind(f"could not download {name}: {error}\n{instructions([name])}") from error


def _artefact(name: str) -> Artefact:
    return ARTEFACTS[choice("artefact", name, ARTEFACTS)]


def _shipped(package: str) -> Path | None:
    """The file in an installed package, which is not imported; None if there is none."""
    root, _, inside = package.partition("/")
    found = importlib.util.find_spec(root) if root else None
    files = [Path(folder) / inside for folder in (found and found.submodule_search_locations) or []]
    return next((file for file in files if file.is_file()), None)


# Verifying


def _verify(file: Path, name: str) -> None:
    """CheckpointError for a file that is not what it should be."""
    artefact, size = ARTEFACTS[name], file.stat().st_size
    if is_page(file):
        raise _refusal(file, name, "this is a web page, not a checkpoint")
    if artefact.sha256 and size < artefact.size:
        raise _refusal(file, name, f"cut short, {size:,} of {artefact.size:,} bytes")
    if not (expected := sha256(name)):
        _read(file, name)
    elif (got := file_digest(file)) != expected:
        first_use = f" as at its first use; if this one is right, take its line out of {model_dir() / SUMS}"
        since = "" if artefact.sha256 else first_use
        raise _refusal(file, name, f"its SHA-256 is {got}, expected {expected}{since}")


@lru_cache
def _digest(file: Path, size: int, modified: int) -> str:
    """file_digest; size and modified tell one content from the next."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _record(name: str, file: Path) -> None:
    """Keep the SHA-256 of a first use."""
    try:
        record_sum(ARTEFACTS[name].place, file_digest(file), model_dir())
    except OSError as error:  # a folder that many share is often read-only
        warnings.warn(f"cannot record the SHA-256 of {name} in {model_dir() / SUMS}: {error}", stacklevel=3)


def _read(file: Path, name: str) -> dict[str, Any]:
    """The dictionary in a checkpoint; classes other than tensors and `HARMLESS` are refused, not run."""
    try:
        with _harmless():
            # Mapped, the optimiser's state is never read; the format before PyTorch 1.6 cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # torch's own message advises to switch the protection off, so it is not shown.
        raise _refusal(file, name, _unreadable(file, error, ARTEFACTS[name].amount)) from None
    if not isinstance(content, dict):
        raise _refusal(file, name, f"expected a dictionary of tensors, got a {type(content).__name__}")
    return content


def _unreadable(file: Path, error: Exception, amount: str) -> str:
    """Why torch could not read a file, by its error and by the file itself."""
    if asked := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {asked[1]}, which is no harmless class; nothing of it was run"
    with file.open("rb") as opened:
        cut = opened.read(2) == b"PK" and not zipfile.is_zipfile(file)  # an archive's list stands at its end
    if cut or isinstance(error, EOFError) or re.search("truncated|unexpected EOF", str(error)):
        return f"cut short, {file.stat().st_size:,} bytes where {amount} are expected"
    return "no archive of tensors"


def _check_members(file: Path, name: str) -> None:
    """CheckpointError for an archive with damaged bytes inside: torch reads it and ignores its check sums."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise _refusal(file, name, f"damaged: the check sum of {damaged} in it is another")


def _harmless() -> AbstractContextManager[Any]:
    """Lets torch.load build the classes in `HARMLESS`; before PyTorch 2.6, tensors and plain values only."""
    return torch.serialization.safe_globals(HARMLESS) if torch.__version__ >= "2.6" else nullcontext()


# Telling


def _refusal(file: Path, name: str, problem: str) -> CheckpointError:
    """What is wrong with a file, what was expected and how to get it."""
    return CheckpointError(f"{file}: {problem}.\nRemove it and get the right one. {instructions([name])}")


def instructions(names: Sequence[str], needed_by: Mapping[str, str] = NOTHING) -> str:
    """What to get from where, by hand or by which command, and where to put it; needed_by as in `require`."""
    items = "\n".join(
        f"  {model_dir() / ARTEFACTS[name].place}\n"
        f"    {ARTEFACTS[name].what} ({ARTEFACTS[name].amount})"
        + (f", needed by {needed_by[name]}" if name in needed_by else "")
        + f"\n    {'by hand' if ARTEFACTS[name].by_hand else 'fetched'} from {ARTEFACTS[name].source}"
        + f"; {ARTEFACTS[name].by_hand}" * bool(ARTEFACTS[name].by_hand)
        for name in names
    )
    fetched = [name for name in names if not ARTEFACTS[name].by_hand]
    command = f"\nWith internet: python -m coup_lib.networks.published {' '.join(fetched)}" if fetched else ""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
