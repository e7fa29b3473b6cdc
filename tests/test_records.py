"""Records survive what happens to long runs."""

import json
import os
import shutil
import threading
from dataclasses import replace

import filelock
import numpy as np
import pytest
import torch

from coup_lib import paths
from coup_lib.evaluation import records

ALONE = records.Worker()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def work(compute, chunks=range(3), settings=None, worker=ALONE):
    def combine(parts):
        return {"values": [p["value"] for p in parts], "x": np.concatenate([p["x"] for p in parts])}

    return records.ChunkedRecord("digits", "work", settings or {"a": 1}, chunks, compute, combine, worker)


def run(*args, **kwargs):
    return work(*args, **kwargs).finish()


def square(chunk):
    return {"value": chunk**2, "x": np.full(2, chunk, dtype=np.float32)}


def test_a_record_holds_what_it_takes_to_make_it_again(folder):
    record = run(square)
    assert record["result"] == {"values": [0, 1, 4]}
    assert record["arrays"]["x"].tolist() == [0, 0, 1, 1, 2, 2]
    assert record["settings"] == {"a": 1} and record["hash"] == records.config_hash({"a": 1})
    provenance = record["provenance"]
    assert {"commit", "python", "packages", "machine", "seconds", "peak_memory_mib"} <= provenance.keys()
    assert "torch" in provenance["packages"]
    assert sorted(path.suffix for path in folder.rglob("work-*")) == [".json", ".npz"]


