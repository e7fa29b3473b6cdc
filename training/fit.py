"""Minimise a loss: AdamW or Muon, a moving average of the weights, a file to go on from after a kill."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from coup_lib.checks import choice
from coup_lib.files import write_atomically

PRECISIONS = ("float32", "bfloat16")
SAVE_EVERY = 60  # seconds

Loss = Callable[[nn.Module, Generator], Tensor]
Watch = Callable[[int], bool]


class Stopped(RuntimeError):
    """Training was stopped by whoever watched it; its state is saved."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and what tells one run from another.

    lr, weight_decay: of AdamW. decay: of the moving average, approached from below. pgd_steps: of the attack
    in adversarial training. begins_with: the weights from which the network is trained further, by their name
    or SHA-256. muon_lr: of Muon, which then has the kernels but the last, AdamW the rest. every: steps after
    which the score is asked. images: how many there are. precision: of the network's products; weights are
    float32 all the time. compiled: train one program that torch.compile makes of the network: a minute first,
    then faster.

    Raises:
        ValueError: for an unknown precision.
    """

    steps: int
    batch: int
    lr: float
    decay: float
    weight_decay: float
    pgd_steps: int = 0
    begins_with: str = ""
    muon_lr: float | None = None
    every: int = 100
    seed: int = 0
    images: int = 0
    precision: str = "float32"
    compiled: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        choice("precision", self.precision, PRECISIONS)


class TrainState:
    """All that a run needs to go on: network, moving average and the best of it, optimisers, chance, step."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.recipe, self.average = recipe, copy.deepcopy(network)
        self.step, self.lowest = 0, math.inf
        self.best: dict[str, Any] | None = None  # weights
        self.curve: list[tuple[int, float]] = []  # (step, score of the moving average)
        self.generator = Generator(next(network.parameters()).device).manual_seed(recipe.seed)
        # The last kernel speaks of outputs, not of features: Muon's authors leave it to AdamW.
        kernels = [p for p in network.parameters() if p.ndim > 1][:-1] if recipe.muon_lr else []
        chosen = {id(kernel) for kernel in kernels}
        rest = [p for p in network.parameters() if id(p) not in chosen]
        adam = torch.optim.AdamW(rest, lr=recipe.lr, weight_decay=recipe.weight_decay)
        muon = [KernelMuon(kernels, recipe.muon_lr)] if recipe.muon_lr else []
        self.optimizers: list[torch.optim.Optimizer] = [adam, *muon]
        self.parts: list[Any] = [network, self.average, *self.optimizers]

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all."""
        content = {key: getattr(self, key) for key in ("step", "lowest", "best", "curve")}
        content |= {"recipe": repr(self.recipe), "generator": self.generator.get_state()}
        content["parts"] = [part.state_dict() for part in self.parts]
        write_atomically(path, lambda temporary: torch.save(content, temporary))

    def load(self, path: Path) -> None:
        """Take up a saved state; ValueError for that of another recipe."""
        saved = torch.load(path, map_location=self.generator.device, weights_only=True)
        if (got := saved.get("recipe")) != repr(self.recipe):
            raise ValueError(
                f"{path}: expected the state of a run with {self.recipe}; got one with {got}. "
                "Ask for that run, or remove the file to start anew"
            )
        self.step, self.lowest, self.best = saved["step"], saved["lowest"], saved["best"]
        self.curve = saved.get("curve", [])  # older states have none
        self.generator.set_state(saved["generator"].cpu())
        for part, content in zip(self.parts, saved["parts"], strict=True):
            part.load_state_dict(content)


def fit(
    network: nn.Module,
    loss: Loss,
    recipe: Recipe,
    score: Callable[[nn.Module], float] | None = None,
    state: Path | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Warm-up, cosine decay; returns the moving average of lowest score, or else the last.

    Args:
        loss: takes all its chance from the generator, which is on the network's device.
        score: lower is better.
        state: where a run writes once a minute how far it is, and where the same run goes on from. Left
            there at the end: to ask again for as many steps costs nothing.
        watch: called after each step with its number; says whether to stop there.

    Raises:
        ValueError: where another run left its state.
        Stopped: where `watch` said so; the same call goes on from there.
    """
    run, saved_at = TrainState(network, recipe), time.monotonic()
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    if recipe.compiled:
        network.compile()  # in place; its copies are not
    if state and state.exists():
        run.load(state)
    low = recipe.precision == "bfloat16"
    bar = tqdm(range(run.step, recipe.steps), mininterval=5, initial=run.step, total=recipe.steps)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for optimizer, peak in zip(run.optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        network.zero_grad()
        with torch.autocast(run.generator.device.type, torch.bfloat16, enabled=low):
            value = loss(network, run.generator)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
        average_into(run.average, network, min(recipe.decay, (2 + step) / (11 + step)))
        run.step = step + 1
        if score and run.step % recipe.every == 0:
            run.curve.append((run.step, now := score(run.average)))
            bar.set_postfix(validation=f"{now:.4f}")
            if now < run.lowest:
                run.best, run.lowest = copy.deepcopy(run.average.state_dict()), now
        stop = run.step < recipe.steps and watch is not None and watch(run.step)
        if state and (stop or time.monotonic() - saved_at > SAVE_EVERY or run.step == recipe.steps):
            run.save(state)
            saved_at = time.monotonic()
        if stop:
            raise Stopped(f"after {run.step} of {recipe.steps} steps")
    if run.best:
        run.average.load_state_dict(run.best)
    return run.average


class KernelMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024), a kernel (out, in, k, k) seen as the matrix (out, in·k·k) that it is."""

    def __init__(self, kernels: Sequence[nn.Parameter], lr: float) -> None:
        self.kernels = kernels
        # The same memory: what moves a matrix moves its kernel.
        self.matrices = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in kernels]
        super().__init__(self.matrices, lr=lr, weight_decay=0.0)

    def step(self, closure: Any = None) -> Any:
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view_as(matrix)
        return super().step(closure)


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·network, parameter by parameter; buffers are copied."""
    # All at once: one by one, a GPU waits longer for these than for the network.
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for buffer, newer in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(newer)
