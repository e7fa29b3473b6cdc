"""Convolutions and batch norms with frozen weights: all derivatives the same, at fewer operations."""

import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coup_lib import hessian as frozen
from coup_lib.guidance import gradient_of, log_confidence
from coup_lib.hessian import FrozenLayers
from coup_lib.networks.wideresnet import WideResNet
from workflow.estimate import FlopCounter

SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"padding": (2, 1), "dilation": (2, 1)},
    "grouped": {"padding": 1, "groups": 2},
}


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(frozen, "WORTHWHILE", 0)
    monkeypatch.setattr(frozen, "WORTHWHILE_IMAGE", 0)


def problem(settings):
    torch.manual_seed(0)
    channels = 4 // settings.get("groups", 1)
    weight, bias = torch.randn(6, channels, 3, 3).double(), torch.randn(6).double()
    return torch.randn(2, 4, 6, 5).double().requires_grad_(), weight, bias


@pytest.mark.parametrize("name", SETTINGS)
def test_derivatives_are_those_of_the_convolution(name):
    x, weight, bias = problem(SETTINGS[name])

    def convolution(x):
        with FrozenLayers():
            return torch.sin(F.conv2d(x, weight, bias, **SETTINGS[name]))

    expected = torch.sin(F.conv2d(x, weight, bias, **SETTINGS[name]))
    torch.testing.assert_close(convolution(x), expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(convolution, (x,))
    assert torch.autograd.gradgradcheck(convolution, (x,))


def batch_norm(affine=True):
    layer = nn.BatchNorm2d(4, affine=affine).double()
    layer(torch.randn(64, 4, 3, 3).double() * 3 + 1)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("affine", [True, False])
def test_derivatives_are_those_of_the_batch_norm(affine):
    torch.manual_seed(0)
    layer, x = batch_norm(affine), torch.randn(2, 4, 3, 2).double().requires_grad_()

    def normalised(x):
        with FrozenLayers():
            return torch.sin(layer(x))

    torch.testing.assert_close(normalised(x), torch.sin(layer(x)), rtol=0, atol=0)
    assert torch.autograd.gradcheck(normalised, (x,))
    assert torch.autograd.gradgradcheck(normalised, (x,))


def test_a_batch_norm_does_not_keep_its_input():
    layer, start = batch_norm(), torch.randn(2, 4, 3, 3).double().requires_grad_()
    kept = {}
    for mode in (FrozenLayers(), nullcontext()):
        x = start + 1  # whose own graph keeps nothing
        looking = weakref.ref(x)
        with mode:
            result = layer(x)
        del x
        kept[type(mode)] = looking() is not None
        torch.autograd.grad(result.sum(), start)
    assert kept == {FrozenLayers: False, nullcontext: True}


@pytest.mark.parametrize("how", ["in train mode", "with weights that train"])
def test_a_batch_norm_that_learns_is_left_alone(how):
    layer, x = batch_norm(), torch.randn(8, 4, 3, 3).double().requires_grad_()
    (layer.train if how == "in train mode" else layer.requires_grad_)()
    with FrozenLayers():
        found = layer(x)
    assert type(found.grad_fn).__name__ == "NativeBatchNormBackward0"


def hessian_vector_product(classifier, x, mode):
    x = x.clone().requires_grad_()
    with mode:
        slope = torch.autograd.grad(log_confidence(classifier, x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(slope, x, torch.ones_like(x))[0]


def small_classifier():
    torch.manual_seed(0)
    return WideResNet(10, 1).eval().requires_grad_(False)


def test_a_hessian_vector_product_takes_four_forward_passes_and_is_the_same():
    classifier, x = small_classifier(), torch.rand(2, 3, 8, 8)
    operations, products = [], []
    for mode in (FrozenLayers(), nullcontext()):
        with FlopCounter() as counter:
            products.append(hessian_vector_product(classifier, x, mode))
        operations.append(counter.total)
    torch.testing.assert_close(*products)
    with FlopCounter() as counter:
        classifier(x)
    assert operations[0] == pytest.approx(4 * counter.total, rel=1e-3)
    assert operations[1] > 4.5 * counter.total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_the_same_second_derivatives():
    """Its batch norm asks for more than the CPU's."""
    classifier, x = small_classifier().double(), torch.rand(2, 3, 8, 8).double()
    here = hessian_vector_product(classifier, x, FrozenLayers())
    there = hessian_vector_product(classifier.cuda(), x.cuda(), FrozenLayers())
    torch.testing.assert_close(there.cpu(), here)


def test_the_guidance_makes_use_of_it():
    classifier, x = small_classifier(), torch.rand(1, 3, 8, 8).requires_grad_()
    with FlopCounter() as forward:
        classifier(x)
    with FlopCounter() as counter:
        slope = gradient_of(lambda x: log_confidence(classifier, x), x)
        torch.autograd.grad(slope.sum(), x)
    assert counter.total == pytest.approx(4 * forward.total, rel=1e-3)


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_weights_that_train_keep_their_gradients(trainable):
    convolution = nn.Conv2d(2, 3, 3).requires_grad_(False)
    getattr(convolution, trainable).requires_grad_()
    with FrozenLayers():
        convolution(torch.rand(1, 2, 5, 5)).sum().backward()
    assert getattr(convolution, trainable).grad.abs().sum() > 0


@pytest.mark.parametrize("padding", ["same", 1])
def test_padding_by_name_and_a_single_image_have_their_derivatives(padding):
    convolution, x = nn.Conv2d(2, 2, 3, padding=padding).requires_grad_(False), torch.rand(2, 5, 5)
    slopes = []
    for shape in ((1, 2, 5, 5), (2, 5, 5)):
        with FrozenLayers():
            given = x.reshape(shape).requires_grad_()
            slopes.append(torch.autograd.grad(convolution(given).square().sum(), given)[0].reshape_as(x))
    torch.testing.assert_close(*slopes)


def test_autocast_keeps_the_inputs_precision():
    classifier, x = small_classifier(), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        product = hessian_vector_product(classifier, x, FrozenLayers())
    expected = hessian_vector_product(classifier, x, nullcontext())
    assert product.dtype == torch.float32
    assert (product - expected).norm() < 0.4 * expected.norm()
