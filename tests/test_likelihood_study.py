"""Which verdicts made-up results lead to."""

from made_up import losing

from coup_lib.studies import likelihood_study


def results(plain_exact, guided_exact):
    """From how many of 100 images are right under the exact gradient."""
    lost = {"likelihood": (60, 100 - plain_exact, 60), "guided-likelihood": (40, 100 - guided_exact, 80)}
    columns = ("bpda", "adaptive", "recorded")
    return {
        name: {column: losing(n, 100) for column, n in zip(columns, each, strict=True)}
        for name, each in lost.items()
    }


def test_the_claim_under_every_gradient():
    line = likelihood_study.claims(results(45, 45)).splitlines()[2]
    verdicts = ["**holds** (+20.00", "**is not decided** (+0.00", "**does not hold** (-20.00"]
    assert [cell.split(" points")[0] for cell in line.split(" | ")[1:]] == verdicts


def test_a_gradient_is_masked_only_where_the_images_decide_it():
    guided = "| guided likelihood maximisation: the exact gradient is the weaker attack | "
    assert f"{guided}**holds** (+20.00" in likelihood_study.claims(results(30, 80))
    assert f"{guided}**is not decided** (+1.00" in likelihood_study.claims(results(41, 61))
