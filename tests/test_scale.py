"""Several processes on one run: the same records, a killed job started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import random_cifar

from coup_lib.evaluation.config import Config

ROOT = Path(__file__).parents[1]

SHARDS = """
    import multiprocessing, sys
    from dataclasses import replace
    from pathlib import Path
    from coup_lib import paths
    from coup_lib.evaluation import config, protocol, run

    config.PROFILES["digits"] = replace(config.PROFILES["digits"], chunk_size=2)
    attacks, attack = [], run.Attack.__call__

    def counted(*args):
        attacks.append(args)
        return attack(*args)

    def work(shard, count, ready):
        tiny = {"n_images": 14, "n_iter": 1, "eot": 1, "n_draws": 1, "n_steps": 2}
        evaluation = protocol.Evaluation(config.Config(**tiny, shard=shard, num_shards=count), verbose=False)
        evaluation.bench.classifier, evaluation.bench.score_network, evaluation.images
        ready.wait()
        evaluation.columns(["coup", "reverse"])
        Path(f"{count}", f"{shard}.made").write_text(str(len(attacks)))

    run.Attack.__call__ = counted
    fork = multiprocessing.get_context("fork")  # PyTorch takes seconds to be imported: once is enough
    for count in map(int, sys.argv[1:]):
        paths.RESULTS = Path(f"{count}", "results").absolute()
        paths.RESULTS.mkdir(parents=True)
        ready = fork.Barrier(count)
        shards = [fork.Process(target=work, args=(shard, count, ready)) for shard in range(count)]
        for shard in shards:
            shard.start()
        for shard in shards:
            shard.join()
"""


def numbers(folder):
    """Every record and array, but for what a stopwatch says and what a kill left half written."""
    whole = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    found = {path.relative_to(folder): path.read_bytes() for path in whole}
    for path in list(found):
        if path.suffix == ".json":
            found[path] = json.loads(found[path])
            del found[path]["provenance"]
    return found


def test_one_two_and_seven_shards_make_the_same_records(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SHARDS), "1", "2", "7"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
    alone = numbers(tmp_path / "1" / "results")
    assert len(alone) > 10
    for count in (2, 7):
        assert numbers(tmp_path / f"{count}" / "results") == alone
        made = [int(path.read_text()) for path in (tmp_path / f"{count}").glob("*.made")]
        assert len(made) == count, "one of the shards did not reach its end"
        assert sum(attacks > 0 for attacks in made) > 1, f"one of the shards did it all: {made}"


def test_a_shard_is_checked_before_any_work():
    with pytest.raises(ValueError, match="shard: expected a whole number of at least 0 and at most 2; got 3"):
        Config(shard=3, num_shards=3)


def slot(*command, **environment):
    line = [sys.executable, str(ROOT / "workflow" / "gpu_slot.py"), *command]
    clean = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    return subprocess.Popen(line, env=clean | environment, stdout=subprocess.PIPE, text=True)


SAY = ("sh", "-c", "echo gpu $CUDA_VISIBLE_DEVICES; read line < $FIFO")


def test_each_command_gets_a_gpu_of_its_own_and_the_next_one_waits(tmp_path):
    fifos = [tmp_path / str(index) for index in range(3)]
    for fifo in fifos:
        os.mkfifo(fifo)
    shared = {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3,5"}
    first, second = (slot(*SAY, **shared, FIFO=str(fifo)) for fifo in fifos[:2])
    assert {first.stdout.readline(), second.stdout.readline()} == {"gpu 3\n", "gpu 5\n"}
    third = slot(*SAY, **shared, FIFO=str(fifos[2]))
    assert third.stdout.readline() == "all GPUs (3, 5) are taken: waiting for one\n"
    fifos[0].write_text("go on\n")
    assert third.stdout.readline() in ("gpu 3\n", "gpu 5\n")
    for fifo in fifos[1:]:
        fifo.write_text("go on\n")
    assert [process.wait(timeout=30) for process in (first, second, third)] == [0, 0, 0]


@pytest.mark.parametrize(
    "extra", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "1,2", "SLURM_JOB_ID": "7"}]
)
def test_without_gpus_and_under_slurm_the_command_just_runs(extra):
    process = slot("sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3", **extra)
    assert process.communicate(timeout=30)[0] == extra["CUDA_VISIBLE_DEVICES"] + "\n"
    assert process.returncode == 3


def snakemake(folder, *options, root=ROOT, **kwargs):
    pytest.importorskip("snakemake", reason="the extra `scale` wants Python 3.11")
    line = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "workflow" / "Snakefile")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*line, "--directory", str(folder), *options], text=True, **pipes, **kwargs)


@pytest.mark.parametrize("profile", ["laptop", "multi-gpu", "slurm"])
def test_every_profile_plans_shards_then_figures(tmp_path, profile):
    options = ["--profile", str(ROOT / "workflow" / "profiles" / profile), "--dry-run", "--printshellcmds"]
    run = snakemake(tmp_path, *options, "--config", "shards=7", "parameters=-p classifier cnn-large")
    plan = run.communicate(timeout=600)[0]
    assert run.returncode == 0, plan
    counts = dict(re.findall(r"^(needed|shard|figures|report) +(\d+)$", plan, re.MULTILINE))
    assert counts == {"needed": "1", "shard": "63", "figures": "9", "report": "1"}
    assert re.search(r"papermill .*04_autoattack.ipynb.* -p norm l2 -p shard 6 -p num_shards 7", plan)
    assert re.search(r"estimate.py\" --obtain .* --classifier cnn-large 04_autoattack 04_auto", plan)


def test_an_unknown_setting_is_refused(tmp_path):
    run = snakemake(tmp_path, "--dry-run", "--config", "norm=l2")
    assert "--config: expected profile, budget, " in run.communicate(timeout=600)[0] and run.returncode


# In the place of the project's notebooks: work of some seconds, in parts that are killed alone.
WORK = """
import time
from coup_lib.evaluation.records import ChunkedRecord, Worker

