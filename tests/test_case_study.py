"""The case study: paths with closed forms, what counts as rescued, and the verdicts on the paper's words."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from closed_forms import small_problem
from torch import nn

from coup_lib.data import CLASSES
from coup_lib.evaluation.config import Config
from coup_lib.guidance import to_state
from coup_lib.purify import coup, reverse_only
from coup_lib.studies import case_study as cs

SMALL = Config(n_images=12, n_iter=3, eot=2, n_draws=3, eps=0.2)


class NoScore(nn.Module):
    def forward(self, x, t):
        return torch.zeros_like(x)


def study(raw, reverse, guided, **curves):
    """A study of images of class 0, from the class that each stage gives them."""
    right = {
        name: (np.array(classes) == 0) * 1.0 for name, classes in (("reverse", reverse), ("coup", guided))
    }
    bad = int((np.array(reverse) != 0).sum())
    flat = {path: np.full((11, bad), 0.5) for path in cs.PATHS}
    empty = {name: np.zeros((2, 0, 3)) for name in ("class", "confidence")}
    return cs.CaseStudy(
        eps=0.1,
        labels=np.zeros(len(raw), dtype=int),
        raw=np.array(raw),
        y_adv=np.array(reverse),
        clean=np.zeros(len(raw), dtype=int),
        right=right | {"flipped": right["reverse"], "brownian": right["reverse"]},
        times=np.linspace(0.1, 0, 11),
        p_true=flat | curves.get("p_true", {}),
        p_adv=flat | curves.get("p_adv", {}),
        strips=empty
        | {"index": np.zeros(0, dtype=int), "columns": np.zeros(3), "images": np.zeros((2, 0, 3, 1, 8, 8))},
    )


def test_without_score_and_noise_the_path_is_the_drifts():
    """x_{i+1} = x_i (1 + β(t_i) dt_i / 2), and what the classifier says of each, the last one clamped."""
    _, classifier, x = small_problem()
    defence = reverse_only(classifier, NoScore(), t_star=0.3, n_steps=4)
    images, p = cs.follow(defence, x)
    times, state = defence.purifier.times, to_state(x)
    for i, (t, dt) in enumerate(zip(times[:-1], times[:-1] - times[1:], strict=True)):
        torch.testing.assert_close(images[i], (state + 1) / 2)
        state = state * (1 + defence.purifier.sde.beta(t) * dt / 2)
    assert state.abs().max() > 1
    torch.testing.assert_close(images[-1], (state.clamp(-1, 1) + 1) / 2)
    torch.testing.assert_close(p[2], classifier(images[2]).softmax(1))
    torch.testing.assert_close(p.sum(2), torch.ones_like(p[..., 0]))


def test_guidance_raises_the_class_it_sees_first():
    """The mechanism behind every rescue and every failure: the class need not be the true one."""
    score, classifier, x = small_problem()
    settings = {"t_star": 0.1, "n_steps": 20}
    _, free = cs.follow(reverse_only(classifier, score, **settings), x)
    _, guided = cs.follow(coup(classifier, score, 1.0, **settings), x)
    seen = free[0].argmax(1)
    assert (guided[1, range(5), seen] > free[1, range(5), seen]).all()


def test_groups_rescued_and_broken():
    found = study(raw=[0, 0, 1, 1, 0, 1], reverse=[1, 1, 1, 2, 0, 0], guided=[0, 1, 1, 0, 0, 1])
    assert found.rescued("right").tolist() == [1, 0]
    assert found.rescued("wrong").tolist() == [0, 1]
    assert found.rescued("all").tolist() == [1, 0, 0, 1]
    assert found.broken("right").tolist() == [0]
    assert found.broken("wrong").tolist() == [1]
    counted = cs.control_table([found]).iloc[0]
    assert (counted["Images"], counted["Bad cases"], counted["y_adv seen in x_adv"]) == (6, 4, 1)
    assert counted["Rescued by guidance (COUP) (%)"].startswith("50.00 [")
    assert counted["Guidance − Brownian motion"].endswith("**is not decided**")
    table = cs.verdict_table([found])
    assert table["Bad cases"].tolist() == [4, 2, 2] and table["Good cases"].tolist() == [2, 1, 1]


def test_the_papers_pattern_and_its_opposite_get_opposite_verdicts():
    cases = 48
    jitter = np.linspace(0, 0.01, cases)
    late_fall = np.r_[np.full(10, 0.7), 0.1][:, None] - jitter * np.linspace(1, 2, 11)[:, None]
    rise = np.r_[0.5, np.full(10, 0.9)][:, None] + jitter * np.linspace(0, 1, 11)[:, None]
    everywhere = [1] * cases
    paper = study(
        [0] * cases,
        everywhere,
        [0] * cases,
        p_true={"reverse": late_fall, "coup": rise},
        p_adv={"reverse": 1 - late_fall, "coup": 1 - rise},
    )
    assert set(cs.verdicts(paper, "right").values()) == {"holds"}
    assert set(cs.verdicts(paper, "wrong").values()) == {"too few cases"}
    name = "p(y_true), with guidance, first tenth"
    assert str(cs.measured(paper, "right")[name]).startswith("+40.")
    assert name not in cs.measured(paper, "wrong")
    opposite = study(
        everywhere,
        everywhere,
        everywhere,
        p_true={"reverse": 1 - late_fall, "coup": 1 - rise},
        p_adv={"reverse": late_fall, "coup": rise},
    )
    assert set(cs.verdicts(opposite, "wrong").values()) == {"does not hold"}


def test_a_gradual_fall_is_not_a_sudden_one():
    falling = np.linspace(0.9, 0.1, 11)[:, None] - np.linspace(0, 0.01, 48)
    found = study([0] * 48, [1] * 48, [1] * 48, p_true={"reverse": falling}, p_adv={"reverse": 1 - falling})
    assert cs.verdicts(found, "all")["1b"] == "does not hold"


def test_a_change_is_covered_though_few_cases_flip_and_those_wholly():
    """Student's interval would hold the mean in 73 % of these."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(100):
        moved = np.where(generator.random(33) < 0.04, 1, 0.01 * generator.random(33))
        found = cs.change(1 - moved, np.ones(33))
        held += found.low <= 100 * (0.04 + 0.96 * 0.005) <= found.high
    assert held >= 93
    assert cs.change(moved[:1], moved[:1]) is None
    assert cs.change(np.full(9, -1.0), np.ones(9), most=2).value == 200


