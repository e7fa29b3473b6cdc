"""Which verdicts made-up results lead to."""

import numpy as np

from coup_lib.evaluation.config import Config
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
    text = likelihood_study.claim_lines(results(45, 45), Config(n_images=N))
    assert "with the identity gradient this **holds** (+20.00 points" in text
    assert "with the exact gradient this **is not decided** (+0.00 points" in text
    assert "in the worst case on record per image this **does not hold** (-20.00 points" in text


def test_a_gradient_is_masked_only_where_the_images_decide_it():
    config = Config(n_images=N)
    assert "weaker attack on guided likelihood maximisation: " in likelihood_study.claim_lines(
        results(30, 80), config
    )
    one_image_more = likelihood_study.claim_lines(results(41, 61), config)
    assert "On neither is the exact gradient shown to be a weaker attack" in one_image_more
