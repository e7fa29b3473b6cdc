"""Records survive what happens to long runs."""

import json
import os
import re
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


def work(compute, chunks=range(3), settings=None, worker=ALONE):
    def combine(parts):
        return {"values": [p["value"] for p in parts], "x": np.concatenate([p["x"] for p in parts])}

    return records.ChunkedRecord("digits", "work", settings or {"a": 1}, chunks, compute, combine, worker)


def run(*args, **kwargs):
    return work(*args, **kwargs).finish()


def square(chunk):
    return {"value": chunk**2, "x": np.full(2, chunk, dtype=np.float32)}


def test_a_record_holds_what_it_takes_to_make_it_again(results_folder):
    record = run(square)
    assert record["result"] == {"values": [0, 1, 4]}
    assert record["arrays"]["x"].tolist() == [0, 0, 1, 1, 2, 2]
    assert record["settings"] == {"a": 1} and record["hash"] == records.config_hash({"a": 1})
    provenance = record["provenance"]
    assert {"commit", "python", "packages", "machine", "seconds", "peak_memory_mib"} <= provenance.keys()
    assert "torch" in provenance["packages"]
    assert sorted(path.suffix for path in results_folder.rglob("work-*")) == [".json", ".npz"]


def test_a_record_names_the_gpus(results_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert run(square)["provenance"]["machine"].endswith(f"{os.cpu_count()} cores, GPU 0, GPU 1")


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


def test_no_chunk_is_begun_that_would_not_end_in_time(monkeypatch):
    """Three seconds each: at 0 and at 3 there is time, at 6 there is none before 8."""
    now, made = [0.0], []

    def takes_three_seconds(chunk):
        now[0] += 3
        made.append(chunk)
        return square(chunk)

    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(records.time, clock, lambda: now[0])
    with pytest.raises(records.OutOfTime, match="work: its next chunk"), records.until(8):
        run(takes_three_seconds)
    with pytest.raises(records.OutOfTime), records.until(5):
        run(takes_three_seconds, settings={"a": 2})
    assert made == [0, 1]
    assert run(takes_three_seconds)["result"]["values"] == [0, 1, 4] and made == [0, 1, 2]


def breaks_off(at):
    """Chunks as `square` makes them, up to one at which the run fails."""

    def compute(chunk):
        if chunk == at:
            raise RuntimeError("power cut")
        return square(chunk)

    return compute


def test_a_failed_run_goes_on_behind_its_last_chunk():
    with pytest.raises(RuntimeError, match="power cut"):
        run(breaks_off(2))
    seen = []
    assert run(lambda chunk: seen.append(chunk) or square(chunk))["result"]["values"] == [0, 1, 4]
    assert seen == [2]


@pytest.mark.parametrize(("n", "first", "then"), [(8, 2, 4), (8, 4, 2), (9, 3, 4), (9, 4, 3)])
def test_a_run_that_goes_on_with_another_chunk_size_makes_every_image_once(results_folder, n, first, then):
    """Also where there are as many chunks as before: 9 images are 3 + 3 + 3 or 4 + 4 + 1."""

    def labels(size, fails=False):
        def compute(start):
            if fails and start:
                raise RuntimeError("killed")
            return {"labels": list(range(start, min(start + size, n)))}

        def combine(parts):
            return {"labels": [label for part in parts for label in part["labels"]]}

        return records.ChunkedRecord("digits", "work", {"n": n}, range(0, n, size), compute, combine)

    with pytest.raises(RuntimeError, match="killed"):
        labels(first, fails=True).finish()
    assert labels(then).finish()["result"]["labels"] == list(range(n))
    assert len(list((results_folder / "digits").iterdir())) == 1, (
        "the chunks of the first run were left behind"
    )


def test_a_kill_between_the_record_and_its_chunks_end_leaves_nothing_behind(results_folder):
    with pytest.raises(RuntimeError):
        run(breaks_off(2))
    chunks = {path: path.read_bytes() for path in results_folder.glob("*/*chunk*.npz")}
    made = run(square)
    for path, content in chunks.items():
        path.write_bytes(content)
    assert len(chunks) == 2 and run(square)["result"] == made["result"]
    assert sorted(path.suffix for path in (results_folder / "digits").iterdir()) == [".json", ".npz"]


def test_an_array_of_objects_is_refused():
    """Reading it back would run code."""
    with pytest.raises(TypeError, match="expected arrays of numbers or of text"):
        run(lambda chunk: {"x": np.array([print])})


def test_a_record_without_its_arrays_is_made_again(results_folder):
    run(square)
    (arrays,) = results_folder.rglob("*.npz")
    arrays.unlink()
    assert run(square)["arrays"]["x"].tolist() == [0, 0, 1, 1, 2, 2]


def test_arrays_kept_apart_are_made_again_where_they_are_not_here(results_folder, capsys):
    made = replace(work(square), apart=True).finish()
    assert made["arrays"] == {} and not list(results_folder.glob("digits/*.npz"))
    assert replace(work(None), apart=True).arrays()["x"].tolist() == [0, 0, 1, 1, 2, 2]
    assert capsys.readouterr().err == ""

    def gone():
        shutil.rmtree(results_folder / "digits" / records.APART)
        return replace(work(None), apart=True).finish() == made  # whole without them

    assert gone()
    assert replace(work(square), apart=True).arrays()["x"].tolist() == [0, 0, 1, 1, 2, 2]
    said = capsys.readouterr().err
    assert "made again from the seed" in said and "not to the bit" not in said
    assert gone()
    replace(work(lambda chunk: square(chunk) | {"value": -1}), apart=True).arrays()
    assert "not to the bit what is on record" in capsys.readouterr().err


@pytest.fixture
def said(monkeypatch):
    """Set once a record says that it waits: what it waits for is held until then, however long that takes."""
    event = threading.Event()
    monkeypatch.setattr(
        records, "print", lambda *said, **how: print(*said, **how) or event.set(), raising=False
    )
    return event


def lock_of(record, chunk):
    return filelock.FileLock(f"{record.chunk_path(chunk)}.lock")


def files(folder):
    """Every file but for what a stopwatch says."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*.npz")}
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text())
        del record["provenance"]["seconds"], record["provenance"]["peak_memory_mib"]
        found[path.name] = record
    return found


@pytest.mark.parametrize("count", [2, 7])
def test_workers_share_the_chunks_and_make_the_same_record(results_folder, monkeypatch, count):
    done = {index: [] for index in range(count)}
    for index in range(count):  # one after the other: all chunks but this one's own are in others' work
        part = work(
            lambda chunk, index=index: done[index].append(chunk) or square(chunk),
            range(5),
            worker=records.Worker(index, count),
        )
        part.path.parent.mkdir(parents=True, exist_ok=True)
        others = [lock_of(part, chunk) for chunk in range(5) if chunk % count != index]
        for lock in others:
            lock.acquire()
        part.share()
        for lock in others:
            lock.release()
    assert done == {index: [chunk for chunk in range(5) if chunk % count == index] for index in range(count)}
    merged = work(lambda chunk: pytest.fail("computed again"), range(5)).finish()
    assert merged["result"]["values"] == [0, 1, 4, 9, 16]
    shared = files(results_folder)
    assert len(list((results_folder / "digits").iterdir())) == 2, "chunks or locks were left behind"
    monkeypatch.setattr(paths, "RESULTS", results_folder / "alone")
    run(square, range(5))
    assert files(results_folder / "alone") == shared


def test_a_worker_takes_its_own_chunks_first_and_then_those_left_undone():
    seen = []
    run(lambda chunk: seen.append(chunk) or square(chunk), range(5), worker=records.Worker(1, 3))
    assert seen == [1, 4, 2, 0, 3]


def test_a_worker_waits_for_a_chunk_in_work_and_does_it_if_the_other_fails(results_folder, capsys, said):
    part = work(square, worker=records.Worker(0, 2))
    part.path.parent.mkdir(parents=True)
    held = threading.Event()

    def other():
        with lock_of(part, 1):
            held.set()
            said.wait(60)

    threading.Thread(target=other).start()
    held.wait()
    part.share()
    assert [part.chunk_path(chunk).exists() for chunk in range(3)] == [True, False, True]
    assert part.finish()["result"]["values"] == [0, 1, 4]
    assert re.search(r"another process is working on work-.*\.chunk1of3", capsys.readouterr().err)


def test_a_record_says_whose_code_made_its_chunks(monkeypatch, capsys):
    monkeypatch.setattr(records, "COMMIT", "0123456789abcdef")
    with pytest.raises(RuntimeError):
        run(breaks_off(2))
    monkeypatch.setattr(records, "COMMIT", "fedcba9876543210")
    provenance = run(square)["provenance"]
    assert provenance["commit"] == "fedcba9876543210"
    assert [made["commit"] for made in provenance["also"]] == ["0123456789abcdef"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: work-") and line.endswith("(commits 0123456789ab, fedcba987654)")
    assert "also" not in run(square, settings={"a": 2})["provenance"]
    assert capsys.readouterr().err == ""


def test_where_nothing_may_be_made_a_record_is_read_or_missing():
    run(square)
    with records.reading_only():
        assert run(None)["result"]["values"] == [0, 1, 4]
        with pytest.raises(records.Missing, match="work is not on record"):
            run(square, settings={"a": 2})
