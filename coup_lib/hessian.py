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

Settings = tuple[Any, ...]  # stride, padding, dilation, groups

# Below these Python's part in what follows costs more than it saves: multiplications in one call, and numbers
# in an image, as networks for smaller images are small.
WORTHWHILE, WORTHWHILE_IMAGE = 10_000_000, 1024


class FrozenLayers(TorchFunctionMode):
    """In here a 2-D convolution or a batch norm with frozen weights is an affine map, and nothing else.

    PyTorch's second derivative of a convolution takes that of the weights as well, and throws it away where
    nobody asked for it: on a WRN-28-10 a fifth of the operations of a Hessian-vector product (53.0 instead of
    41.9 GFLOP), and nearly a third of its time on a CPU. That of a batch norm keeps the layer's input and
    walks through a dozen small operations for one product by channel. The numbers are the same.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:  # F.conv2d is the same object
            x, weight, bias, settings = _arguments(*args, **kwargs)
            frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
            ordinary = x.ndim != 4 or isinstance(settings[1], str)  # one image; padding by name
            if frozen and not ordinary and weight.numel() * x.numel() // x.shape[1] >= WORTHWHILE:
                return _Convolution.apply(x, weight, bias, settings)
        if func is F.batch_norm:
            x, mean, variance, weight, bias, training, eps = _batch_norm_arguments(*args, **kwargs)
            frozen = not any(given is not None and given.requires_grad for given in (weight, bias))
            if frozen and not training:
                return _BatchNorm.apply(x, mean, variance, weight, bias, eps)
        return func(*args, **kwargs)


def frozen_layers(x: Tensor) -> AbstractContextManager[Any]:
    """`FrozenLayers` where images x (B, ...) are large enough for it to pay."""
    return FrozenLayers() if x[0].numel() >= WORTHWHILE_IMAGE else nullcontext()


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Settings]:
    """What torch.conv2d was called with; the names are its own."""
    return input, weight, bias, (stride, padding, dilation, groups)


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """The same of F.batch_norm."""
    return input, running_mean, running_var, weight, bias, training, eps


class _Convolution(Function):
    """Ax + b for x (B, C, H, W); it pulls v back to Aᵀv, whatever x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        ctx.shape, ctx.settings = x.shape, settings
        ctx.save_for_backward(weight)
        return torch.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Under autocast v is in lower precision than the weights, and a GPU wants both alike.
        return _Transposed.apply(v, weight.to(v.dtype), ctx.shape, ctx.settings), None, None, None


class _Transposed(Function):
    """Aᵀv; it pulls w back to Aw."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, shape: torch.Size, settings: Settings) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(weight)
        return conv2d_input(shape, weight, v, *settings)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _Convolution.apply(w, weight, None, ctx.settings), None, None, None


class _BatchNorm(Function):
    """weight (x - mean) / √(variance + eps) + bias, by channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(mean, variance, weight)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return _Scaled.apply(v, *ctx.saved_tensors, ctx.eps), None, None, None, None, None


class _Scaled(Function):
    """weight v / √(variance + eps), its own derivative."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, eps: float
    ) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(mean, variance, weight)
        # With fixed statistics the layer's input, here v once more, is not looked at; nor are a batch's own
        # statistics, of which a GPU's code wants to have none rather than to have no tensor.
        none = mean.new_empty(0)
        return torch.ops.aten.native_batch_norm_backward(
            v, v, weight, mean, variance, none, none, False, eps, [True, False, False]
        )[0]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        return _Scaled.apply(w, *ctx.saved_tensors, ctx.eps), None, None, None, None
