"""Gradients that predict the slope and gradients that do not: closed forms, and the trained networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coup_lib.ascent import steepest
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.stats import Estimate
from coup_lib.guidance import Guided, SmoothMax
from coup_lib.purify import Purifier
from coup_lib.studies import mechanism


class Linear(torch.nn.Module):
    """Two logits, ±slope·(first pixel − ½)."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        z = self.slope * (x.flatten(1)[:, :1] - 0.5)
        return torch.cat([z, -z], 1)


class Scaled(torch.nn.Module):
    """A "defence" whose loss is known: logits linear in the image, whatever the seeds."""

    def forward(self, x):
        return torch.cat([x.flatten(1)[:, :1], torch.zeros(len(x), 1, dtype=x.dtype)], 1)


def guidance(kind, slope, states):
    states = torch.tensor(states, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return kind(torch.nn.Identity(), Linear(slope)).guidance(states, torch.tensor(0.1)).flatten()


def test_the_guidance_jumps_and_the_smoothed_one_does_not():
    """Across the boundary ∇ log max p = ±slope/2; the smoothed one is odd, so it passes through zero."""
    # d/dstate of log σ(2·slope·state/2) at 0 is slope/2, on either side.
    assert guidance(Guided, 4.0, [-1e-6, 1e-6]).tolist() == pytest.approx([-2, 2], rel=1e-4)
    assert guidance(SmoothMax, 4.0, [-1e-6, 1e-6]).abs().max() < 1e-4
    far = [guidance(kind, 20.0, [0.9]) for kind in (Guided, SmoothMax)]
    torch.testing.assert_close(*far, atol=1e-6, rtol=0)


def test_draws_are_those_of_a_deterministic_loss():
    x, y = torch.rand(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0])
    seeds = torch.zeros(3, 5, dtype=torch.int64)
    gradients = mechanism.draw_gradients(Scaled(), x, y, seeds)
    p = x.flatten(1)[:, 0].sigmoid()
    expected = torch.where(y == 0, p - 1, p)  # d CE / d first pixel
    torch.testing.assert_close(gradients[:, :, 0, 0, 0], expected[:, None].expand(-1, 5))
    losses = mechanism.draw_losses(Scaled(), x, y, seeds)
    torch.testing.assert_close(losses[:, 0], F.cross_entropy(Scaled()(x), y, reduction="none"))


