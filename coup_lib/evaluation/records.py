"""Results of runs: a JSON record per experiment, a journal while it is being made, and reading both back.

Work is a list of chunks. Each finished chunk is appended to `results/<profile>/<name>-<hash>.journal` and
synced, so a killed run continues behind its last whole chunk. When all are there, the JSON record is moved
into place in one step and the journal goes. The hash is that of the settings: asking for the same settings
reads the record back, from such a file or from the published ones (`store`); changed ones are another record.

Several processes, on one machine or on many with a common folder, may share the chunks of all records: each
`Worker` has a journal of its own, and a lock for each chunk says what is in work. The numbers do not depend
on who did what.
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
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

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

Progress = Callable[[int, int], None]
Values = dict[str, Any]


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

        progress is called as progress(chunks done, chunks in all) after each.
        """
        journal = Journal(self.path, self.worker)
        if is_complete(self.path):
            journal.remove()  # its writer may have been killed before it came to that
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(journal.path.with_suffix(".journal.lock")):
            journal.mend()
            for index in self.worker.order(len(self.chunks)):
                with _lock(_chunk_path(self.path, index, "lock"), wait=False) as free:
                    if free:
                        self._compute(index, journal)
                if progress:
                    progress(len(journal.parts()), len(self.chunks))
        if is_complete(self.path):  # by another: the locks taken since are for nobody
            journal.remove()

    def finish(self, progress: Progress | None = None) -> dict[str, Any]:
        """Read the record back, or compute what is missing (resuming a journal), write it and return it.

        Where another process works on a chunk, or as the same worker, this one says so and waits for it.
        """
        self.share(progress)
        if not is_complete(self.path):
            self._await_and_write()
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

    def _await_and_write(self) -> None:
        journal = Journal(self.path, self.worker)
        for index in range(len(self.chunks)):
            if is_complete(self.path):
                break
            if index not in journal.parts():
                with _lock(_chunk_path(self.path, index, "lock")):
                    self._compute(index, journal)
        if not is_complete(self.path):
            with _lock(self.path.with_suffix(".lock")):
                if not is_complete(self.path):
                    self._write([journal.parts()[index] for index in range(len(self.chunks))])
        journal.remove()

    def _compute(self, index: int, journal: "Journal") -> None:
        """The chunk whose lock is held, unless somebody did it in the meantime."""
        if index in journal.parts() or is_complete(self.path):
            return
        started = time.perf_counter()
        with products("float32"):  # unless `compute` says otherwise, as attacks may
            arrays, values = _split(self.compute(self.chunks[index]))
        values["seconds"] = round(time.perf_counter() - started, 3)
        journal.append(index, len(self.chunks), values, arrays)

    def _write(self, parts: list["Part"]) -> None:
        made = provenance()
        others = {repr(_code(part.made)): part.made for part in parts if part.made}
        others.pop(repr(_code(made)), None)
        made |= {"seconds": round(sum(part.values.pop("seconds") for part in parts), 3)}
        made |= {"peak_memory_mib": _peak_memory()} | ({"also": list(others.values())} if others else {})
        self._put(*_split(self.combine([part.values for part in parts])), made)

    def _put(self, arrays: Values, result: Values, made: dict[str, Any]) -> None:
        """Write the record, its arrays first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.apart:
            self._with_arrays()._put(arrays, result, made)
            arrays = {}
        elif arrays:
            _write_arrays(self.path.with_suffix(".npz"), arrays)
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


def is_complete(path: Path) -> bool:
    """Whether the record is there, with the arrays it names (they may have been cleaned away)."""
    document, place = _document(path)
    return document is not None and (not document["arrays"] or place.with_suffix(".npz").exists())


def _document(path: Path) -> tuple[Document | None, Path]:
    """The record of this file or else the published one, if any, and the file that its arrays lie beside."""
    if path.exists():
        return json.loads(path.read_text()), path
    for folder in (path.parent, paths.PUBLISHED / path.parent.name):
        if document := published(folder).get(path.stem):
            return document, folder / path.name
    return None, path


def read(path: Path) -> Document:
    """A finished record; "arrays" holds the arrays of its .npz by name (none: an empty dict).

    Raises:
        FileNotFoundError: where there is none.
    """
    document, place = _document(path)
    if document is None:
        raise FileNotFoundError(f"no record {path.stem} in {path.parent}")
    if document["arrays"]:
        with np.load(place.with_suffix(".npz"), allow_pickle=False) as file:
            document["arrays"] = {name: file[name] for name in document["arrays"]}
    else:
        document["arrays"] = {}
    return document


@dataclass(frozen=True)
class Part:
    """A finished chunk: its numbers and arrays, and the provenance of the process that made it."""

    values: Values
    made: dict[str, Any] | None


class Journal:
    """Finished chunks, one JSON line each, in the order they were finished; arrays lie beside it.

    A worker appends to its own file and reads those of all.
    """

    def __init__(self, record: Path, worker: Worker = Worker()) -> None:
        self.record = record
        name = "journal" if worker.count == 1 else f"{worker.index}of{worker.count}.journal"
        self.path = record.with_name(f"{record.stem}.{name}")
        self._parts: dict[int, Part] = {}

    def parts(self) -> dict[int, Part]:
        """Chunk index → what any worker made of it; a line cut short, or without its arrays, is none."""
        for path in (path for path in self._files() if path.suffix == ".journal"):
            for entry in entries(path):
                if entry["chunk"] not in self._parts:
                    try:
                        values = entry["values"] | self._arrays(entry)
                    except (OSError, ValueError):
                        continue
                    self._parts[entry["chunk"]] = Part(values, entry.get("made"))
        return self._parts

    def mend(self) -> None:
        """Cut off a last line that a crash left half written: the next one has to start on its own."""
        if self.path.exists():
            text = self.path.read_bytes()
            os.truncate(self.path, text.rfind(b"\n") + 1)

    def append(self, index: int, count: int, values: Values, arrays: dict[str, np.ndarray]) -> None:
        """Write one chunk of `count` and sync it to the disk."""
        if arrays:
            _write_arrays(_chunk_path(self.record, index, "npz"), arrays)
        entry = {"chunk": index, "of": count, "values": values, "arrays": bool(arrays), "made": provenance()}
        with self.path.open("ab") as file:
            file.write((json.dumps(entry, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete all workers' journals, arrays and locks; the record now holds all of it."""
        for path in self._files():
            if path not in (self.record, self.record.with_suffix(".npz")):
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Whatever is called like the record. Not by a pattern: to match thousands of names takes longer."""
        folder, start = self.record.parent, f"{self.record.stem}."
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(folder / name for name in names if name.startswith(start))

    def _arrays(self, entry: dict[str, Any]) -> dict[str, np.ndarray]:
        if not entry["arrays"]:
            return {}
        with np.load(_chunk_path(self.record, entry["chunk"], "npz"), allow_pickle=False) as file:
            return dict(file)


def entries(journal: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal: chunk, of (how many), values, arrays (whether there are any), made."""
    try:
        lines = journal.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:  # the record was finished since we looked
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n"):
            yield entry


def _chunk_path(record: Path, index: int, suffix: str) -> Path:
    return record.with_name(f"{record.stem}.chunk{index}.{suffix}")


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
