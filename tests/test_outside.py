"""Attacks outside the ball, in float64 against closed forms, and kept apart from every worst case."""

import pytest
import torch
from torch import nn

from coup_lib.attacks import Attack
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.outside import OUTSIDE, TRIED, filtered, flowed


def images(n=3, channels=2, height=8, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)


def anything(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_reach_or_without_change_the_image_stays():
    x = images()
    for found in (
        filtered(x, anything(3, 12), 0.0),
        filtered(x, torch.zeros(3, 12).double(), 0.9),
        flowed(x, anything(3, 2, 3, 3), 0.0),
        flowed(x, torch.zeros(3, 2, 3, 3).double(), 2.0),
    ):
        torch.testing.assert_close(found, x)


def test_the_strongest_filter_leaves_the_mean_and_the_rest_as_weak_as_its_reach_says():
    x = images()
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(filtered(x, torch.ones(3, 12).double(), 0.7), mean + 0.3 * (x - mean))


def test_a_cosine_is_weakened_by_what_has_gone_at_its_frequencies():
    """Of an 8 by 6 image: rows lose half from frequency 2 on, columns a quarter more from 1 on."""
    falls, places = torch.zeros(1, 12).double(), [torch.arange(size).double() + 0.5 for size in (8, 6)]
    falls[0, 1], falls[0, 7] = 0.5, 0.25
    for k, j, left in ((1, 0, 1.0), (2, 0, 0.5), (7, 0, 0.5), (0, 1, 0.75), (1, 5, 0.75), (3, 1, 0.375)):
        rows, columns = torch.cos(torch.pi * k * places[0] / 8), torch.cos(torch.pi * j * places[1] / 6)
        wave = 0.3 * (rows[:, None] * columns)[None, None]
        torch.testing.assert_close(filtered(0.5 + wave, falls, 1.0), 0.5 + left * wave)
        torch.testing.assert_close(filtered(0.5 + wave, falls, 0.4), 0.5 + (0.6 + 0.4 * left) * wave)


def test_a_linear_image_is_moved_by_the_flow():
    """Inside, where nothing is taken from beyond the edge; and a flow that grows with the place."""
    down, right = (torch.arange(size).double() for size in (8, 6))
    x = (0.05 * down[:, None] + 0.02 * right)[None, None]
    knots = torch.tensor([0.6, -0.8]).double().reshape(1, 2, 1, 1).expand(1, 2, 3, 3)  # of length 1
    found = flowed(x, knots, 0.5)
    torch.testing.assert_close(found[..., :7, 1:], (x + 0.05 * 0.3 - 0.02 * 0.4)[..., :7, 1:])
    grows = torch.zeros(1, 2, 3, 3).double()
    grows[0, 0] = torch.tensor([0.0, 0.5, 1.0])  # to the right: none to 1 pixel down
    torch.testing.assert_close(flowed(x, grows, 1.0)[..., :7, :], (x + 0.05 * right / 5)[..., :7, :])


class Far(nn.Module):
    """Wrong once an image is far enough, in squares, from what is given."""

    def __init__(self, x):
        super().__init__()
        self.x = x
        self.eval()

    def forward(self, x):
        away = (x - self.x).square().flatten(1).sum(1)
        return torch.stack([torch.zeros_like(away), 5 * away - 1], 1)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(("reach", "lost"), [(0.9, True), (0.01, False)])
def test_the_attack_raises_the_loss_within_its_reach_and_the_same_in_any_batch(name, reach, lost):
    x, y = images(1).expand(4, 2, 8, 6), torch.zeros(4, dtype=torch.int64)
    bright = images(1)
    bright[:, :, 2] += 0.05  # beside the image, where this loss would have no slope
    model, given = Far(bright), {"n_iter": 20, "eot": 1}
    found, parts = (Attack(name, "Linf", reach, max_batch=most, **given)(model, x, y) for most in (8, 3))
    assert torch.equal(found.x_adv, parts.x_adv) and bool(found.robust.any()) != lost
    assert float(found.x_adv.min()) >= 0 and float(found.x_adv.max()) <= 1
    assert (model(found.x_adv)[:, 1] > model(x)[:, 1]).all()
    moved = found.x_adv - x
    if name == "filter":
        contrast = (x - x.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1)
        assert (moved.flatten(1).norm(dim=1) <= reach * contrast + 1e-9).all()
    else:
        steepest = max(float(x.diff(dim=dim).abs().max()) for dim in (2, 3))
        assert float(moved.abs().max()) <= 2 * reach * steepest


@pytest.mark.parametrize(
    ("name", "reach", "message"),
    [
        ("filter", 1.5, "eps: expected a number greater than 0 and at most 1; got 1.5"),
        ("filter", 0, "eps: expected a number greater than 0 and at most 1; got 0"),
        ("flow", "far", "eps: expected a number or a fraction"),
    ],
)
def test_a_reach_that_cannot_be_is_refused(name, reach, message):
    with pytest.raises(ValueError, match=message):
        Attack(name, "Linf", reach)


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_leaves_the_ball_is_in_no_worst_case_on_record(name, results_folder):
    """Also where its reach is the radius itself."""
    assert name in {kind for kind, _ in TRIED}
    config = Config(n_images=4, n_iter=2, eot=2, n_draws=2)
    evaluation = Evaluation(config, verbose=False)
    rows = {"coup": {"ce": against("apgd-ce", "coup")}}
    inside = evaluation.predictions(rows)
    sources = evaluation.recorded(inside)["coup"].n_sources
    left = evaluation.predictions({"coup": {name: against(name, "coup")}})["coup"][name]
    assert left.report.shape == (4, 2)
    assert evaluation.recorded(inside)["coup"].n_sources == sources
    evaluation.predictions({"coup": {"fgsm": against("fgsm", "coup")}})
    assert evaluation.recorded(inside)["coup"].n_sources == sources + 1
