"""Published records, results/<profile>/records.jsonl, and their accuracies in scores.csv: a line for each.

A run leaves its records as files of their own in build/results/<profile>/, which stand before published ones
of the same settings. To publish puts them into the profile's one file.

What many records share (labels, the settings of an attack, the versions of a run's packages) stands once, in
lines of its own before them. Outcomes of images are strings of digits, one digit an image; what is known to
float32 only is base64 of its bytes. Reading gives back every record to the last bit.
"""

import base64
import hashlib
import json
import shutil
from collections import UserDict, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd

from coup_lib.evaluation.outcomes import Accuracy, right_draws
from coup_lib.files import write_atomically

Document = dict[str, Any]
FILE, TABLE = "records.jsonl", "scores.csv"
SHARED = "@"  # begins a reference to what is shared
DIGITS, FLOATS = "#", "~"  # begin what a list is packed into
PLAIN = "="  # begins a text that would else be taken for one of these
SHORT = 8  # shorter lists stand as they are
OWN = ("seconds", "peak_memory_mib")  # of a record's provenance, what is not shared


def published(folder: Path) -> "Published":
    """The published records of a profile, whose folder this is; none where there is no file."""
    path = folder / FILE
    return _read(path, path.stat().st_mtime_ns) if path.exists() else Published({}, {})


class Published(UserDict[str, Document]):
    """Records by `key`, in the order of their names; each is unpacked when it is asked for.

    Args:
        packed: the records as their lines have them; arrays' names stand there as they are.
        shared: what these lines refer to.
    """

    def __init__(self, packed: dict[str, Document], shared: dict[str, Any]) -> None:
        super().__init__(packed)
        self.shared = shared

    def __getitem__(self, name: str) -> Document:
        document = _unpacked(self.data[name], self.shared)
        document["provenance"] |= document["provenance"].pop("by")
        return document


def key(document: Document) -> str:
    """What a record is called: its readable name and the hash of its settings."""
    return f"{document['name']}-{document['hash']}"


def publish(folder: Path, documents: Iterable[Document]) -> None:
    """Put records into the profile's file; those that are there by the same key are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):  # two runs may publish at once
        _publish(folder, documents)


def _publish(folder: Path, documents: Iterable[Document]) -> None:
    there = dict(published(folder)) | {key(document): document for document in documents}
    shared: dict[str, Any] = {}
    lines = [_line(_pack(there[name], shared)) for name in sorted(there)]
    head = [_line({name: shared[name]}) for name in sorted(shared)]
    write_atomically(folder / FILE, lambda temporary: temporary.write_text("".join(head + lines)))
    if len(table := scores(there)):
        write_atomically(folder / TABLE, lambda temporary: table.to_csv(temporary, index=False))


def scores(there: Mapping[str, Document]) -> pd.DataFrame:
    """A row per accuracy: of which target, under which attack on whom, from how many images and draws.

    Accuracies are of a single noise draw, in percent, with their 95 % interval.
    """
    return pd.DataFrame([_row(there[name]) for name in sorted(there) if "report" in there[name]["result"]])


def _row(document: Document) -> dict[str, Any]:
    settings, result, made = (document[name] for name in ("settings", "result", "provenance"))
    attack = settings["attack"]
    accuracy = Accuracy.of(right_draws(result["report"], result["labels"]))
    return {
        "target": settings["target"]["name"],
        "classifier": settings["target"]["classifier"],
        "surrogate": attack["defence"]["name"] if "defence" in attack else "",
        **{name: attack.get(name, "") for name in ("attack", "gradient", "norm", "eps", "split")},
        "n": accuracy.n,
        "draws": settings["n_draws"],
        "accuracy": round(accuracy.value, 2),
        "low": round(accuracy.low, 2),
        "high": round(accuracy.high, 2),
        "seconds": made["seconds"],
        "hash": document["hash"],
        "commit": made["commit"][:12],
    }


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int) -> Published:
    packed: dict[str, Document] = {}
    shared: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        if "name" in values:
            packed[key(values)] = values
        else:
            shared |= values
    return Published(packed, shared)


def _line(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False) + "\n"


def _pack(document: Document, shared: dict[str, Any]) -> Document:
    """The record as its line has it; what it shares with others is put into `shared`."""
    document = _packed(document)
    made, settings, result = (document[name] for name in ("provenance", "settings", "result"))
    own = {name: made.pop(name) for name in OWN if name in made}
    nested = {name: _share(value, shared) for name, value in settings.items() if isinstance(value, dict)}
    labels = {"labels": _share(result["labels"], shared)} if "labels" in result else {}
    return document | {
        "settings": settings | nested,
        "result": result | labels,
        "provenance": own | {"by": _share(made, shared)},
    }


def _share(value: Any, shared: dict[str, Any]) -> str:
    name = SHARED + hashlib.sha256(_line(value).encode()).hexdigest()[:12]
    shared[name] = value
    return name


def _packed(value: Any) -> Any:
    """A list of digits, of rows of digits or of float32 numbers as a string; anything else as it is."""
    if isinstance(value, dict):
        return {name: _packed(each) for name, each in value.items()}
    if isinstance(value, str) and value[:1] in (SHARED, DIGITS, FLOATS, PLAIN):
        return PLAIN + value
    if not isinstance(value, list) or len(value) < SHORT:
        return value
    rows = value if isinstance(value[0], list) else [value]
    if all(isinstance(row, list) and row and all(map(_is_digit, row)) for row in rows):
        return DIGITS + " ".join("".join(map(str, row)) for row in rows)
    if all(type(number) is float for number in value):
        numbers = np.array(value, dtype="<f4")
        if numbers.astype(float).tolist() == value:
            return FLOATS + base64.b64encode(numbers.tobytes()).decode()
    return value


def _is_digit(number: Any) -> bool:
    return type(number) is int and 0 <= number <= 9


def _unpacked(value: Any, shared: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {name: _unpacked(each, shared) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    kind, text = value[:1], value[1:]
    if kind == PLAIN:
        return text
    if kind == SHARED:
        return _unpacked(shared[value], shared)
    if kind == FLOATS:
        return np.frombuffer(base64.b64decode(text), "<f4").astype(float).tolist()
    if kind == DIGITS:
        rows = [list(map(int, row)) for row in text.split(" ")]
        return rows if len(rows) > 1 else rows[0]
    return value


def move(records: Iterable[Path], results: Path) -> None:
    """Move records that are files of their own, with their arrays, to the published ones below `results`."""
    folders = defaultdict(list)
    for path in sorted(records):
        folders[results / path.parent.name].append(path)
    for there, files in folders.items():
        there.mkdir(parents=True, exist_ok=True)
        for arrays in (path.with_suffix(".npz") for path in files):  # not those of chunks in work
            if arrays.exists():
                shutil.move(arrays, there / arrays.name)
        publish(there, [json.loads(path.read_text()) for path in files])
        for path in files:
            path.unlink()
        print(f"results/{there.name}: {len(files)} records published; {len(published(there))} there are")
