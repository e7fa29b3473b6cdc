"""One digit, attacked and purified with and without guidance (notebook 11)."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from coup_lib.attacks import Attack
from coup_lib.checks import count, number
from coup_lib.data import load_split, split_size
from coup_lib.guidance import to_image
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.purify import Purified, coup, reverse_only
from coup_lib.reporting.plots import PALETTE

N_STEPS, SHOWN = 20, 6  # Euler steps of a path, and images of it that are drawn
LOOKS = {"without guidance": (PALETTE[1], "s"), "with guidance": (PALETTE[2], "D")}


@dataclass(frozen=True)
class Choice:
    """What is to be seen: a test image by its place, radius (L∞), t*, λ and the seed of the noise.

    Raises:
        ValueError: for a value out of its range.
    """

    index: int = 5
    eps: Any = "0.15"
    t_star: Any = 0.1
    guidance_weight: Any = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        fill("index", count("index", self.index, split_size("digits", "test") - 1, low=0))
        fill("eps", number("eps", self.eps, 0, 1, closed=True))
        fill("t_star", number("t_star", self.t_star, 1e-3, 0.3))
        fill("guidance_weight", number("guidance_weight", self.guidance_weight, -1e3, 1e3))
        fill("seed", count("seed", self.seed, 2**31, low=0))


@dataclass(frozen=True)
class Walk:
    """A path: times (N + 1,), images (N + 1, 8, 8) in [0, 1], probabilities of the classes (N + 1, 10)."""

    times: np.ndarray
    images: np.ndarray
    probabilities: np.ndarray


@cache
def networks() -> tuple[nn.Module, nn.Module]:
    """(the classifier, the score) of the profile digits."""
    return load_classifier("digits", "cnn-small"), load_score("digits", "score")


def attacked(choice: Choice) -> tuple[Tensor, Tensor, int]:
    """(the image, the image attacked without a defence, both (1, 1, 8, 8), its label); PGD of 40 steps."""
    images, classifier = load_split("digits", "test"), networks()[0]
    x, y = images.x[choice.index : choice.index + 1], images.y[choice.index : choice.index + 1]
    if choice.eps <= 0:
        return x, x, int(y)
    return x, Attack("pgd", "linf", choice.eps, n_iter=40, eot=1)(classifier, x, y).x_adv, int(y)


def walks(x: Tensor, choice: Choice) -> dict[str, Walk]:
    """The two purifications of x (1, 1, 8, 8), on the same Brownian motion."""
    common = {"t_star": choice.t_star, "n_steps": N_STEPS}
    guided = coup(*networks(), guidance_weight=choice.guidance_weight, **common)
    defences = {"without guidance": reverse_only(*networks(), **common), "with guidance": guided}
    return {name: _walk(defence, x, choice.seed) for name, defence in defences.items()}


@torch.no_grad()
def _walk(defence: Purified, x: Tensor, seed: int) -> Walk:
    states: list[Tensor] = []
    defence.purifier.trajectory(x, lambda index, t, state: states.append(state), seeds=torch.tensor([seed]))
    images = to_image(torch.cat(states)).clamp(0, 1)
    probabilities = defence.classifier(images).softmax(1)
    return Walk(defence.purifier.times.numpy(), images[:, 0].numpy(), probabilities.numpy())


def draw(choice: Choice) -> Figure:
    """The image, the attacked image, both paths, and the confidence in the true and in the other class."""
    clean, x, label = attacked(choice)
    found = walks(x, choice)
    wrong = int(np.delete(networks()[0](x).softmax(1)[0].numpy(), label).argmax())
    wrong += wrong >= label  # its place before the true class was taken out
    figure = plt.figure(figsize=(9, 5.4), layout="constrained")
    settings = f"eps = {choice.eps:g}, t* = {choice.t_star:g}, λ = {choice.guidance_weight:g}"
    figure.suptitle(f"image {choice.index}; {settings}, {N_STEPS} steps", fontsize="medium")
    figures: Any = figure.subfigures(2, 1, height_ratios=(3, 4))
    panels = figures[0].subplots(2, SHOWN + 1)
    for axes, image, name in zip(panels[:, 0], (clean, x), ("image", "attacked"), strict=True):
        _picture(axes, image[0, 0].numpy(), name)
    places = np.linspace(0, N_STEPS, SHOWN).round().astype(int)
    for row, (name, walk) in zip(panels, found.items(), strict=True):
        for axes, place in zip(row[1:], places, strict=True):
            _picture(axes, walk.images[place], f"t = {walk.times[place]:.3f}")
        row[1].set_ylabel(name, fontsize="small")
    axes = figures[1].subplots()
    for name, walk in found.items():
        colour, marker = LOOKS[name]
        look = {"color": colour, "marker": marker, "markersize": 4}
        for seen, words, line in ((label, f"true class ({label})", "-"), (wrong, f"class {wrong}", "--")):
            axes.plot(walk.times, walk.probabilities[:, seen], line, label=f"{words}, {name}", **look)
    axes.set(xlabel="time t of the reverse SDE", ylabel="probability", ylim=(-0.03, 1.03))
    axes.invert_xaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _picture(axes: plt.Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize="small")
    axes.set(xticks=[], yticks=[])
