from dataclasses import replace

import numpy as np
import pytest

from coup_lib.evaluation.config import Config
from coup_lib.studies import fidelity
from coup_lib.studies.fidelity import COMPARED, gradient_cosines

SMALL = Config(n_images=5, n_iter=2, eot=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """In chunks of four and one images, two and three steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("coup_lib.paths.RESULTS", tmp_path_factory.mktemp("results"))
        return gradient_cosines(SMALL, (2, 3))["result"]


def test_every_image_has_a_cosine_at_every_number_of_steps(whole):
    assert whole["step_counts"] == [2, 3]
    for defence, gradients in COMPARED.items():
        assert set(whole[defence]) == set(gradients)
        for name in gradients:
            values = np.array(whole[defence][name])
            assert values.shape == (2, 5) and np.abs(values).max() <= 1 + 1e-12
            assert np.abs(values).max() < 1 - 1e-6  # none of them is exact on these networks


def test_chunks_and_who_makes_them_do_not_matter(whole, results_folder, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "CHUNK", 2)
    found = gradient_cosines(replace(SMALL, shard=1, num_shards=2), (2, 3))["result"]
    for defence, gradients in COMPARED.items():
        for name in gradients:
            np.testing.assert_allclose(found[defence][name], whole[defence][name], rtol=0, atol=1e-9)
    assert "cosines to the exact gradient: started" in capsys.readouterr().out
    assert gradient_cosines(SMALL, (2, 3))["result"] == found  # read back, by another worker
    assert "started" not in capsys.readouterr().out


def test_without_guidance_the_first_order_gradient_is_exact(results_folder):
    found = gradient_cosines(replace(SMALL, guidance_weight=0.0), (2,))["result"]
    np.testing.assert_allclose(found["coup"]["first_order"], 1, atol=1e-12)
    np.testing.assert_allclose(found["coup"]["adjoint"], found["reverse"]["adjoint"], atol=1e-12)


def test_the_table_has_every_median(whole):
    frame = fidelity.median_table(whole)
    assert list(frame.columns) == ["N = 2", "N = 3"]
    median = np.median(whole["coup"]["first_order"][1])
    assert frame.loc["COUP, first-order", "N = 3"] == f"{median:.3f}"
