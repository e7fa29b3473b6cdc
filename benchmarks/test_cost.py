"""Cost against work: seconds at several amounts of images, steps, EOT draws, pixels and processes."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DEVICE, REPLAY, ours, problem, take_turns

from coup_lib.attacks import BatchedEOT, cross_entropy
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.paths import is_smoke

ROUNDS = 5
WORK = {
    "images": (32, 64, 128, 256, 512),
    "steps": (5, 10, 20, 40, 80),
    "EOT draws": (1, 2, 4, 8, 16),
    "pixels": (16, 24, 32, 48, 64),
}


def images(count: int) -> Callable[[], object]:
    """One exact gradient of COUP for each image of digits."""
    return _gradient(images=count, n_steps=10)


def steps(count: int) -> Callable[[], object]:
    """What longer paths cost."""
    return _gradient(images=64, n_steps=count)


def draws(count: int) -> Callable[[], object]:
    """Gradients of eight images, averaged over noise draws as attacks do it."""
    given = problem("digits", "coup", images=8, t_star=0.1, n_steps=10)
    batched = BatchedEOT(given.defence, count, 1280, cross_entropy)
    labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    return lambda: batched.mean_gradient(given.x, labels)


def pixels(side: int) -> Callable[[], object]:
    """One step's gradient of COUP on colour images of other sizes, by the networks of CIFAR's size."""
    given = problem("cifar", "coup", images=4, t_star=0.002, n_steps=2, size=side)
    return lambda: ours(given, REPLAY)


def _gradient(**size: Any) -> Callable[[], object]:
    given = problem("digits", "coup", t_star=0.1, **size)
    return lambda: ours(given, REPLAY)


TIMED = {"images": images, "steps": steps, "EOT draws": draws, "pixels": pixels}


@pytest.mark.benchmark(group="cost")
@pytest.mark.parametrize("kind", TIMED)
def test_cost(benchmark: Any, kind: str) -> None:
    amounts = WORK[kind][:3] if is_smoke() else WORK[kind]
    rivals = {str(amount**2 if kind == "pixels" else amount): TIMED[kind](amount) for amount in amounts}
    take_turns(benchmark, rivals, ROUNDS, work=kind)


N_SHARED = 256 if is_smoke() else 512  # in chunks of 128


def _start(barrier: Any) -> None:
    """Of a worker: load everything, then wait for the others."""
    torch.set_num_threads(1)
    Evaluation(Config(n_images=1), verbose=False).defence("coup")
    barrier.wait()


def _share(shard: int, num_shards: int, seed: int, results: str) -> None:
    """One shard of an attack on COUP; ends when all shards are done."""
    from coup_lib import paths

    paths.RESULTS = Path(results)
    config = Config(
        n_images=N_SHARED, n_iter=2, eot=1, n_draws=1, seed=seed, shard=shard, num_shards=num_shards
    )
    Evaluation(config, verbose=False).predictions({"coup": {"it": against("apgd-ce", "coup")}})


@pytest.mark.benchmark(group="cost")
def test_processes(benchmark: Any, tmp_path: Path) -> None:
    """A record of four chunks, shared by processes of one thread each."""
    if DEVICE.type != "cpu":
        pytest.skip("one GPU has no processes to share")
    counts = [count for count in (1, 2, 4) if count <= (os.cpu_count() or 1)]
    seconds: dict[str, list[float]] = {str(count): [] for count in counts}

    def one_round() -> None:
        for count in counts:
            context = get_context("spawn")
            barrier, seed = context.Barrier(count + 1), len(seconds[str(count)])
            with context.Pool(count, _start, [barrier]) as pool:
                barrier.wait()
                began = time.perf_counter()
                pool.starmap(
                    _share, [(shard, count, seed, str(tmp_path / str(count))) for shard in range(count)], 1
                )
                seconds[str(count)].append(time.perf_counter() - began)

    benchmark.pedantic(one_round, rounds=1 if is_smoke() else 3)
    benchmark.extra_info.update(device=DEVICE.type, work="processes", seconds=seconds)