def test_radii():
    assert [config.eps for config in cs.radii(Config(), [1.5, 0.5, 1, 1.0])] == [0.075, 0.15, 0.225]
    assert [config.eps for config in cs.radii(Config(), 2)] == [0.3]
    with pytest.raises(ValueError, match="eps_factors: expected at least one number"):
        cs.radii(Config(), [])
    with pytest.raises(ValueError, match="eps_factors: expected a number greater than 0; got -1"):
        cs.radii(Config(), [1, -1])


def test_a_study_of_digits_and_its_record(results_folder):
    found = cs.case_study(SMALL, shown=2)
    bad = found.bad
    assert 0 < bad.sum() < len(bad) == SMALL.n_images
    assert found.p_true["coup"].shape == (SMALL.n_steps + 1, bad.sum())
    # Bad is what ends on the wrong side, y_adv is what it ends as; both paths begin with x_adv.
    assert (found.p_adv["reverse"][-1] > found.p_true["reverse"][-1]).all()
    assert ((found.y_adv != found.labels) == bad).all()
    for p in (found.p_true, found.p_adv):
        assert (p["coup"][0] == p["reverse"][0]).all()
    saved = np.flatnonzero(bad & (found.right["coup"] == 1))[:2]
    lost = np.flatnonzero(bad & (found.right["coup"] == 0))[:2]
    assert found.strips["index"].tolist() == [*saved, *lost]

    files = {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")}
    again = cs.case_study(SMALL, shown=2)
    assert {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")} == files
    np.testing.assert_array_equal(again.p_adv["coup"], found.p_adv["coup"])
    assert set(cs.numbers([found])["quantity"]) >= {"broken by coup", "p(y_adv), with guidance, whole path"}


def test_no_weight_neither_rescues_nor_breaks(results_folder):
    found = cs.case_study(replace(SMALL, guidance_weight=0), shown=1)
    assert found.rescued("all").sum() == 0 and found.broken("all").sum() == 0
    np.testing.assert_array_equal(found.p_true["coup"], found.p_true["reverse"])
    assert (found.right["flipped"] == found.right["reverse"]).all()


def test_without_a_bad_case_text_and_figures_say_so(results_folder):
    found = cs.case_study(replace(SMALL, n_images=3, eps=1e-4))
    if found.bad.any():
        pytest.fail("choose images that no attack this small can break")
    counted = cs.control_table([found]).iloc[0]
    assert (counted["Bad cases"], counted["Guidance − Brownian motion"]) == (0, "–")
    assert set(cs.verdicts(found, "all").values()) == {"too few cases"}
    for figure in (cs.curves_figure([found]), cs.strips_figure(found, CLASSES["digits"])):
        figure.canvas.draw()
        texts = [text.get_text() for part in (figure, *figure.subfigs) for text in part.findobj(plt.Text)]
        assert any("no such case" in text for text in texts)
        plt.close(figure)
