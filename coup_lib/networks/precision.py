"""Cheaper products in the score network while it is attacked. What an attack found is scored in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRECISIONS = ("float32", "tf32", "bfloat16")


class Bfloat16(nn.Module):
    """A network (x, labels) → like x whose convolutions and matrix products are in bfloat16.

    Weights, x, the result and sums over many numbers stay as they are; so do gradients in x, but for the
    products that they are made of.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x, labels).to(x.dtype)


def check_precision(precision: str, device: torch.device) -> None:
    """ValueError for a precision that the device has not. Records made elsewhere can be read all the same."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is a GPU's, expected float32 or bfloat16 on {device}; got 'tf32'")


@contextmanager
def products(precision: str) -> Iterator[None]:
    """In here a GPU's float32 products are float32's, or TF32's if precision says so; see `PRECISIONS`.

    PyTorch allows TF32 in convolutions unless told otherwise.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