for index in range(10):
    ChunkedRecord(
        "digits", f"work-{index}", {}, range(4), lambda at: time.sleep(0.1) or {"at": at},
        lambda parts: {"at": [part["at"] for part in parts]}, Worker(shard, num_shards)
    ).finish()
"""
BROKEN = "raise ValueError('eps: expected a number greater than 0; got -1')"


def workflow(folder, code):
    """A copy of the workflow whose notebook 02 runs this code."""
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    parameters = nbformat.v4.new_code_cell(
        "profile = 'digits'\nbudget = 'quick'\nshard = 0\nnum_shards = 1", metadata={"tags": ["parameters"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks" / "02_ablation.ipynb")
    return folder


def test_a_killed_shard_is_started_again_and_nothing_is_lost(tmp_path):
    results = tmp_path / "results"
    environment = os.environ | {"COUP_RESULTS": str(results)}
    options = ["--cores", "2", "--retries", "2", "--config", "shards=2", "runs=02_ablation"]
    run = snakemake(
        tmp_path, *options, root=workflow(tmp_path, WORK), env=environment, start_new_session=True
    )
    try:
        killed = kill_one(run, results, "-p shard 1 ")
        said = run.communicate(timeout=600)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, said
    assert killed and "Trying to restart job" in said
    assert (tmp_path / "build" / "scale" / "02_ablation.ipynb").exists()
    made = [record["result"] for record in numbers(results).values()]
    assert made == [{"at": [0, 1, 2, 3]}] * 10


def test_a_shard_that_fails_says_why(tmp_path):
    options = ["--cores", "2", "--config", "shards=1", "runs=02_ablation"]
    run = snakemake(tmp_path, *options, root=workflow(tmp_path, BROKEN))
    said = run.communicate(timeout=600)[0]
    assert run.returncode
    assert "02_ablation, shard 0, failed; the end of its log:" in said
    assert "ValueError: eps: expected a number greater than 0; got -1\n" in said


def test_missing_networks_are_named_once_before_any_shard_starts(tmp_path):
    random_cifar.write(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "COUP_SMOKE"}
    environment |= {"COUP_DATA": str(tmp_path), "COUP_MODELS": str(tmp_path / "none")}
    given = "parameters=-p subset first -p norm l2"  # in which norm a robust classifier guides in 08
    config = ["profile=cifar10", "shards=36", "runs=02_ablation 08_beyond", given]
    run = snakemake(
        tmp_path, "--cores", "2", "--retries", "2", "--keep-going", "--config", *config, env=environment
    )
    said = run.communicate(timeout=600)[0]
    assert run.returncode and "rule shard" not in said
    assert said.count("wrn-70-16-dropout.pt") == 1
    robust = "cifar10/L2/Wang2023Better_WRN-28-10.pt"
    assert all(
        name in said for name in ("cifar10/Linf/Standard.pt", "cifar10/score/checkpoint_8.pth", robust)
    )


def kill_one(run, results, line):
    """SIGKILL a run's process with this in its command line, and its kernel, at the first record."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list(results.rglob("*.json")):
            for process in psutil.Process(run.pid).children(recursive=True):
                if "papermill" in process.cmdline() and line in " ".join(process.cmdline()) + " ":
                    for one in (process, *process.children()):
                        one.kill()
                    return True
        time.sleep(0.05)
    return False
