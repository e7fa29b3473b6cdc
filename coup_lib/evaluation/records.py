"""Results of runs: a JSON record per experiment, a file per chunk while it is made, and reading it back.

Work is a list of chunks. Each finished chunk is a file beside the future record, renamed into place when it
is whole: what is there is done, and a killed run goes on behind it. When all are there, the record is moved
into place in one step and the chunks go. A record is called by the hash of its settings: asking for these
settings again reads it back, from such a file or from the published ones (`store`).

Several processes, on one machine or on many with a common folder, may share the chunks of all records: a lock
for each chunk says what is in work. The numbers do not depend on who did what.
"""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import filelock
import numpy as np
import torch

from coup_lib import paths
from coup_lib.evaluation.store import Document, published
from coup_lib.files import write_atomically
from coup_lib.networks.precision import products

APART = "images"  # the folder beside the records for arrays that can be made again
PROTOCOL = 2  # part of every hash: raise it when a change of the code changes what a record means
PACKAGES = ("torch", "torchsde", "numpy", "scikit-learn", "pyautoattack", "autoattack", "coup-lib")
JSON = "values.json"  # of a chunk's file, what is no array

read_here: set[Path] = set()  # the files of unpublished records that this process has read

Progress = Callable[[int, int], None]
Values = dict[str, Any]


class Missing(LookupError):
    """A record that is not there, and was not to be made."""


_reading_only = ContextVar("no record may be made", default=False)


@contextmanager
def reading_only() -> Iterator[None]:
    """In here a record that is not there is not made: `Missing` is raised."""
    token = _reading_only.set(True)
    try:
        yield
    finally:
        _reading_only.reset(token)


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

    def share(self, progress: Progress | None = None) -> None:
        """Compute the chunks that are not there yet and that nobody works on; wait for nobody else's.

        progress is called as progress(chunks done, chunks in all) after each. Raises `Missing` in
        `reading_only` where the record is not there.
        """
        if is_complete(self.path):
            if any(file.exists() for file in self._files()):
                self._clear()  # whoever wrote the record may have been killed before it came to that
            return
        if _reading_only.get():
            raise Missing(f"{self.name} is not on record")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for index in self.worker.order(len(self.chunks)):
            self._compute(index, wait=False)
            if progress:
                progress(sum(path.exists() for path in self._files()), len(self.chunks))

    def finish(self, progress: Progress | None = None) -> dict[str, Any]:
        """Read the record back, or compute what is missing, write it and return it.

        Where another process works on a chunk, this one says so and waits for it.
        """
        self.share(progress)
        while not is_complete(self.path):
            for index in range(len(self.chunks)):
                self._compute(index, wait=True)
            with _lock(self.path.with_suffix(".lock")):
                if not is_complete(self.path):
                    self._combine()
        self._clear()
        return read(self.path)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are kept apart; where they are not here they are made again, and this says so."""
        kept, whole = self.finish()["result"], self._with_arrays()
        if not is_complete(whole.path):
            print(f"{self.name}: its arrays are not here; they are made again from the seed", flush=True)
        made = whole.finish()
        if made["result"] != kept:
            print(f"{self.name}: what was made again is not to the bit what is on record", flush=True)
        return made["arrays"]

    def _with_arrays(self) -> "ChunkedRecord":
        """This record with its arrays beside it, in the folder where they are kept apart."""
        return replace(self, profile=f"{self.profile}/{APART}", apart=False)

    def _files(self) -> list[Path]:
        """Of every chunk its file. Chunks that were cut in another way are called otherwise."""
        cut = hashlib.sha256(repr(list(self.chunks)).encode()).hexdigest()[:6]
        return [self.path.with_name(f"{self.path.stem}.{cut}-{i}.npz") for i in range(len(self.chunks))]

    def _compute(self, index: int, *, wait: bool) -> None:
        """The chunk, unless it is there, or another process is at it and this one is not to wait."""
        file = self._files()[index]
        if file.exists():
            return
        with _lock(file.with_suffix(".lock"), wait=wait) as free:
            # Somebody may have done it in the meantime.
            if not free or file.exists() or is_complete(self.path):
                return
            started = time.perf_counter()
            with products("float32"):  # unless `compute` says otherwise, as attacks may
                values = self.compute(self.chunks[index])
            values["seconds"] = round(time.perf_counter() - started, 3)
            _write_chunk(file, values)

    def _combine(self) -> None:
        """Write the record from its chunks; one that cannot be read is removed instead, to be made again."""
        parts = []
        for file in self._files():
            try:
                parts.append(_read_chunk(file))
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):
                file.unlink(missing_ok=True)
        if len(parts) == len(self.chunks):
            made = _made_by(parts)
            self._put(self.combine([values for values, _ in parts]), made)

    def _put(self, result: Values, made: dict[str, Any]) -> None:
        """Write the record, its arrays first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arrays, values = _split(result)
        if self.apart:
            self._with_arrays()._put(result, made)
            arrays = {}
        elif arrays:
            _write_arrays(self.path.with_suffix(".npz"), arrays)
        document = {
            "name": self.name,
            "settings": self.settings,
            "hash": config_hash(self.settings),
            "result": values,
            "arrays": sorted(arrays),
            "provenance": made,
        }
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def _clear(self) -> None:
        """Delete chunks and locks; the record now holds all of it."""
        folder, start = self.path.parent, f"{self.path.stem}."
        for name in os.listdir(folder) if folder.is_dir() else ():
            if name.startswith(start) and name not in (self.path.name, f"{self.path.stem}.npz"):
                (folder / name).unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Whether the record is there, with the arrays it names (they may have been cleaned away)."""
    found = _found(path)
    return found is not None and (not found[1] or found[0].with_suffix(".npz").exists())


def _found(path: Path) -> tuple[Path, list[str]] | None:
    """Where the record lies, as a file of its own or published, and the names of its arrays."""
    if path.exists():
        return path, _own(path, path.stat().st_mtime_ns)
    for folder in (path.parent, paths.PUBLISHED / path.parent.name):
        if path.stem in (there := published(folder)):
            return folder / path.name, there.arrays(path.stem)
    return None


@cache
def _own(path: Path, _changed: int) -> list[str]:
    return json.loads(path.read_text())["arrays"]


def read(path: Path) -> Document:
    """A finished record; "arrays" holds the arrays of its .npz by name (none: an empty dict).

    Raises:
        FileNotFoundError: where there is none.
    """
    found = _found(path)
    if found is None:
        raise FileNotFoundError(f"no record {path.stem} in {path.parent}")
    place, names = found
    if place.exists():
        read_here.add(place)
    document = json.loads(place.read_text()) if place.exists() else published(place.parent)[path.stem]
    document["arrays"] = {}
    if names:
        with np.load(place.with_suffix(".npz"), allow_pickle=False) as file:
            document["arrays"] = {name: file[name] for name in names}
    return document


def _write_chunk(file: Path, values: Values) -> None:
    arrays, plain = _split(values)
    text = json.dumps({"values": plain, "made": provenance()}, allow_nan=False)
    _write_arrays(file, arrays | {JSON: np.array(text)})


def _read_chunk(file: Path) -> tuple[Values, dict[str, Any]]:
    """A chunk's values, arrays among them, and the provenance of the process that made it."""
    with np.load(file, allow_pickle=False) as stored:
        plain = json.loads(str(stored[JSON]))
        arrays = {name: stored[name] for name in stored.files if name != JSON}
    return plain["values"] | arrays, plain["made"]


