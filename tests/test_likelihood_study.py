"""Which verdicts made-up results lead to."""

import numpy as np

from coup_lib.studies import likelihood_study

N = 100


def share(points):
    """Right on so many of 100 images."""
    return (np.arange(N) < points).astype(float)


def results(plain_exact, guided_exact):
    plain = {"bpda": share(40), "adaptive": share(plain_exact), "recorded": share(40)}
    guided = {"bpda": share(60), "adaptive": share(guided_exact), "recorded": share(20)}
    return {"likelihood": plain, "guided-likelihood": guided}


def test_the_claim_under_every_gradient():
    line = likelihood_study.claims(results(45, 45)).splitlines()[2]
    verdicts = ["**holds** (+20.00", "**is not decided** (+0.00", "**does not hold** (-20.00"]
    assert [cell.split(" points")[0] for cell in line.split(" | ")[1:]] == verdicts


def test_a_gradient_is_masked_only_where_the_images_decide_it():
    guided = "| guided likelihood maximisation: the exact gradient is the weaker attack | "
    assert f"{guided}**holds** (+20.00" in likelihood_study.claims(results(30, 80))
    assert f"{guided}**is not decided** (+1.00" in likelihood_study.claims(results(41, 61))
