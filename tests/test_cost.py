"""The count of what the whole paper takes, against a count by hand."""

import runpy
from pathlib import Path

import pytest

from coup_lib.config import Config
from coup_lib.evaluate import Job, Source

ROOT = Path(__file__).parents[1]
WRN, STEPS, DRAWS = "Standard", 100, 20


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch):
    monkeypatch.delenv("COUP_SMOKE", raising=False)


@pytest.fixture(scope="module")
def cost():
    return runpy.run_path(str(ROOT / "workflow" / "cost.py"))


@pytest.mark.parametrize(
    ("source", "gflop"),
    [
        # 100 iterations of 20 draws, each two walks of a path, one back, and the decision with its gradient
        (Source("apgd-ce", "coup"), 2000 * (STEPS * (37.1 + 74.8 + 21.0 + 41.9) + 21.0)),
        (Source("apgd-ce", "coup", "first_order"), 2000 * (STEPS * (37.1 + 74.8 + 2 * 21.0) + 21.0)),
        (Source("apgd-ce", "reverse"), 2000 * (STEPS * (37.1 + 74.8) + 21.0)),
        (Source("apgd-ce", "coup", "bpda"), 2000 * (STEPS * (37.1 + 21.0) + 10.5)),
        (Source("apgd-ce", "none"), 2000 * 21.0),
        (Source("clean", "none"), 0),
    ],
)
def test_an_attack_is_counted_as_by_hand(cost, source, gflop):
    config = Config(profile="cifar10", budget="full", subset="first", n_images=4, n_steps=STEPS)
    scored = DRAWS * (STEPS * (37.1 + 21.0) + 10.5)
    job = Job(config, WRN, source, ("coup",), record="", done=False)
    assert cost["cost"](job) == pytest.approx((gflop + scored) / 1000)


def test_the_committed_page_is_what_the_command_prints(cost):
    assert (ROOT / "workflow" / "cost.md").read_text() == cost["page"]() + "\n"