def test_a_record_names_the_gpus(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    records._machine.cache_clear()
    assert run(square)["provenance"]["machine"].endswith(f"{os.cpu_count()} cores, GPU 0, GPU 1")
    records._machine.cache_clear()


def test_the_same_settings_are_read_back_and_changed_ones_are_not():
    run(square)

    def refuse(chunk):
        raise AssertionError("computed again")

    assert run(refuse)["result"]["values"] == [0, 1, 4]
    with pytest.raises(AssertionError, match="computed again"):
        run(refuse, settings={"a": 2})


def test_key_order_does_not_matter_and_values_do():
    assert records.config_hash({"a": 1, "b": 2}) == records.config_hash({"b": 2, "a": 1})
    assert records.config_hash({"a": 1}) != records.config_hash({"a": 1.5})


def test_a_failed_run_goes_on_behind_its_last_chunk():
    seen = []

    def fails_at_2(chunk):
        seen.append(chunk)
        if chunk == 2 and len(seen) == 3:
            raise RuntimeError("power cut")
        return square(chunk)

    with pytest.raises(RuntimeError, match="power cut"):
        run(fails_at_2)
    assert run(fails_at_2)["result"]["values"] == [0, 1, 4]
    assert seen == [0, 1, 2, 2]


def chunk_files(folder):
    """Those of finished chunks, in their order; a lock is called alike, the record's arrays are not."""
    return sorted(folder.rglob("work-*.*-*.npz"))


def test_a_chunk_whose_file_is_damaged_is_made_again(folder):
    def fails_at_2(chunk):
        return square(chunk) if chunk < 2 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        run(fails_at_2)
    _, last = chunk_files(folder)
    last.write_bytes(last.read_bytes()[:-10])
    seen = []
    record = run(lambda chunk: seen.append(chunk) or square(chunk))
    assert seen == [2, 1] and record["result"]["values"] == [0, 1, 4]


def test_chunks_that_were_cut_in_another_way_are_not_taken(folder):
    """Killed with one size of chunks and resumed with another: nothing is missing and nothing is mixed."""

    def labels(chunk):
        if killed and chunk == 4:
            raise KeyboardInterrupt
        return {"value": list(range(chunk, min(chunk + size, 8))), "x": np.zeros(1)}

    killed, size = True, 2
    with pytest.raises(KeyboardInterrupt):
        run(labels, chunks=range(0, 8, size))
    for size in (3, 4, 5):
        killed = False
        found = work(labels, chunks=range(0, 8, size)).finish()["result"]["values"]
        assert [label for part in found for label in part] == list(range(8))
        shutil.rmtree(folder / "digits")


def test_a_kill_between_the_record_and_the_end_of_its_chunks_leaves_nothing_behind(folder, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(records.ChunkedRecord, "_clear", lambda record: None)
        made = run(square)
    assert chunk_files(folder)
    assert run(square)["result"] == made["result"]
    assert {path.suffix for path in folder.rglob("*.*")} == {".json", ".npz"}


def test_a_record_without_its_arrays_is_made_again(folder):
    run(square)
    (arrays,) = folder.rglob("*.npz")
    arrays.unlink()
    assert run(square)["arrays"]["x"].tolist() == [0, 0, 1, 1, 2, 2]


def test_arrays_kept_apart_are_made_again_where_they_are_not_here(folder, capsys):
    made = replace(work(square), apart=True).finish()
    assert made["arrays"] == {} and not list(folder.glob("digits/*.npz"))
    assert replace(work(None), apart=True).arrays()["x"].tolist() == [0, 0, 1, 1, 2, 2]
    assert capsys.readouterr().out == ""

    def gone():
        shutil.rmtree(folder / "digits" / records.APART)
        return replace(work(None), apart=True).finish() == made  # whole without them

    assert gone()
    assert replace(work(square), apart=True).arrays()["x"].tolist() == [0, 0, 1, 1, 2, 2]
    said = capsys.readouterr().out
    assert "made again from the seed" in said and "not to the bit" not in said
    assert gone()
    replace(work(lambda chunk: square(chunk) | {"value": -1}), apart=True).arrays()
    assert "not to the bit what is on record" in capsys.readouterr().out


@pytest.fixture
def said(monkeypatch):
    """Set once a record says that it waits: what it waits for is held until then, however long that takes."""
    event = threading.Event()
    monkeypatch.setattr(
        records, "print", lambda *said, **how: print(*said, **how) or event.set(), raising=False
    )
    return event


def test_a_second_process_on_a_record_waits_and_says_so(folder, capsys, said):
    path = records.record_path("digits", "work", {"a": 1})
    path.parent.mkdir(parents=True)
    held = threading.Event()

    def other():
        with filelock.FileLock(work(square)._files()[0].with_suffix(".lock")):
            held.set()
            said.wait(60)

    threading.Thread(target=other).start()
    held.wait()
    assert run(square)["result"]["values"] == [0, 1, 4]
    assert "another process is working on work-" in capsys.readouterr().out


def files(folder):
    """Every file but for what a stopwatch says."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*.npz")}
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        del record["provenance"]["seconds"], record["provenance"]["peak_memory_mib"]
        found[path.name] = record
    return found


@pytest.mark.parametrize("count", [2, 7])
def test_workers_share_the_chunks_and_make_the_same_record(folder, monkeypatch, count):
    done = {index: [] for index in range(count)}
    for index in range(
        count
    ):  # one after the other, none waits: the first has only its own if others are at work
        part = work(square, range(5), worker=records.Worker(index, count))
        others = [
            filelock.FileLock(part._files()[i].with_suffix(".lock")) for i in range(5) if i % count != index
        ]
        part.path.parent.mkdir(parents=True, exist_ok=True)
        for lock in others:
            lock.acquire()
        replace(part, compute=lambda chunk, index=index: done[index].append(chunk) or square(chunk)).share()
        for lock in others:
            lock.release()
    assert done == {index: [chunk for chunk in range(5) if chunk % count == index] for index in range(count)}
    merged = work(lambda chunk: pytest.fail("computed again"), range(5)).finish()
    assert merged["result"]["values"] == [0, 1, 4, 9, 16]
    shared = files(folder)
    assert (
        len(list(folder.rglob("*"))) == 3
    )  # the folder of the profile, the record, its arrays: no chunk, no lock
    monkeypatch.setattr(paths, "RESULTS", folder / "alone")
    run(square, range(5))
    assert files(folder / "alone") == shared


def test_a_worker_takes_its_own_chunks_first_and_then_those_left_undone():
    seen = []
    run(lambda chunk: seen.append(chunk) or square(chunk), range(5), worker=records.Worker(1, 3))
    assert seen == [1, 4, 2, 0, 3]


def test_a_worker_waits_for_a_chunk_in_work_and_does_it_if_the_other_fails(folder, capsys, said):
    part = work(square, worker=records.Worker(0, 2))
    part.path.parent.mkdir(parents=True)
    held = threading.Event()

    def other():
        with filelock.FileLock(part._files()[1].with_suffix(".lock")):
            held.set()
            said.wait(60)

    threading.Thread(target=other).start()
    held.wait()
    part.share()
    assert [file.exists() for file in part._files()] == [True, False, True]
    assert part.finish()["result"]["values"] == [0, 1, 4]
    assert "another process is working on work-" in (out := capsys.readouterr().out) and "-1; waiting" in out


def test_a_record_says_whose_code_made_its_chunks(monkeypatch, capsys):
    monkeypatch.setattr(records, "COMMIT", "old")
    work(square, worker=records.Worker(0, 2)).share()
    monkeypatch.setattr(records, "COMMIT", "new")
    provenance = run(square)["provenance"]
    assert provenance["commit"] == "new"
    assert "made by several versions of the code (commits new, old)" in capsys.readouterr().out
    assert [made["commit"] for made in provenance["also"]] == ["old"]
    assert "also" not in run(square, settings={"a": 2})["provenance"]


def test_where_nothing_may_be_made_a_record_is_read_or_missing():
    run(square)
    with records.reading_only():
        assert run(None)["result"]["values"] == [0, 1, 4]
        with pytest.raises(records.Missing, match="work is not on record"):
            run(square, settings={"a": 2})
