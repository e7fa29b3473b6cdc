"""Records survive what happens to long runs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import filelock
import numpy as np
import pytest

from coup_lib import paths, records


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def run(compute, chunks=range(3), settings=None):
    return records.chunked_record(
        "digits",
        "work",
        settings or {"a": 1},
        chunks,
        compute,
        lambda parts: {
            "values": [part["value"] for part in parts],
            "x": np.concatenate([p["x"] for p in parts]),
        },
    )


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


def test_a_truncated_journal_line_costs_one_chunk(folder):
    def fails_at_2(chunk):
        if chunk == 2:
            raise RuntimeError
        return square(chunk)

    with pytest.raises(RuntimeError):
        run(fails_at_2)
    (journal,) = folder.rglob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-10])
    seen = []
    record = run(lambda chunk: seen.append(chunk) or square(chunk))
    assert seen == [1, 2] and record["result"]["values"] == [0, 1, 4]


def test_a_record_without_its_arrays_is_made_again(folder):
    run(square)
    (arrays,) = folder.rglob("*.npz")
    arrays.unlink()
    assert run(square)["arrays"]["x"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_second_process_on_a_record_waits_and_says_so(folder, capsys):
    path = records.record_path("digits", "work", {"a": 1})
    path.parent.mkdir(parents=True)
    held, free = threading.Event(), threading.Event()

    def other():
        with filelock.FileLock(path.with_suffix(".lock")):
            held.set()
            free.wait(0.5)

    threading.Thread(target=other).start()
    held.wait()
    assert run(square)["result"]["values"] == [0, 1, 4]
    assert "another process is working on the record work-" in capsys.readouterr().out


KILLED = """
    import os, sys, time
    from coup_lib.config import Config
    from coup_lib.attacks import Attack
    from coup_lib.evaluate import Evaluation, Source
    slow = Attack.__call__
    def announced(*args, **kwargs):
        result = slow(*args, **kwargs)
        print("attacked", flush=True)
        time.sleep(float(sys.argv[1]))
        return result
    Attack.__call__ = announced
    object.__setattr__(Config().sizes, "chunk_size", 3)
    config = Config(n_images=12, n_iter=2, eot=2)
    Evaluation(config, verbose=False).score("coup", Source("apgd-ce", "coup"))
"""


def evaluation(folder, pause):
    script = textwrap.dedent(KILLED)
    environment = os.environ | {"COUP_RESULTS": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(pause)], env=environment, stdout=subprocess.PIPE, text=True
    )


def measured(folder):
    """Every finished record but for what a stopwatch says; the arrays byte for byte."""
    documents = {}
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text())
        for volatile in ("seconds", "peak_memory_mib"):
            del document["provenance"][volatile]
        documents[path.name] = json.dumps(document)
    for path in sorted(folder.rglob("*.npz")):
        documents[path.name] = path.read_bytes()
    return documents


def test_a_killed_evaluation_ends_with_the_same_json(tmp_path):
    """SIGKILL after two of four chunks, then the same call again, against an undisturbed run."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = evaluation(killed, pause=60)
    process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not list(killed.rglob("*.json"))

    process = evaluation(killed, pause=0.5)
    for _ in range(2):
        assert process.stdout.readline() == "attacked\n"
    time.sleep(0.8)  # the second chunk is in the journal by now
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = killed.rglob("*.journal")
    done_before = len(journal.read_text().splitlines())
    assert done_before >= 1

    process = evaluation(killed, pause=0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.count("attacked") == 4 - done_before
    assert evaluation(undisturbed, pause=0).wait(timeout=120) == 0
    assert measured(killed) == measured(undisturbed)
    assert len(measured(killed)) == 3  # the attack, its images, the score
