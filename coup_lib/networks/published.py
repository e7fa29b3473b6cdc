"""The published networks: getting and reading them safely; `published.json` beside this file lists them.

Each has its place under `paths.model_dir()`: <dataset>/<kind>/<file>. The kind of RobustBench's models is
their threat model, as its loader looks for <dataset>/Linf/<name>.pt; of others it is "score" or "classifier".
A file put there by hand is used and nothing is fetched.

Nothing is used unseen. Where no SHA-256 is published, that of the first file whose weights fit their network
is recorded in <model_dir>/SHA256SUMS and holds from then on. Reading never runs code from the file, and no
file that was fetched or put there is ever deleted.

    coup fetch             what there is, and what of it is here
    coup fetch NAME...     fetch these
"""

import argparse
import hashlib
import importlib.util
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock

from coup_lib.checks import choice
from coup_lib.networks.checkpoints import SUMS, CheckpointError, read_sums, record_sum
from coup_lib.paths import MODELS_VARIABLE, model_dir

T = TypeVar("T")

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
    def amount(self) -> str:
        """The size for people."""
        size = f"{self.size / 1e9:.3g} GB" if self.size >= 1e9 else f"{self.size / 1e6:.3g} MB"
        return size if self.sha256 else f"about {size}"


ARTEFACTS = {
    name: Artefact(**fields)
    for name, fields in json.loads(Path(__file__).with_suffix(".json").read_text("utf-8")).items()
}


def load(name: str, put: Callable[[dict[str, Any]], T]) -> T:
    """What put() makes of an artefact: fetched if it is not here, verified, read without running code.

    put gets the dictionary in the file, tensors on the CPU, and raises CheckpointError if they do not fit. If
    they do, the SHA-256 of a first use is recorded.

    Raises what `obtain` raises, and CheckpointError naming file and source where weights do not fit.
    """
    file, known = fetch(name), sha256(name)
    content = _read(file, name)
    if not known and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:  # torch ignores its check sums
            if damaged := archive.testzip():
                raise _refusal(file, name, f"damaged: the check sum of {damaged} in it is another")
    try:
        made = put(content)
    except CheckpointError as error:
        raise _refusal(file, name, str(error)) from error
    if not known:
        try:
            record_sum(ARTEFACTS[name].place, file_digest(file), model_dir())
        except OSError as error:  # a folder that many share is often read-only
            warnings.warn(
                f"cannot record the SHA-256 of {name} in {model_dir() / SUMS}: {error}", stacklevel=2
            )
    return made


def fetch(name: str) -> Path:
    """The verified file of one artefact; see `obtain`."""
    return obtain([name])[name]


def obtain(names: Iterable[str]) -> dict[str, Path]:
    """The verified files of several artefacts; what is missing is downloaded.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: where one that is missing must be put there by hand, before anything is downloaded;
            names all that are missing, their places and sources.
        OSError: if a download fails; names all that are still missing. gdown goes on with it the next time.
        ImportError: without gdown, for a file on Google Drive.
        CheckpointError: for a file that is not what it should be: a web page, cut short, with a wrong
            SHA-256, no archive of tensors or one that asks for code to be run.
    """
    names = list(dict.fromkeys(names))
    absent = missing(names)
    if any(ARTEFACTS[name].by_hand for name in absent):
        raise FileNotFoundError(instructions(absent))
    for name in absent:
        file = locate(name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_name(f".{file.name}.lock")):  # two shards may want it at once
                if not file.is_file():
                    download(ARTEFACTS[name].source, file)
        except OSError as error:
            told = instructions(missing(absent))
            raise OSError(f"could not download {name}: {error}\n{told}") from error
    return {name: _verified(name) for name in names}


def download(source: str, file: Path) -> None:
    """Fetch a file, which is there when it is whole; a broken download from Google Drive is gone on with.

    Raises OSError if the source cannot be reached or the file not written, ImportError without gdown.
    """
    if not source.startswith("https://drive.google.com/file/"):
        torch.hub.download_url_to_file(source, str(file))
        return
    try:
        import gdown
    except ImportError as error:
        raise ImportError(
            f"{source} is fetched by gdown: pip install 'coup-lib[cifar]', or put it at {file}"
        ) from error
    # gdown goes on with any file whose name begins with this one, which no other file's does.
    part = file.with_name(f".{file.name}.part")
    try:
        whole = part.is_file() or gdown.download(source, str(part), fuzzy=True, resume=True)
    except gdown.exceptions.FileURLRetrievalError as error:
        raise ConnectionError(str(error)) from error
    if not whole:
        raise ConnectionError(f"several {part}* are there; remove all but one")
    part.replace(file)


