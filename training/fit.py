"""Minimise a loss: AdamW or Muon, a moving average of the weights, a file to go on from after a kill."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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


def fit(
    network: nn.Module,
    loss: Loss,
    score: Callable[[nn.Module], float] | None = None,
    *,
    seed: int,
    steps: int,
    lr: float,
    decay: float,
    weight_decay: float,
    muon_lr: float | None = None,
    every: int = 100,
    precision: str = "float32",
    compiled: bool = False,
    state: Path | None = None,
    also: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Warm-up, cosine decay; returns the moving average of lowest score, or else the last.

    Args:
        loss: takes all its chance from the generator, which is on the network's device.
        score: lower is better; asked every so many steps.
        lr, weight_decay: of AdamW.
        decay: of the moving average, approached from below.
        muon_lr: of Muon, which then has the kernels but the last, AdamW the rest.
        precision: of the network's products while it is trained; weights are float32 all the time.
        compiled: train one program that torch.compile makes of the network: a minute first, then faster.
        state: where a run writes once a minute how far it is, and where the same run goes on from. Left
            there at the end: to ask again for as many steps costs nothing.
        also: what else tells this run from another one, such as the size of a batch.

    Raises:
        ValueError: for an unknown precision, or where another run left its state.
    """
    choice("precision", precision, PRECISIONS)
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    optimizers = _optimizers(network, lr, weight_decay, muon_lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    average = copy.deepcopy(network)
    best, lowest, first = average, math.inf, 0
    if compiled:
        network.compile()  # in place; its copies are not
    settings = {"seed": seed, "steps": steps, "lr": lr, "decay": decay, "precision": precision}
    settings |= {"muon_lr": muon_lr, **(also or {})}
    if state and state.exists():
        saved = _read(state, settings, device)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        generator.set_state(saved["generator"].cpu())
        first, lowest = saved["step"], saved["lowest"]
        if saved["best"]:
            best = copy.deepcopy(average)
            best.load_state_dict(saved["best"])

    def keep(step: int) -> None:
        assert state
        content = {
            "settings": settings,
            "step": step,
            "lowest": lowest,
            "network": network.state_dict(),
            "average": average.state_dict(),
            "best": None if best is average else best.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": generator.get_state(),
        }
        write_atomically(state, lambda temporary: torch.save(content, temporary))

    saved_at = time.monotonic()
    bar = tqdm(range(first, steps), mininterval=5, initial=first, total=steps)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext():
            value = loss(network, generator)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average_into(average, network, min(decay, (2 + step) / (11 + step)))
        if score and (step + 1) % every == 0 and (now := score(average)) < lowest:
            best, lowest = copy.deepcopy(average), now
            bar.set_postfix(validation=f"{now:.4f}")
        if state and (time.monotonic() - saved_at > SAVE_EVERY or step + 1 == steps):
            keep(step + 1)
            saved_at = time.monotonic()
    return best


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


def _optimizers(
    network: nn.Module, lr: float, weight_decay: float, muon_lr: float | None
) -> list[torch.optim.Optimizer]:
    # The last kernel speaks of outputs, not of features: Muon's authors leave it to AdamW.
    kernels = [p for p in network.parameters() if p.ndim > 1][:-1] if muon_lr else []
    chosen = {id(kernel) for kernel in kernels}
    rest = [p for p in network.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)
    return [adam, KernelMuon(kernels, muon_lr)] if muon_lr else [adam]


def _read(state: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    saved = torch.load(state, map_location=device, weights_only=True)
    if saved["settings"] != settings:
        raise ValueError(
            f"{state}: expected the state of a run with {settings}; got one with {saved['settings']}. "
            "Ask for that run, or remove the file to start anew"
        )
    return saved


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·network, parameter by parameter; buffers are copied."""
    # All at once: one by one, a GPU waits longer for these than for the network.
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for buffer, newer in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(newer)
