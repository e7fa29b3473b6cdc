"""Making records: one JSON file for each experiment, from chunks that any number of processes may share.

A chunk is one file beside the future record, `<record>.chunk<i>of<n>-<cut>.npz`, renamed into place when it
is whole: a chunk whose file exists is done, and a killed run loses the chunk it was at. A lock for each chunk
says what is in work. Whoever finds all chunks writes the record, `<profile>/<name>-<hash>.json`, and deletes
them. The numbers do not depend on who made which chunk.

The hash is that of the settings: asking for the same settings reads the record back, from such a file or from
the published ones (`store`); changed settings are another record.
"""

import hashlib
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from coup_lib import paths
from coup_lib.contexts import assigned
from coup_lib.evaluation.progress import say
from coup_lib.evaluation.store import Document, published
from coup_lib.files import write_atomically
from coup_lib.networks.precision import products

ABOUT = "about this chunk"  # the name of what is no array in the file of a chunk
DIGEST_BYTES = hashlib.sha256().digest_size
APART = "images"  # the folder beside the records for arrays that can be made again
PROTOCOL = 2  # part of every hash: raise it when a change of the code changes what a record means
PACKAGES = ("torch", "torchsde", "numpy", "scikit-learn", "pyautoattack", "autoattack", "coup-lib")

Progress = Callable[[float, int], None]  # of chunks done, the one in work in part, and chunks in all
Values = dict[str, Any]


asked_for: set[Path] = set()  # the files of unpublished records that this process has looked for and found


class Missing(LookupError):
    """A record that is not there, and was not to be made."""


_reading_only = ContextVar("no record may be made", default=False)


class OutOfTime(RuntimeError):
    """A chunk that was not begun, as it would not have ended in time; those before it are kept."""


_end = ContextVar("when the last chunk has to be done, by time.monotonic()", default=math.inf)


def until(end: float) -> AbstractContextManager[None]:
    """In here no chunk is begun that would end later, if it takes as long as its record's last one did.

    end: by time.monotonic(). Raises `OutOfTime` instead; asking again later goes on from there.
    """
    return assigned(_end, end)


def reading_only() -> AbstractContextManager[None]:
    """In here a record that is not there is not made: `Missing` is raised."""
    return assigned(_reading_only, True)


_told: ContextVar[Callable[[float], None]] = ContextVar("of the chunk in work", default=lambda share: None)


def tell(share: float) -> None:
    """Say, from within a chunk, that so much of it is done."""
    _told.get()(share)


