"""CIFAR ResNets: against the published code that the wheel of pyautoattack ships, and on real images."""

import os
import runpy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coup_lib.guidance import gradient_of
from coup_lib.networks.checkpoints import load_state
from coup_lib.networks.resnet import Block, cifar_resnet, resnet18

DATA = Path(os.environ.get("COUP_DATA", ""))
IMAGES = DATA / "cifar10_exact_subset.npz"
needs_images = pytest.mark.skipif(not IMAGES.is_file(), reason="COUP_DATA has no cifar10_exact_subset.npz")


@cache
def wheel() -> Path:
    """The folder with ResNet-18, its code and its weights."""
    return Path(find_spec("pyautoattack").origin).parent / "examples"


@cache
def wheel_state() -> dict[str, Tensor]:
    return torch.load(wheel() / "model_test.pt", map_location="cpu", weights_only=True)


def accuracy(network: nn.Module, n: int = 200) -> float:
    """The share of the first n CIFAR-10 test images that the network gets right."""
    with np.load(IMAGES) as file:
        x, y = torch.from_numpy(file["x_test"][:n]).float() / 255, torch.from_numpy(file["y_test"][:n])
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


def test_resnet18_computes_what_the_wheels_own_code_does():
    theirs = runpy.run_path(str(wheel() / "resnet.py"))["ResNet18"]().eval()
    theirs.load_state_dict(wheel_state())
    ours = load_state(resnet18(), wheel_state(), "model_test.pt")
    assert list(ours.state_dict()) == list(wheel_state())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    # In float64: in float32 a ReLU a rounding error away from zero may fall on either side.
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    ours_grad, theirs_grad = (gradient_of(lambda x, f=f: f(x).amax(1), x) for f in (ours, theirs))
    assert (ours_grad - theirs_grad).norm() < 1e-12 * theirs_grad.norm()


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_option_a_has_the_published_number_of_parameters(depth, parameters):
    assert sum(value.numel() for value in cifar_resnet(depth).parameters()) == parameters


def test_option_a_drops_pixels_and_pads_channels_on_both_sides():
    block = Block(2, 4, projection=False).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut
    x = torch.rand(1, 2, 6, 6)
    zeros = torch.zeros(1, 1, 3, 3)
    assert torch.equal(block(x), torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1))


@needs_images
def test_resnet18_is_right_about_real_images():
    """93.8 % of the first 1017 test images; a wrong input range or padding costs tens of points."""
    assert accuracy(load_state(resnet18(), wheel_state(), "model_test.pt")) > 0.91


@needs_images
@pytest.mark.parametrize(("depth", "file"), [(20, "resnet20-12fca82f.th"), (56, "resnet56-4bfd9763.th")])
def test_published_resnets_are_right_about_real_images(depth, file):
    """91.6 % and 92.7 % of the first 1017 test images."""
    path = DATA / "models" / file
    if not path.is_file():
        pytest.skip(f"COUP_DATA has no models/{file}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = load_state(cifar_resnet(depth), state, file)
    published = [key.removeprefix("module.") for key in state["state_dict"]]
    ours = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    assert ours == published
    assert accuracy(network) > 0.89


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*got {depth}"):
        cifar_resnet(depth)


def test_a_grey_image_is_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 1, 32, 32\)"):
        cifar_resnet(20)(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_precision_it_is_given(dtype):
    network = cifar_resnet(8).eval().to(dtype)
    assert network(torch.rand(2, 3, 32, 32, dtype=dtype)).dtype == dtype
