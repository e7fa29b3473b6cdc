"""Attacks outside the norm ball: a low-pass filter and a small flow, each within a reach of its own.

Neither is ever counted in a worst case over a ball. They move each colour alike, so grey images do; a filter
of colours is not among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coup_lib.ascent import BatchedEOT, cosines
from coup_lib.sde import per_image

OUTSIDE = {"filter": 1.0, "flow": float("inf")}  # name → the longest reach
TRIED = {  # (name, reach) → what it is called
    ("filter", 0.5): "low-pass filter, frequencies weakened by half at most",
    ("filter", 0.9): "low-pass filter, frequencies weakened by 90 % at most",
    ("flow", 0.5): "flow, pixels moved by half a pixel at most",
    ("flow", 1.0): "flow, pixels moved by one pixel at most",
}
KNOT = 4  # pixels between the knots of a flow, about
STEP = 0.1  # of the climb, where 1 is the reach


def filtered(x: Tensor, falls: Tensor, reach: float) -> Tensor:
    """x (n, C, H, W) in [0, 1] behind a low-pass filter for each image, like x.

    The cosine of frequencies (k, j) is multiplied by 1 - reach (1 - r_k c_j), where r and c begin with 1 and
    never rise: the mean stays, and no frequency is weakened by more than the reach. DiffBreak's LF (Kassis et
    al., NeurIPS 2025) learns filters under a perceptual distance; this one has a bound of its own.

    Args:
        falls: (n, H + W - 2) in [0, 1], how much of r and of c goes from each frequency to the next.
        reach: in [0, 1].
    """
    height, width = x.shape[2:]
    parts = (1 - falls).split([height - 1, width - 1], dim=1)
    rows, columns = (F.pad(part, (1, 0), value=1.0).cumprod(1) for part in parts)
    gain = 1 - reach * (1 - rows[:, None, :, None] * columns[:, None, None, :])
    down, across = cosines(height).to(x), cosines(width).to(x)
    return (down.T @ (gain * (down @ x @ across.T)) @ across).clamp(0, 1)


def flowed(x: Tensor, knots: Tensor, reach: float) -> Tensor:
    """x (n, C, H, W), each pixel taken from a little way off, bilinearly, like x (StAdv, Xiao et al. 2018).

    The flow is bilinear between knots about `KNOT` pixels apart; that makes it smooth, where StAdv weighs its
    variation against the loss. Beyond the edge is what is at the edge.

    Args:
        knots: (n, 2, h, w), how far down and to the right, at most 1 long, at h by w places.
        reach: the pixels that a length of 1 means.
    """
    flow = F.interpolate(reach * knots, x.shape[2:], mode="bilinear", align_corners=True)
    places = [torch.arange(size).to(x) for size in x.shape[2:]]
    from_where = torch.stack(torch.meshgrid(*places, indexing="ij")) + flow
    last = torch.tensor(x.shape[2:]).to(x).sub(1).clamp_min(1)  # an axis of one pixel has nowhere to go
    grid = (2 * from_where / last[:, None, None] - 1).permute(0, 2, 3, 1).flip(3)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)


def climb(name: str, draws: BatchedEOT, x: Tensor, y: Tensor, reach: float, n_iter: int) -> Tensor:
    """The images like x of highest mean loss on a climb from x itself, by the filter or the flow."""
    height, width = x.shape[2:]
    change = filtered if name == "filter" else flowed
    shape = [height + width - 2] if name == "filter" else [2, 1 + -(-height // KNOT), 1 + -(-width // KNOT)]
    at, best, highest = x.new_zeros(len(x), *shape), x, torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(n_iter + 1):
        with torch.enable_grad():
            made = change(x, at.requires_grad_(), reach)
        slope, loss = draws.mean_gradient(made.detach(), y)
        best = torch.where(per_image(loss > highest, x), made.detach(), best)
        highest = torch.maximum(loss, highest)
        at = at.detach() + STEP * torch.autograd.grad(made, at, slope)[0].sign()
        at = at.clamp(0, 1) if name == "filter" else at / at.norm(dim=1, keepdim=True).clamp_min(1)
    return best