def config_hash(settings: dict[str, Any]) -> str:
    """Twelve hex digits that name these settings (any JSON-able dict; key order does not matter)."""
    text = json.dumps({"protocol": PROTOCOL, **settings}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_path(profile: str, name: str, settings: dict[str, Any]) -> Path:
    """Where the JSON record of these settings is, or will be."""
    return paths.RESULTS / profile / f"{name}-{config_hash(settings)}.json"


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that share the chunks of every record."""

    index: int = 0
    count: int = 1

    def order(self, n_chunks: int) -> list[int]:
        """All chunks: its own first (index, index + count, …), then the others', which may be left undone."""
        return sorted(range(n_chunks), key=lambda chunk: ((chunk - self.index) % self.count, chunk))


def record(profile: str, name: str, settings: dict[str, Any], compute: Callable[[], dict]) -> dict[str, Any]:
    """The record of one piece of work that is too short to need chunks; its numbers are under "result"."""
    return ChunkedRecord(profile, name, settings, [0], lambda _: compute(), lambda parts: parts[0]).finish()


@dataclass(frozen=True)
class ChunkedRecord:
    """A record that is made of chunks, and how to make it.

    Args:
        chunks: what `compute` is called with; the record has them in this order.
        compute: one chunk to a JSON-able dict. NumPy arrays in it go to the record's .npz, not to the JSON.
        combine: all chunks' dicts, in order, to the record's "result".
        worker: which of the processes this is that share the chunks.
        apart: the arrays can be made again and are large, so the record is whole without them. They lie in
            a folder of their own, which is not committed, see `arrays`.
    """

    profile: str
    name: str
    settings: dict[str, Any]
    chunks: Sequence[Any]
    compute: Callable[[Any], Values]
    combine: Callable[[list[Values]], Values]
    worker: Worker = Worker()
    apart: bool = False

    @property
    def path(self) -> Path:
        """Where the JSON is, or will be."""
        return record_path(self.profile, self.name, self.settings)

    def chunk_path(self, index: int) -> Path:
        """The file of a finished chunk; its name has a hash of all chunks, so that no two ways to cut mix."""
        cut = hashlib.sha256(repr(list(self.chunks)).encode()).hexdigest()[:8]
        return self.path.with_name(f"{self.path.stem}.chunk{index}of{len(self.chunks)}-{cut}.npz")

    def share(self, progress: Progress | None = None) -> None:
        """Compute the chunks that are not there yet and that nobody works on; wait for nobody else's.

        progress is called as progress(chunks done, chunks in all) after each, and when one says `tell`.
        """
        self._make(progress, wait=False)

    def finish(self, progress: Progress | None = None) -> dict[str, Any]:
        """Read the record back, or compute the chunks that are missing, write it and return it.

        Where another process works on the last chunks, this one says so and waits for it.
        """
        self.share(progress)
        while not is_complete(self.path):
            self._make(progress, wait=True)
        return read(self.path)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are kept apart; where they are not here they are made again, and this says so."""
        kept, whole = self.finish()["result"], self._with_arrays()
        if not is_complete(whole.path):
            say(f"{self.name}: its arrays are not here; they are made again from the seed")
        made = whole.finish()
        if made["result"] | kept != made["result"]:  # older records hold less
            say(f"{self.name}: what was made again is not to the bit what is on record")
        return made["arrays"]

    def _with_arrays(self) -> "ChunkedRecord":
        """This record with its arrays beside it, in the folder where they are kept apart."""
        return replace(self, profile=f"{self.profile}/{APART}", apart=False)

    def _make(self, progress: Progress | None, *, wait: bool) -> None:
        """Go over all chunks once, write the record if all are there, and delete them once it is written."""
        if not is_complete(self.path):
            if _reading_only.get():
                raise Missing(f"{self.name} is not on record")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files = [self.chunk_path(index) for index in range(len(self.chunks))]
            done = sum(file.exists() for file in files)

            def told(share: float) -> None:
                if progress:
                    progress(done + share, len(files))

            with assigned(_told, told):
                for index in self.worker.order(len(files)):
                    self._make_chunk(index, wait)
                    done = sum(file.exists() for file in files)
                    told(0)
            if done == len(files):
                self._write(files, wait)
        if is_complete(self.path):
            self._delete_chunks()

    def _make_chunk(self, index: int, wait: bool) -> None:
        """Compute a chunk, unless it is done or, where this does not wait, in work."""
        file = self.chunk_path(index)
        if file.exists():
            return
        with _lock(file, wait) as free:
            if free and not file.exists() and not is_complete(self.path):  # deleted only when it is complete
                _check_time(self.name, map(self.chunk_path, range(len(self.chunks))))
                started = time.perf_counter()
                with products("float32"):  # unless `compute` says otherwise, as attacks may
                    arrays, values = _split(self.compute(self.chunks[index]))
                seconds = round(time.perf_counter() - started, 3)
                _write_chunk(file, {"values": values, "seconds": seconds, "made": provenance()}, arrays)

    def _write(self, files: list[Path], wait: bool) -> None:
        """Combine the chunks of these files, if all are as they were written."""
        with _lock(self.path.with_suffix(".chunks"), wait) as free:
            if not free or is_complete(self.path):
                return
            parts = [part for file in files if (part := _read_chunk(file))]
            if len(parts) == len(files):
                result = self.combine([part["values"] for part in parts])
                self._put(*_split(result), self._provenance(parts))

    def _provenance(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """What this process notes of itself, of the time all took, and of other code that made chunks."""
        made = provenance()
        others = {repr(_code(by)): by for part in parts if _code(by := part["made"]) != _code(made)}
        made["seconds"] = round(sum(part["seconds"] for part in parts), 3)
        made["peak_memory_mib"] = _peak_memory()
        if others:
            made["also"] = list(others.values())
            commits = ", ".join(sorted({by["commit"][:12] for by in (made, *others.values())}))
            what = "mixes versions of the code or its packages"
            say(f"warning: {self.path.stem} {what} (commits {commits})")
        return made

    def _put(self, arrays: Values, result: Values, made: dict[str, Any]) -> None:
        """Write the record, its arrays first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.apart:
            self._with_arrays()._put(arrays, result, made)
            arrays = {}
        elif arrays:
            content = _npz(arrays)
            write_atomically(self.path.with_suffix(".npz"), lambda temporary: temporary.write_bytes(content))
        document = {
            "name": self.name,
            "settings": self.settings,
            "hash": config_hash(self.settings),
            "result": result,
            "arrays": sorted(arrays),
            "provenance": made,
        }
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def _delete_chunks(self) -> None:
        """Delete all chunks and locks beside the record, also those of another way to cut the work."""
        folder, start = self.path.parent, f"{self.path.stem}.chunk"
        for name in os.listdir(folder) if folder.is_dir() else []:
            if name.startswith(start):
                (folder / name).unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Whether the record is there, with the arrays it names (they may have been cleaned away)."""
    document, place = _find(path)
    return document is not None and (not document["arrays"] or place.with_suffix(".npz").exists())


def read(path: Path) -> Document:
    """A finished record; "arrays" holds the arrays of its .npz by name (none: an empty dict).

    Raises:
        FileNotFoundError: where there is none.
    """
    try:
        return _read(path)
    except (FileNotFoundError, KeyError):  # another process may have published it since it was found
        return _read(path)


def _read(path: Path) -> Document:
    document, place = _find(path)
    if document is None:
        raise FileNotFoundError(f"no record {path.stem} in {path.parent}")
    if not place.exists():
        document = published(place.parent)[place.stem]
    arrays = {}
    if document["arrays"]:
        with np.load(place.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = {name: file[name] for name in document["arrays"]}
    return document | {"arrays": arrays}


def _find(path: Path) -> tuple[Document | None, Path]:
    """The record of this file or else the published one, packed, if any; and what its arrays lie beside."""
    if path.exists():
        asked_for.add(path)
        return json.loads(path.read_text()), path
    for folder in (path.parent, paths.PUBLISHED / path.parent.name):
        if path.stem in (there := published(folder)):
            return there.data[path.stem], folder / path.name
    return None, path


def _split(values: Values) -> tuple[dict[str, np.ndarray], Values]:
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    return arrays, {key: value for key, value in values.items() if key not in arrays}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    if any(array.dtype.hasobject for array in arrays.values()):
        raise TypeError("expected arrays of numbers or of text, not of Python objects")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _write_chunk(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """An .npz file of the arrays and, as JSON, of what else there is; its last bytes are its SHA-256."""
    content = _npz({ABOUT: np.array(json.dumps(about, allow_nan=False)), **arrays})
    digest = hashlib.sha256(content).digest()
    write_atomically(path, lambda temporary: temporary.write_bytes(content + digest))


def _read_chunk(path: Path) -> dict[str, Any] | None:
    """A chunk's "values" (with its arrays), "seconds" and "made"; a damaged file is deleted: None."""
    whole = path.read_bytes()
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        say(f"{path.name} is damaged; it is made again")
        path.unlink()
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    about = json.loads(arrays.pop(ABOUT).item())
    return about | {"values": about["values"] | arrays}


def _check_time(name: str, chunks: Iterable[Path]) -> None:
    """Raise `OutOfTime` where another chunk than those there are would end after the time of `until`."""
    if (end := _end.get()) == math.inf:
        return
    with suppress(FileNotFoundError):  # another process has just written the record
        done = (part for file in chunks if file.exists() and (part := _read_chunk(file)))
        if time.monotonic() + next((part["seconds"] for part in done), 0.0) > end:
            raise OutOfTime(f"{name}: its next chunk would not end in time; the others are kept")


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of this file; True if we do. Where another has it, wait (and say so), or yield False."""
    lock = filelock.FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            yield False
            return
        say(f"another process is working on {path.name}; waiting for it")
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def provenance() -> dict[str, Any]:
    """What a reader needs to make the record again: commit, versions, machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": COMMIT,
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": ", ".join([platform.machine(), f"{os.cpu_count()} cores", *gpus]),
    }


def _code(made: dict[str, Any]) -> tuple[Any, ...]:
    """What of a provenance may change numbers."""
    return made["commit"], made["python"], made["packages"]


@lru_cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _commit() -> str:
    """The checkout's commit, with "+changes" where the library differs from it; "unknown" outside of git."""

    def git(*args: str) -> str:
        return subprocess.check_output(["git", *args], cwd=paths.ROOT, stderr=subprocess.DEVNULL, text=True)

    try:
        changed = git("status", "--porcelain", "--", "coup_lib").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()  # when it is loaded: a commit while a run goes on changes nothing of it


def _peak_memory() -> int:
    """The process's peak resident memory in MiB (ru_maxrss is in KiB on Linux, in bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
