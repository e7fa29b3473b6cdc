"""The score network as fused code by torch.compile, while it is attacked: minutes once, then faster."""

import time
from functools import cache

import torch
from torch import Tensor, nn

from coup_lib.data import SHAPES
from coup_lib.guidance import Guided, held
from coup_lib.networks.zoo import load_score

# PyTorch convolves fewer images in another way: that program would take longer to compile than it saves.
LEAST = 16


class Compiled(nn.Module):
    """A score (x (B, C, H, W), t of shape ()) → like x, compiled for batches of `LEAST` images and more.

    First derivatives only: PyTorch has none of second order for what it compiled, so guidance that is to be
    differentiated goes through the score itself, and so does a smaller batch. What is computed differs from
    the score in the last digits.

    Where compiling fails (no C++ compiler on a CPU, no Triton on a GPU), this says so and is the score.

    Args:
        score: in eval mode and frozen, on the device where it will be used.
        shape: (C, H, W) of its images.
        backend: of torch.compile.
    """

    def __init__(self, score: nn.Module, shape: tuple[int, int, int], backend: str = "inductor") -> None:
        super().__init__()
        self.score = score
        self._guided = any(isinstance(part, Guided) for part in score.modules())
        device = next(score.parameters()).device
        x, t = torch.zeros(LEAST, *shape, device=device), torch.tensor(0.05, device=device)
        started = time.monotonic()
        print("compiling the score network", flush=True)
        try:
            self._run = torch.compile(score.forward, backend=backend)
            with torch.no_grad():
                self(x, t)
            with torch.enable_grad():  # the program with a gradient is another one
                torch.autograd.grad(self(x.requires_grad_(), t).sum(), x)
        except Exception as error:  # whatever a compiler or what it asks for may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile failed, going on without it: {reason}", flush=True)
            self._run = score.forward
        else:
            print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at x (B, C, H, W) and t of shape ()."""
        second_order = self._guided and torch.is_grad_enabled() and held(x).requires_grad
        if len(x) < LEAST or second_order:
            return self.score(x, t)
        torch._dynamo.maybe_mark_dynamic(x, 0)  # one program for every B
        return self._run(x, t)


@cache
def compiled_score(dataset: str, name: str, precision: str, device: torch.device) -> Compiled:
    """`zoo.load_score`, compiled: once in a process, however many settings are tried with it."""
    return Compiled(load_score(dataset, name, precision=precision).to(device), SHAPES[dataset])