def missing(names: Iterable[str]) -> list[str]:
    """Those of the artefacts that are not here, each once; ValueError for an unknown name."""
    return [name for name in dict.fromkeys(names) if not locate(name).is_file()]


def locate(name: str) -> Path:
    """Where an artefact is or belongs; ValueError for an unknown name."""
    artefact = ARTEFACTS[choice("artefact", name, ARTEFACTS)]
    file = model_dir() / artefact.place
    package, _, inside = artefact.package.partition("/")
    found = importlib.util.find_spec(package) if package and not file.is_file() else None
    shipped = [Path(folder) / inside for folder in (found and found.submodule_search_locations) or []]
    return next((place for place in shipped if place.is_file()), file)


def sha256(name: str) -> str:
    """The SHA-256 that an artefact must have, as published or as at its first use; "" before that."""
    artefact = ARTEFACTS[choice("artefact", name, ARTEFACTS)]
    return artefact.sha256 or read_sums(model_dir()).get(artefact.place, "")


def is_page(file: Path) -> bool:
    """Whether a file is a web page, by its beginning."""
    with file.open("rb") as opened:
        return opened.read(512).lstrip().startswith(b"<")


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, computed once as long as its size and time stay."""
    return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


@lru_cache
def _digest(file: Path, size: int, modified: int) -> str:
    """file_digest; size and modified tell one content from the next."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _verified(name: str) -> Path:
    """The file of an artefact; CheckpointError if it is not what it should be."""
    artefact, file, expected = ARTEFACTS[name], locate(name), sha256(name)
    if is_page(file):
        raise _refusal(file, name, "this is a web page, not a checkpoint")
    if not expected:
        _read(file, name)
    elif (got := file_digest(file)) != expected:
        first_use = f" as at its first use; if this one is right, take its line out of {model_dir() / SUMS}"
        since = "" if artefact.sha256 else first_use
        raise _refusal(file, name, f"its SHA-256 is {got}, expected {expected}{since}")
    return file


def _read(file: Path, name: str) -> dict[str, Any]:
    """The dictionary in a checkpoint; classes other than tensors and `HARMLESS` are refused, not run."""
    # Before PyTorch 2.6 tensors and plain values only.
    allowed = torch.serialization.safe_globals(HARMLESS) if torch.__version__ >= "2.6" else nullcontext()
    try:
        with allowed:
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


def _refusal(file: Path, name: str, problem: str) -> CheckpointError:
    """What is wrong with a file, what was expected and how to get it."""
    return CheckpointError(f"{file}: {problem}.\nRemove it and get the right one. {instructions([name])}")


def instructions(names: Sequence[str]) -> str:
    """What to get from where, by hand or by which command, and where to put it."""
    lines = [f"Needed, under this very name (another folder: set {MODELS_VARIABLE}):"]
    for artefact in (ARTEFACTS[name] for name in names):
        lines.append(f"  {model_dir() / artefact.place}\n    {artefact.what} ({artefact.amount})")
        way, more = ("by hand", f"; {artefact.by_hand}") if artefact.by_hand else ("fetched", "")
        lines.append(f"    {way} from {artefact.source}{more}")
    if fetched := [name for name in names if not ARTEFACTS[name].by_hand]:
        lines.append(f"With internet: coup fetch {' '.join(fetched)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `coup fetch`."""
    parser = argparse.ArgumentParser(
        prog="coup fetch",
        description=f"Download published networks to {model_dir()} (another folder: set {MODELS_VARIABLE}), "
        "check their SHA-256 and print where they lie. Without a name: list all, and what of them is here.",
        epilog="example: coup fetch cifar10/Linf/Standard resnet20",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="as the list has it (default: list all)")
    names = parser.parse_args(arguments).names
    try:
        print(*obtain(names).values(), sep="\n")
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        raise SystemExit(str(error)) from None
    if not names:
        print(f"in {model_dir()}")
    for name, artefact in [] if names else ARTEFACTS.items():
        state = "here" if locate(name).is_file() else "by hand" if artefact.by_hand else "missing"
        print(f"{state:8} {artefact.amount:>14}  {name}: {artefact.what}")
        print(f"{'':25}{artefact.place}; {artefact.licence}")
