"""Results on disk: a JSON record per experiment, a journal while it is being made.

Work is a list of chunks. Each finished chunk is appended to `results/<profile>/<name>-<hash>.journal` and
synced, so a killed run continues behind its last whole chunk. When all are there, the JSON record is moved
into place in one step and the journal goes. The hash is that of the settings: asking for the same settings
reads the record back, changed ones are another record.
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
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from coup_lib import paths
from coup_lib.files import write_atomically

PROTOCOL = 2  # part of every hash: raise it when a change of the code changes what a record means
PACKAGES = ("torch", "torchsde", "numpy", "scikit-learn", "pyautoattack", "autoattack", "coup-lib")

Progress = Callable[[int, int], None]


def config_hash(settings: dict[str, Any]) -> str:
    """Twelve hex digits that name these settings (any JSON-able dict; key order does not matter)."""
    text = json.dumps({"protocol": PROTOCOL, **settings}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_path(profile: str, name: str, settings: dict[str, Any]) -> Path:
    """Where the JSON record of these settings is, or will be."""
    return paths.RESULTS / profile / f"{name}-{config_hash(settings)}.json"


def record(profile: str, name: str, settings: dict[str, Any], compute: Callable[[], dict]) -> dict[str, Any]:
    """The record of one piece of work that is too short to need chunks; its numbers are under "result"."""
    return chunked_record(profile, name, settings, [0], lambda _: compute(), lambda parts: parts[0])


def chunked_record(
    profile: str,
    name: str,
    settings: dict[str, Any],
    chunks: Sequence[Any],
    compute: Callable[[Any], dict[str, Any]],
    combine: Callable[[list[dict[str, Any]]], dict[str, Any]],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read the record of these settings back, or compute its chunks (resuming a journal) and write it.

    Args:
        chunks: what `compute` is called with, in this order.
        compute: one chunk to a JSON-able dict. NumPy arrays in it go to the record's .npz, not to the JSON.
        combine: all chunks' dicts, in order, to the record's "result".
        progress: called as progress(chunks done, chunks in all) after each chunk.

    If another process is working on the same record, this one says so and waits for it.
    """
    path = record_path(profile, name, settings)
    if is_complete(path):
        return read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if is_complete(path):  # finished by another process since we looked
            return read(path)
        journal = Journal(path.with_suffix(".journal"))
        parts = journal.read()
        for index, chunk in enumerate(chunks):
            if index not in parts:
                started = time.perf_counter()
                arrays, values = _split(compute(chunk))
                values["seconds"] = round(time.perf_counter() - started, 3)
                parts[index] = journal.append(index, values, arrays)
            if progress:
                progress(index + 1, len(chunks))
        ordered = [parts[index] for index in range(len(chunks))]
        seconds = sum(part.pop("seconds") for part in ordered)
        arrays, result = _split(combine(ordered))
        if arrays:
            _write_arrays(path.with_suffix(".npz"), arrays)
        document = {
            "name": name,
            "settings": settings,
            "hash": config_hash(settings),
            "result": result,
            "arrays": sorted(arrays),
            "provenance": provenance() | {"seconds": round(seconds, 3), "peak_memory_mib": _peak_memory()},
        }
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))
        journal.remove()
    return read(path)


def is_complete(path: Path) -> bool:
    """Whether the record is there, with the arrays it names (they may have been cleaned away)."""
    return path.exists() and (not json.loads(path.read_text())["arrays"] or path.with_suffix(".npz").exists())


def read(path: Path) -> dict[str, Any]:
    """A finished record; "arrays" holds the arrays of its .npz by name (none: an empty dict)."""
    document = json.loads(path.read_text())
    if document["arrays"]:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            document["arrays"] = {name: file[name] for name in document["arrays"]}
    else:
        document["arrays"] = {}
    return document


class Journal:
    """Finished chunks, one JSON line each, in the order they were finished; arrays lie beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, Any]]:
        """Chunk index → its values. A line cut short by a crash is dropped, and its chunk done again."""
        parts: dict[int, dict[str, Any]] = {}
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            try:
                entry = json.loads(line)
                arrays = self._arrays(entry) if line.endswith(b"\n") else None
            except (ValueError, OSError):
                break
            if arrays is None:
                break
            parts[entry["chunk"]] = entry["values"] | arrays
            whole += line
        if self.path.exists() and self.path.stat().st_size != len(whole):
            os.truncate(self.path, len(whole))
        return parts

    def append(self, index: int, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write one chunk and sync it to the disk; returns what `read` would give for it."""
        if arrays:
            _write_arrays(self._array_path(index), arrays)
        entry = {"chunk": index, "values": values, "arrays": bool(arrays)}
        line = json.dumps(entry, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return json.loads(line)["values"] | arrays

    def remove(self) -> None:
        """Delete the journal and its arrays; the record now holds all of it."""
        for path in self.path.parent.glob(f"{self.path.stem}.chunk*.npz"):
            path.unlink()
        self.path.unlink(missing_ok=True)

    def _array_path(self, index: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.chunk{index}.npz")

    def _arrays(self, entry: dict[str, Any]) -> dict[str, np.ndarray]:
        if not entry["arrays"]:
            return {}
        with np.load(self._array_path(entry["chunk"]), allow_pickle=False) as file:
            return dict(file)


def provenance() -> dict[str, Any]:
    """What a reader needs to make the record again: commit, versions, machine."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


@lru_cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache
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
def _lock(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is working on the record {path.name}; waiting for it to end", flush=True)
        lock.acquire()
    try:
        yield
        # Whoever locks a new file of this name finds the record complete.
        path.with_suffix(".lock").unlink(missing_ok=True)
    finally:
        lock.release()
