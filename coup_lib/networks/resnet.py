"""CIFAR ResNets: two published classifiers small enough to try everything on (He et al. 2015).

Both take images (B, 3, 32, 32) in [0, 1] to logits (B, classes). Keys, shapes and order are those of the
published files, to be loaded by `checkpoints.load_state`.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std of red, green, blue

IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """(x - mean) / std for each of three channels; has no key in a state_dict.

    ValueError for anything but (B, 3, H, W): one grey channel would be broadcast without a word.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(x.shape)}")
        return (x - self.mean) / self.std


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution without bias that keeps the resolution, up to its stride."""
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class ResNet(nn.Sequential):
    """Stages of residual blocks, each but the first with half the resolution and twice the channels.

    Args:
        blocks: how many of them each stage has.
        width: channels of the first stage.
        projection: a stage's first shortcut is a 1×1 convolution with BatchNorm (option B); without it, it
            drops pixels and pads channels with zeros (option A), which needs no weights.
        statistics: means and stds that normalise the channels inside; None leaves images as they are.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        classes: int = 10,
        *,
        projection: bool,
        statistics: Statistics | None = None,
    ) -> None:
        widths = [width * 2**i for i in range(len(blocks))]
        parts: dict[str, nn.Module] = {
            "normalise": Normalise(*statistics) if statistics else nn.Identity(),
            "conv1": conv3x3(3, width),
            "bn1": nn.BatchNorm2d(width),
            "relu": nn.ReLU(),
        }
        for i, n in enumerate(blocks):
            first = Block(widths[max(i - 1, 0)], widths[i], projection)
            rest = (Block(widths[i], widths[i], projection) for _ in range(n - 1))
            parts[f"layer{i + 1}"] = nn.Sequential(first, *rest)
        parts |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        super().__init__(OrderedDict(parts, linear=nn.Linear(widths[-1], classes)))


class Block(nn.Module):
    """Two convolutions around a shortcut; more channels out than in mean stride 2."""

    def __init__(self, channels: int, out: int, projection: bool) -> None:
        super().__init__()
        stride = 1 if out == channels else 2
        self.conv1 = conv3x3(channels, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 and projection:
            convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out))
        elif stride > 1:
            self.shortcut = PadShortcut((out - channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class PadShortcut(nn.Module):
    """Every second pixel, between zeros: (B, C, H, W) to (B, channels + C + channels, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


def cifar_resnet(depth: int) -> ResNet:
    """ResNet-20, -32, -44, -56, ... for CIFAR-10 as published at github.com/akamaster/pytorch_resnet_cifar10.

    ValueError for a depth that is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"expected a depth of 6n + 2 (20, 32, 44, 56), got {depth}")
    return ResNet([(depth - 2) // 6] * 3, 16, projection=False, statistics=IMAGENET_STATISTICS)


def resnet18() -> ResNet:
    """The CIFAR-10 ResNet-18 whose weights are in the wheel of pyautoattack, examples/model_test.pt.

    It was trained on images in [0, 1] as they are.
    """
    return ResNet([2, 2, 2, 2], 64, projection=True)