def _made_by(parts: Sequence[tuple[Values, dict[str, Any]]]) -> dict[str, Any]:
    """The provenance of a record of these chunks; "also": of chunks that other code made, which is said."""
    made = provenance()
    others = {repr(_code(each)): each for _, each in parts}
    others.pop(repr(_code(made)), None)
    if others:
        commits = ", ".join(sorted({each["commit"][:12] for each in (made, *others.values())}))
        print(f"warning: a record was made by several versions of the code (commits {commits})", flush=True)
    made |= {"seconds": round(sum(values.pop("seconds") for values, _ in parts), 3)}
    return made | {"peak_memory_mib": _peak_memory()} | ({"also": [*others.values()]} if others else {})


def provenance() -> dict[str, Any]:
    """What a reader needs to make the record again: commit, versions, machine."""
    return {
        "commit": COMMIT,
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": _machine(),
    }


def _code(made: dict[str, Any]) -> tuple[Any, ...]:
    """What of a provenance may change numbers."""
    return made["commit"], made["python"], made["packages"]


@lru_cache
def _machine() -> str:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *gpus])


@lru_cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The checkout's commit, with "+changes" where the library differs from it; "unknown" outside of git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=paths.ROOT, capture_output=True, text=True, check=True
        ).stdout

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


def _split(values: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    return arrays, {key: value for key, value in values.items() if key not in arrays}


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, NumPy would append .npz to it
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file; True if we do. Where another process has it, wait (and say so), or yield False."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            yield False
            return
        print(f"another process is working on {path.name.removesuffix('.lock')}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()
