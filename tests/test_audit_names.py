"""Names in an audit: each is part of a record's, and none may stand for something else."""

import pytest
import torch
from torch import nn

from coup_lib import Defence, audit


@pytest.mark.parametrize(
    ("name", "expected"),
    [("exact", "those beside the defence's own")] + [(name, "names of") for name in ("../up", "a/b", "", 3)],
)
def test_a_gradient_takes_neither_the_place_of_the_defence_nor_a_record_elsewhere(name, expected, tmp_path):
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval() for _ in range(2))
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4)
    with pytest.raises(ValueError, match=f"^mine, gradients: expected {expected}"):
        audit({"mine": Defence(model, {name: other})}, x, y, eps=0.1, budget="smoke", folder=tmp_path)
    assert not list(tmp_path.iterdir())
