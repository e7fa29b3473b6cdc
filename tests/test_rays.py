"""The attack by decisions alone, against closed forms."""

import pytest
import torch
from torch import nn

from coup_lib.attacks import Attack
from coup_lib.data import load_split
from coup_lib.networks.zoo import load_classifier
from coup_lib.rays import rays

GREY = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)


def halfspace(direction, distance, norm):
    """Wrong beyond a plane at this distance from grey; and how often it was asked about each image."""
    dual = direction.norm(1 if norm == "Linf" else 2)
    asked = torch.zeros(3, dtype=torch.int64)

    def wrong(points, places):
        asked[places] += 1
        return (points - 0.5).flatten(1) @ direction > distance * dual

    return wrong, asked


@pytest.mark.parametrize(("factor", "found"), [(1.02, True), (0.98, False)])
def test_the_nearest_wrong_decision_behind_a_plane_is_found_and_no_nearer(factor, found):
    """In L∞ it lies in the corner of the ball that the plane's signs point to."""
    direction = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wrong, asked = halfspace(direction, 0.2, "Linf")
    x_adv = rays(wrong, GREY, "Linf", factor * 0.2, 1000)
    assert (x_adv - GREY).abs().max() <= factor * 0.2 + 1e-12 and asked.max() <= 1000
    assert wrong(x_adv, torch.arange(3)).tolist() == [found] * 3


def test_in_l2_weights_come_near_the_planes_normal():
    """Signs alone, at their best, are 1.19 times as far as the foot of the perpendicular."""
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert direction.norm() / (direction.norm(1) / 4) > 1.13
    wrong, _ = halfspace(direction, 0.3, "L2")
    x_adv = rays(wrong, GREY, "l2", 1.08 * 0.3, 3000)
    assert (x_adv - GREY).flatten(1).norm(dim=1).max() <= 1.08 * 0.3 + 1e-12
    assert wrong(x_adv, torch.arange(3)).all()


@pytest.mark.parametrize("queries", [1, 2, 7])
def test_no_image_is_asked_about_more_often_than_allowed(queries):
    wrong, asked = halfspace(torch.ones(16, dtype=torch.float64), 0.4, "Linf")
    rays(wrong, GREY, "Linf", 0.1, queries)
    assert asked.tolist() == [queries] * 3


def test_confidences_that_are_noise_hide_nothing_from_it():
    """Square, which looks at them, keeps half of the images."""
    net, images = load_classifier("digits", "cnn-small"), load_split("digits", "test").first(24)

    class Opaque(nn.Module):
        def forward(self, x):
            logits = net(x)
            best = nn.functional.one_hot(logits.argmax(1), 10)
            return torch.frac(torch.sin(logits * 1e3) * 100).abs() + 2 * best

    left = {
        name: Attack(name, "linf", 0.15, eot=1, square_queries=300)(Opaque().eval(), images.x, images.y)
        for name in ("square", "rays")
    }
    assert left["rays"].robust.float().mean() < 0.2 < left["square"].robust.float().mean()
