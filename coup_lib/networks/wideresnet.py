"""Wide ResNets (Zagoruyko & Komodakis 2016): the paper's classifiers.

Images (B, 3, 32, 32) in [0, 1] to logits (B, classes). Keys, shapes and order are those of RobustBench's
WideResNet, which DiffPure and RepDistiller share: their files load with `checkpoints.load_state`.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.networks.resnet import Normalise, Statistics, conv3x3

# Mean and std of red, green, blue as each publisher rounded them.
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class WideResNet(nn.Sequential):
    """WRN-depth-widen: three groups of pre-activation blocks with 16, 32 and 64 times widen channels.

    Without dropout, which is the identity in eval mode: networks trained with it load as well.

    Args:
        depth: 6n + 4 for groups of n blocks.
        widen: the factor of the channels.
        statistics: means and stds that normalise the channels inside; None leaves images as they are.

    Raises:
        ValueError: for another depth.
    """

    def __init__(
        self, depth: int, widen: int, classes: int = 10, statistics: Statistics | None = None
    ) -> None:
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"expected a depth of 6n + 4 (28, 40, 70), got {depth}")
        n = (depth - 4) // 6
        super().__init__(
            OrderedDict(
                normalise=Normalise(*statistics) if statistics else nn.Identity(),
                conv1=conv3x3(3, 16),
                block1=_group(n, 16, 16 * widen, stride=1),
                block2=_group(n, 16 * widen, 32 * widen, stride=2),
                block3=_group(n, 32 * widen, 64 * widen, stride=2),
                bn1=nn.BatchNorm2d(64 * widen),
                relu=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                fc=nn.Linear(64 * widen, classes),
            )
        )


class WideBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; where the width changes, the shortcut starts at the first ReLU."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.convShortcut = None if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(h)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(h))))


def _group(n: int, channels: int, out: int, stride: int) -> nn.Module:
    """n blocks under the keys layer.0 to layer.n-1; the first one changes width and resolution."""
    first, rest = WideBlock(channels, out, stride), (WideBlock(out, out, 1) for _ in range(n - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


def wrn_28_10(classes: int = 10) -> WideResNet:
    """The architecture of RobustBench's `Standard`: no normalisation inside."""
    return WideResNet(28, 10, classes)


def wrn_70_16() -> WideResNet:
    """DiffPure's CIFAR-10 classifier, its file cifar10/wrn-70-16-dropout/weights.pt."""
    return WideResNet(70, 16, 10, CIFAR10_STATISTICS)


def wrn_40_2() -> WideResNet:
    """The CIFAR-100 classifier of Chen et al. (2024), weights under "model" as RepDistiller saves them."""
    return WideResNet(40, 2, 100, CIFAR100_STATISTICS)