def test_a_smooth_loss_has_the_slope_that_its_gradient_predicts():
    x, y = torch.rand(4, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    seeds = torch.zeros(4, 2, dtype=torch.int64)
    gradient = mechanism.draw_gradients(Scaled(), x, y, seeds).mean(1)
    direction = steepest(gradient, "l2")
    measured = mechanism.central_difference(Scaled(), x, y, seeds, 1e-3 * direction) / 1e-3
    np.testing.assert_allclose(measured, (gradient * direction).flatten(1).sum(1), rtol=1e-5)


def test_on_a_cpu_gradients_are_taken_of_as_many_paths_as_are_kept(monkeypatch):
    evaluation, sizes = Evaluation(Config(n_images=2, n_steps=2), verbose=False), []
    x, y, seeds = evaluation.images.x, evaluation.images.y, torch.arange(8).reshape(2, 4)
    model = evaluation.bench.defence("coup")
    whole = mechanism.draw_gradients(model, x, y, seeds)
    monkeypatch.setattr(Purifier, "images_kept", lambda self, x: 3)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(mechanism.draw_gradients(model, x, y, seeds), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [3, 3, 2]


def slope(exact, first_order, spread=0.01):
    """A case of `mechanism.slopes`, at 8 images, from its ratios of predicted and measured slope."""
    jitter = spread * np.linspace(-1, 1, 8)
    predicted = {"foretold_exact": exact + jitter, "foretold_first_order": first_order + jitter}
    return predicted | {f"measured_{kind}": np.ones((2, 8)) for kind in mechanism.KINDS}


def test_predicted_over_measured_slope():
    result = {"foretold_exact": np.full(8, 3.0), "measured_exact": np.full((2, 8), 2.0)}
    assert mechanism.predicted_over_measured(result, "exact") == Estimate(1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("coup", "flipped", "smooth", "spread", "said"),
    [
        ((0.8, 1.0), (1.5, 1.0), (1.05, 1.0), 0.01, "holds"),
        ((0.8, 1.0), (1.5, 1.0), (1.05, 1.0), 2.0, "is not decided"),  # the intervals are wide
        ((0.8, 1.0), (1.5, 1.0), (1.7, 1.0), 0.01, "is not decided"),  # the smoothed maximum mends nothing
        ((0.8, 0.7), (1.5, 1.0), (1.05, 1.0), 0.01, "is not decided"),  # first-order is worse
        ((1.2, 1.0), (1.5, 1.0), (1.05, 1.0), 0.01, "does not hold"),
        ((0.8, 1.0), (0.7, 1.0), (1.05, 1.0), 0.01, "does not hold"),
    ],
)
def test_the_verdict_follows_the_slopes(coup, flipped, smooth, spread, said):
    slopes = {"reverse": slope(1, 1), "coup": slope(*coup, spread), "flipped": slope(*flipped, spread)}
    assert mechanism.verdict(slopes | {"smooth": slope(*smooth)}).endswith(f"**{said}**.")


def test_the_table_says_on_which_side_of_its_reference_an_interval_lies():
    losses = {"exact": np.ones((6, 8)), "first_order": np.ones((6, 8)) + np.linspace(0.1, 0.2, 8)}
    right = {"exact": np.ones(8), "first_order": np.zeros(8), "worst": np.zeros(8)}
    found = mechanism.Mechanism(
        {0.0: right, 1.0: right, "smooth": right},
        {kind: {5: values[0], 20: values[1]} for kind, values in losses.items()},
        {"coup": losses},
        {case: slope(1.0, 0.5) for case in mechanism.CASES},
    )
    table = mechanism.findings(found)
    said = table["What the interval says"]
    assert said["Predicted over measured slope, COUP, first-order"] == "below 1"
    assert said["First-order − exact: loss reached, 20 draws"] == "above 0"
    assert said["Predicted over measured slope, COUP, exact"] == "includes 1"
    assert said["Accuracy (%) of COUP, smoothed max, exact attack"] == "–"
    assert said["Exact − first-order attack: accuracy (points), λ = 1"] == "above 0"
    gain = table.loc["λ = 1 against λ = 0: accuracy (points), worst case over attacks, per image"]
    assert gain["Value"] == "0.000" and gain["What the interval says"] == "includes 0"


def test_on_trained_networks_the_exact_gradient_predicts_the_slope_where_nothing_jumps(results_folder):
    config = Config(purpose="probe", n_images=12, n_iter=10, eot=2, n_steps=10)
    error = {}
    for case in ("reverse", "coup", "smooth"):
        result = mechanism.slopes(config, case, draws=8)
        error[case] = abs(mechanism.predicted_over_measured(result, "exact").value - 1)
    assert error["reverse"] < 0.1 and error["smooth"] < 0.1
    assert error["coup"] > error["smooth"]


def test_series_of_draws_and_iterations():
    assert mechanism.eot_counts(Config(purpose="probe", eot=20)) == (1, 5, 20, 64)
    assert mechanism.halved(Config(n_iter=1)).n_iter == 1


def test_a_killed_measurement_goes_on_where_it_was(results_folder, monkeypatch):
    """Image by image, and to the same numbers as in one go."""
    config, done = Config(purpose="probe", n_images=3, n_iter=1, eot=1, n_steps=3), []
    whole = mechanism.landscape(config, "coup", "clean", draws=2)
    for path in results_folder.rglob("mechanism-*"):
        path.unlink()

    def counted(*given, losses=mechanism.draw_losses):
        done.append(len(given[1]))
        if len(done) == 2 * len(mechanism.KINDS) * len(mechanism.LANDSCAPE):
            raise KeyboardInterrupt
        return losses(*given)

    monkeypatch.setattr(mechanism, "BATCH_PIXELS", 2 * 64)  # the two draws of one digit
    monkeypatch.setattr(mechanism, "draw_losses", counted)
    with pytest.raises(KeyboardInterrupt):
        mechanism.landscape(config, "coup", "clean", draws=2)
    again = mechanism.landscape(config, "coup", "clean", draws=2)
    assert set(done) == {1}
    assert len(done) == 4 * len(mechanism.KINDS) * len(mechanism.LANDSCAPE)  # the second image twice
    for kind, losses in whole.items():
        np.testing.assert_allclose(again[kind], losses, rtol=1e-4)
