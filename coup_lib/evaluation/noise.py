"""What a run's one seed is spent on: each use, and each image in it, has a stream of its own."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# Uses of the seed: the attack's own randomness, the noise of the defence under attack, the draws whose
# accuracy is reported, the draws by which a worst case is chosen, the draws that decide together.
ATTACK, DEFENCE, REPORT, SELECT, DECIDE = range(5)


def image_seeds(run_seed: int, purpose: int, places: Iterable[int], draws: int) -> Tensor:
    """(n, draws) int64 noise seeds of the images at these places of the split."""
    rows = [
        np.random.SeedSequence([run_seed, purpose, place]).generate_state(draws, np.uint64)
        for place in places
    ]
    return torch.from_numpy((np.stack(rows) >> np.uint64(2)).astype(np.int64))


def seed_of(run_seed: int, purpose: int, place: int) -> int:
    """A 62-bit seed for one use of the run's seed, by a chunk of images that begins at this place."""
    return int(image_seeds(run_seed, purpose, [place], draws=1))
