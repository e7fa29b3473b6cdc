"""The count of what the whole paper takes, against a count by hand."""

import json
from pathlib import Path

import pytest

from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from workflow import cost, times
from workflow.estimate import Job

ROOT = Path(__file__).parents[1]
WRN, STEPS, DRAWS = "Standard", 100, 20


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch):
    monkeypatch.delenv("COUP_SMOKE", raising=False)


@pytest.mark.parametrize(
    ("source", "gflop"),
    [
        # 100 iterations of 20 draws, each two walks of a path, one back, and the decision with its gradient
        (against("apgd-ce", "coup"), 2000 * (STEPS * 3 * (37.1 + 21.0) + 21.0)),
        (against("apgd-ce", "coup", "first_order"), 2000 * (STEPS * (3 * 37.1 + 2 * 21.0) + 21.0)),
        (against("apgd-ce", "reverse"), 2000 * (STEPS * 3 * 37.1 + 21.0)),
        (against("apgd-ce", "coup", "bpda"), 2000 * (STEPS * (37.1 + 21.0) + 10.5)),
        # guidance by the gradient of what the classifier makes of the score's own estimate
        (against("apgd-ce", "denoised"), 2000 * (STEPS * 3 * (3 * 37.1 + 21.0) + 21.0)),
        (against("apgd-ce", "averaged", n_steps=50), 4 * 2000 * (50 * 3 * 37.1 + 21.0)),
        (against("apgd-ce", "none"), 2000 * 21.0),
        (against("clean", "none"), 0),
    ],
)
def test_an_attack_is_counted_as_by_hand(source, gflop):
    config = Config(profile="cifar10", budget="full", subset="first", n_images=4, n_steps=STEPS)
    scored = DRAWS * (STEPS * (37.1 + 21.0) + 10.5)
    job = Job(config, WRN, source, ("coup",), source.calls(config), 4, done=False)
    attack, scores = cost.cost(job)
    assert attack.sum() == pytest.approx(gflop / 1000) and scores.sum() == pytest.approx(scored / 1000)


def test_hours_and_days_are_those_of_the_operations():
    frame = cost.table(512)
    all_of_them = frame.loc["all of them"]
    by_hand = all_of_them["PFLOP"] * 1000 / (0.5 * 67) / 3600
    assert all_of_them["GPU hours, float32"] == pytest.approx(by_hand)
    assert all_of_them["GPU hours, TF32"] < all_of_them["GPU hours, bfloat16"] < by_hand
    days = cost.days(frame).loc["all of them, float32"]
    assert list(days) == pytest.approx([by_hand / 24 / n for n in (1, 4, 8)])


def test_the_committed_page_is_what_the_command_prints():
    assert (ROOT / "workflow" / "cost.md").read_text() == cost.page() + "\n"


def test_times_are_those_of_the_executed_notebooks(tmp_path):
    for name, norm, seconds in (("04_autoattack", "linf", 30.0), ("04_autoattack_l2", "l2", 90.0)):
        ran = {
            "duration": seconds,
            "input_path": "notebooks/04_autoattack.ipynb",
            "parameters": {"norm": norm},
        }
        cells = [{"cell_type": "markdown", "source": ["# AutoAttack (Tables 1 and 2)\n", "Text."]}]
        document = {"metadata": {"papermill": ran}, "cells": cells}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(document))
    command = "`papermill notebooks/04_autoattack.ipynb out.ipynb"
    assert times.times(tmp_path).splitlines()[2:] == [
        f"| AutoAttack (Tables 1 and 2) | {command}` | 0.5 | – |",
        f"| AutoAttack (Tables 1 and 2) | {command} -p norm l2` | 1.5 | – |",
    ]
