"""An attack by decisions alone: RayS (Chen and Gu, KDD 2020, arXiv:2006.12792), for L2 with weighted rays."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from coup_lib.ascent import norm_label

BISECTED = 8  # how often the distance to a wrong decision is halved
# Factors on a block of a ray; in L2 not every pixel is worth as much.
CHANGES = {"Linf": (-1.0,), "L2": (-1.0, 0.5, 2.0)}

Wrong = Callable[[Tensor, Tensor], Tensor]  # points (m, C, H, W), their images' places (m,) → (m,) bool


def rays(wrong: Wrong, x: Tensor, norm: str, eps: float, queries: int) -> Tensor:
    """Points like x, within eps, on the rays on which a wrong decision was found nearest.

    A ray begins with the same sign in every pixel. One block after the other is changed, by `CHANGES`: the
    whole image, then halves, down to single values, and again. A change is kept where the decision is still
    wrong as near to the image as before; then it is bisected how near it can be.

    Args:
        wrong: whether decisions are; asked at most `queries` times about an image.
        x: (n, C, H, W) in [0, 1].
    """
    norm, size = norm_label(norm), x[0].numel()
    order = torch.inf if norm == "Linf" else 2
    ray = torch.ones_like(x).flatten(1)
    radius, left = ray.norm(order, dim=1), torch.full((len(x),), queries, device=x.device)

    def reached(places: Tensor, ray: Tensor, radius: Tensor) -> Tensor:
        shift = ray * (radius / ray.norm(order, dim=1))[:, None]
        return (x[places] + shift.reshape(-1, *x.shape[1:])).clamp(0, 1)

    def ask(places: Tensor, ray: Tensor, radius: Tensor) -> Tensor:
        left[places] -= 1
        return wrong(reached(places, ray, radius), places) if len(places) else places.bool()

    blocks = 1
    while bool(((left > 0) & (radius > eps)).any()):
        for block, factor in product(torch.arange(size, device=x.device).chunk(blocks), CHANGES[norm]):
            places = ((left > 0) & (radius > eps)).nonzero()[:, 0]
            changed = ray[places]
            changed[:, block] *= factor
            better = ask(places, changed, radius[places])
            places, changed = places[better], changed[better]
            ray[places], low = changed, torch.zeros_like(radius[places])
            for _ in range(BISECTED):
                few = left[places] > 0
                places, changed, low = places[few], changed[few], low[few]
                middle = (low + radius[places]) / 2
                hit = ask(places, changed, middle)
                radius[places] = torch.where(hit, middle, radius[places])
                low = torch.where(hit, low, middle)
        blocks = 1 if blocks >= size else min(2 * blocks, size)
    return reached(torch.arange(len(x), device=x.device), ray, radius.clamp_max(eps))
