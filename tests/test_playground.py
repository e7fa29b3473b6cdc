"""The playground shows what the library computes, for any choice that is allowed."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from coup_lib.data import load_split
from coup_lib.guidance import to_image
from coup_lib.purify import coup
from coup_lib.studies import playground
from coup_lib.studies.playground import Choice, attacked, draw, walks


def test_the_image_is_attacked_within_the_radius():
    x, found, label = attacked(Choice(index=5, eps="0.1"))
    assert label == int(load_split("digits", "test").y[5])
    assert 0.099 < float((found - x).abs().max()) < 0.101
    assert torch.equal(*attacked(Choice(index=5, eps=0))[:2])


def test_the_guided_path_is_coups_and_without_weight_both_are_one():
    x, classifier = attacked(Choice(index=5))[1], playground.networks()[0]
    found = walks(x, Choice(index=5, guidance_weight=2, seed=3))["with guidance"]
    states = []
    defence = coup(*playground.networks(), guidance_weight=2, t_star=0.1, n_steps=playground.N_STEPS)
    end = defence.purifier.trajectory(x, lambda i, t, state: states.append(state), seeds=torch.tensor([3]))
    assert np.array_equal(found.images[-1], end[0, 0].numpy())
    assert np.array_equal(found.images[4], to_image(states[4]).clamp(0, 1)[0, 0].numpy())
    assert np.allclose(found.probabilities[-1], classifier(end).softmax(1)[0].numpy(), atol=1e-6)
    assert found.times[0] == pytest.approx(0.1) and found.times[-1] == pytest.approx(1e-5)
    same = walks(x, Choice(guidance_weight=0))
    assert np.allclose(same["with guidance"].images, same["without guidance"].images, atol=1e-6)


@pytest.mark.parametrize(
    "choice",
    [Choice(), Choice(index=511, eps=0, t_star=0.3), Choice(guidance_weight=-4, t_star="0.01", eps="8/255")],
)
def test_every_choice_is_drawn(choice):
    figure = draw(choice)
    titles = {axes.get_title() for part in figure.subfigs for axes in part.axes}
    assert {"image", "attacked", "t = 0.000"} <= titles
    plt.close(figure)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"index": 512}, "index: expected a whole number of at least 0 and at most 511"),
        ({"t_star": 0.4}, "t_star: expected a number greater than 0.001 and at most 0.3"),
        ({"eps": "far"}, "eps: expected a number or a fraction"),
    ],
)
def test_a_choice_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Choice(**wrong)
