"""Wide ResNets against the published ones: manifests, and numbers on random weights (tests/parity)."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from parity_fixtures import PARITY, digest, manifest, off, published, seeded
from torch import Tensor, nn

from coup_lib.guidance import gradient_of, log_confidence
from coup_lib.networks.checkpoints import CheckpointError, load_state
from coup_lib.networks.wideresnet import CIFAR10_STATISTICS, WideResNet, wrn_28_10, wrn_40_2, wrn_70_16

# Relative L2, by the precision of the published numbers; an own implementation reaches 6e-7 and 2e-15.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MANIFESTS = {
    "WideResNet-28-10 (robustbench Standard, cifar10)": wrn_28_10,
    "WideResNet-28-10 100 classes (no robustbench Standard for cifar100; same class, num_classes=100)": (
        lambda: wrn_28_10(100)
    ),
    "wrn_16_2": lambda: WideResNet(16, 2),
    "wrn_10_1": lambda: WideResNet(10, 1),
}


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def layout(network: nn.Module) -> list[tuple[str, list[int]]]:
    return [(key, list(value.shape)) for key, value in network.state_dict().items()]


def shapes(name: str) -> list[tuple[str, list[int]]]:
    """The keys and shapes of a published network, in order."""
    files = ("wideresnet_manifests", "wideresnet_reduced_manifests")
    models = {name: model for file in files for name, model in manifest(file)["models"].items()}
    return [(key, shape) for key, shape, _dtype, _kind in models[name]["keys"]]


def first(name: str, n_images: int = 4) -> dict[str, Any]:
    """A fixture's first images; gradients in float64 where there is a file of them."""
    precise = name.replace("_io", "_grad_float64")
    arrays = published(name) | (published(precise) if (PARITY / f"{precise}.npz").exists() else {})
    return {key: value[:n_images] if isinstance(value, Tensor) else value for key, value in arrays.items()}


def with_weights(network: nn.Module, io: dict[str, Any]) -> nn.Module:
    """With the weights behind a fixture, drawn in the order of the network's keys."""
    weights = seeded([row for row in layout(network) if "num_batches" not in row[0]], int(io["weight_seed"]))
    assert digest(weights) == io["weights_sha256"]
    return load_state(network, weights, "weights")


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """By what the precision of the published numbers allows."""
    assert off(ours, theirs) < TOLERANCE[theirs.dtype]


def assert_reproduces(network: nn.Module, io: dict[str, Any]) -> None:
    """Logits, their vector-Jacobian product and the gradient of log max_y p(y|x), all as published.

    Gradients are taken in float64: in float32 a ReLU whose input is a rounding error away from zero falls on
    one side or the other as the processor rounds, and takes the whole gradient along.
    """
    x, v = io["x"], io["grad_v"].double()
    with torch.no_grad():
        assert_close(network(x), io["logits"])
        network, x = network.double(), x.double()
        assert_close(network(x), io["logits_float64"])
    assert_close(gradient_of(lambda x: (network(x) * v).sum(1), x), io["grad_x"])
    # log_confidence takes a state in [-1, 1], in which an image moves by half as much.
    assert_close(2 * gradient_of(lambda state: log_confidence(network, state), 2 * x - 1), io["conf_grad_x"])


@pytest.mark.parametrize(("name", "build"), MANIFESTS.items())
def test_keys_shapes_and_order_are_the_published_ones(name, build):
    network = on_meta(build)
    assert layout(network) == shapes(name)
    assert all(value.dtype == torch.float32 for value in network.parameters())


def test_wrn_70_16_has_the_shapes_of_robustbenchs():
    """Its manifest is of DeepMind's variant, which names things differently and has the same tensors."""
    theirs = [shape for _, shape in shapes("DMWideResNet-70-16 cifar10 (Wang2023Better_WRN-70-16)")]
    assert [shape for _, shape in layout(on_meta(wrn_70_16))] == theirs


def test_wrn_40_2_has_the_published_number_of_parameters():
    """2,255,156: RepDistiller's wrn_40_2 with 100 classes."""
    assert sum(value.numel() for value in on_meta(wrn_40_2).parameters()) == 2_255_156


@pytest.mark.parametrize(
    ("name", "depth", "widen", "n_images"), [("wrn_10_1_io", 10, 1, 4), ("wrn_28_10_seeded_io", 28, 10, 1)]
)
def test_it_computes_what_the_published_network_does(name, depth, widen, n_images):
    io = first(name, n_images)
    assert_reproduces(with_weights(WideResNet(depth, widen), io), io)


