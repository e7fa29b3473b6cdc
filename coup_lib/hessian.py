"""Second derivatives through layers whose weights are frozen, without those of the weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

Map = Callable[[Tensor], Tensor]

# Thresholds below which Python's overhead exceeds the saving: multiplications per convolution, and numbers
# in an image, as networks for smaller images are small.
WORTHWHILE, WORTHWHILE_IMAGE = 10_000_000, 1024


class FrozenLayers(TorchFunctionMode):
    """In here a 2-D convolution or a batch norm with frozen weights is an affine map, and nothing else.

    PyTorch's second derivative of a convolution takes that of the weights as well, and throws it away where
    nobody asked for it: on a WRN-28-10 a fifth of the operations of a Hessian-vector product (53.0 instead of
    41.9 GFLOP), and about a quarter of its time on a CPU (docs/speed.md). That of a batch norm keeps the
    layer's input and walks through a dozen small operations for one product by channel. The numbers are the
    same.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        ours: dict[Any, Callable[..., Any]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}
        return ours.get(func, func)(*args, **(kwargs or {}))  # F.conv2d is torch.conv2d


def frozen_layers(x: Tensor) -> AbstractContextManager[Any]:
    """`FrozenLayers` where images x (B, ...) are large enough for it to pay."""
    return FrozenLayers() if x[0].numel() >= WORTHWHILE_IMAGE else nullcontext()


class _Affine(Function):
    """The affine map `there` of x, with linear part A, as `linear`, and Aᵀ, as `back`.

    It pulls v back to Aᵀv, whatever x; and that pulls w back to Aw, and so on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, linear: Map, back: Map) -> Tensor:
        ctx.linear, ctx.back = linear, back
        return there(x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _Affine.apply(v, ctx.back, ctx.back, ctx.linear), None, None, None


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """torch.conv2d, whose names these are; affine if its weights are frozen."""
    shape, settings = input.shape, (stride, padding, dilation, groups)

    def there(x: Tensor) -> Tensor:
        return torch.conv2d(x, weight, bias, *settings)

    # Under autocast gradients are in lower precision than the weights, and a GPU wants both alike.
    def linear(w: Tensor) -> Tensor:
        return torch.conv2d(w, weight.to(w.dtype), None, *settings)

    def back(v: Tensor) -> Tensor:
        return conv2d_input(shape, weight.to(v.dtype), v, *settings)

    ordinary = len(shape) == 4 and not isinstance(padding, str)  # no single image, no padding by name
    if ordinary and _frozen(weight, bias) and weight.numel() * input.numel() // shape[1] >= WORTHWHILE:
        return _Affine.apply(input, there, linear, back)
    return there(input)


def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm, whose names these are; affine, and by channel, if it does not learn."""

    def there(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    def scaled(v: Tensor) -> Tensor:
        # With fixed statistics the layer's input, here v once more, is not looked at; nor are a batch's own
        # statistics, of which a GPU's code wants to have none rather than to have no tensor.
        none = running_mean.new_empty(0)
        return torch.ops.aten.native_batch_norm_backward(
            v, v, weight, running_mean, running_var, none, none, False, eps, [True, False, False]
        )[0]

    if training or not _frozen(weight, bias):
        return there(input)
    return _Affine.apply(input, there, scaled, scaled)


def _frozen(*weights: Tensor | None) -> bool:
    return not any(given is not None and given.requires_grad for given in weights)