@pytest.mark.skipif(not find_spec("robustbench"), reason="robustbench is not installed (an extra)")
@pytest.mark.parametrize(("name", "classes"), [("dmwrn_10_1_c10_io", 10), ("dmwrn_10_1_c100_io", 100)])
def test_robustbenchs_own_class_still_computes_what_it_did(name, classes, monkeypatch):
    """The architecture of Wang2023Better, which is loaded through robustbench and not written anew."""
    # robustbench 1.1.1 depends on pyautoattack but imports autoattack.
    monkeypatch.setitem(sys.modules, "autoattack", import_module("pyautoattack"))
    monkeypatch.setitem(sys.modules, "autoattack.state", import_module("pyautoattack.state"))
    dm = import_module("robustbench.model_zoo.architectures.dm_wide_resnet")
    mean, std = (dm.CIFAR100_MEAN, dm.CIFAR100_STD) if classes == 100 else (dm.CIFAR10_MEAN, dm.CIFAR10_STD)
    io = first(name)
    assert_reproduces(with_weights(dm.DMWideResNet(classes, 10, 1, nn.SiLU, mean, std), io), io)


def test_normalisation_is_inside_and_not_in_the_state():
    mean, std = CIFAR10_STATISTICS
    plain = WideResNet(10, 1)
    normalised = load_state(WideResNet(10, 1, 10, CIFAR10_STATISTICS), plain.state_dict(), "weights")
    x = torch.rand(2, 3, 32, 32)
    outside = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalised(x), plain.eval()(outside))


def test_the_second_derivative_is_the_slope_of_the_first():
    """Float64, a Hessian-vector product of the confidence against a difference too small to meet a kink."""
    torch.manual_seed(0)
    network = with_weights(WideResNet(10, 1, 10, CIFAR10_STATISTICS), first("wrn_10_1_io")).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    v, h = torch.randn_like(x), 1e-8
    gradient = gradient_of(lambda x: log_confidence(network, x), x)
    exact = torch.autograd.grad(gradient, x, v)[0]
    ahead, behind = (
        gradient_of(lambda x: log_confidence(network, x), (x + s * h * v).detach()) for s in (1, -1)
    )
    assert exact.norm() > 0
    assert (exact - (ahead - behind) / (2 * h)).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("depth", [4, 27, 32])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 4.*got {depth}"):
        WideResNet(depth, 1)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "model.module."])
def test_load_state_unwraps_and_takes_prefixes_off(wrapper, prefix):
    weights = WideResNet(10, 1).state_dict()
    given = {prefix + key: value for key, value in weights.items()}
    network = load_state(WideResNet(10, 1), {"epoch": 3, wrapper: given} if wrapper else given, "weights")
    assert torch.equal(network.fc.weight, weights["fc.weight"])


def test_load_state_leaves_a_prefix_that_is_the_networks_own():
    inner = nn.Linear(2, 3)
    network = load_state(
        nn.ModuleDict({"model": nn.Linear(2, 3)}),
        {"model.weight": inner.weight} | {"model.bias": inner.bias},
        "weights",
    )
    assert torch.equal(network["model"].weight, inner.weight)


def test_load_state_does_without_batch_counters_only():
    weights = WideResNet(10, 1).state_dict()
    old = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    load_state(WideResNet(10, 1), old, "weights")
    del old["bn1.running_mean"]
    with pytest.raises(
        CheckpointError, match=r"at 1 names, such as bn1.running_mean: expected shape \(64,\)"
    ):
        load_state(WideResNet(10, 1), old, "weights")


def test_load_state_names_what_does_not_fit():
    weights = WideResNet(10, 1).state_dict()
    del weights["conv1.weight"]
    weights |= {"fc.weight": torch.zeros(100, 64), "extra": torch.zeros(1, 2)}
    with pytest.raises(CheckpointError) as error:
        load_state(WideResNet(10, 1), weights, "folder/Standard.pt")
    assert str(error.value) == (
        "folder/Standard.pt does not fit WideResNet at 3 names, such as "
        "conv1.weight: expected shape (16, 3, 3, 3), got nothing; and "
        "extra: expected nothing, got shape (1, 2)"
    )
    del weights["extra"]
    with pytest.raises(
        CheckpointError, match=r"fc.weight: expected shape \(10, 64\), got shape \(100, 64\)$"
    ):
        load_state(WideResNet(10, 1), weights, "folder/Standard.pt")


@pytest.mark.parametrize(("state", "got"), [([torch.zeros(1)], "a list"), ({0: torch.zeros(1)}, "a dict")])
def test_load_state_takes_names_and_weights_only(state, got):
    with pytest.raises(CheckpointError, match=f"expected a mapping of names to weights, got {got}"):
        load_state(WideResNet(10, 1), state, "weights")
