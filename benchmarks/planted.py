"""Defences whose answer is known: planted maskings from the literature, and honest ones, each audited alone.

`python -m benchmarks.planted` audits all of them on digits and writes benchmarks/results/planted.md: whether
each is flagged, and how far the audit's worst case is from what an attacker reaches who knows the trick.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coup_lib.attacks import Attack
from coup_lib.auditing.audit import audit
from coup_lib.auditing.defence import Audited
from coup_lib.auditing.probe import Probe
from coup_lib.auditing.result import Audit
from coup_lib.data import Images, load_split
from coup_lib.evaluation.outcomes import Accuracy, Difference, Predictions, worst_of
from coup_lib.evaluation.run import outcomes_of
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.purify import Purified, coup
from coup_lib.reporting.tables import MISSING, markdown

EPS = 0.15  # L∞, of the profile digits
ITERATIONS, DRAWS = 100, 20  # of the attacker who knows
LEVELS = 4  # of a quantised image
TEMPERATURE = 1e4
NOISE = 0.1  # in units of the image
FOLDER = Path("build/planted")
PAGE = Path(__file__).parent / "results" / "planted.md"


class Before(nn.Module):
    """Something done to the image before a classifier sees it."""

    def __init__(self, change: Callable[[Tensor], Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.change, self.classifier = change, classifier
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.change(x))


class Behind(nn.Module):
    """Something done to the logits of classifiers, one or several."""

    def __init__(self, change: Callable[..., Tensor], *classifiers: nn.Module) -> None:
        super().__init__()
        self.change, self.classifiers = change, nn.ModuleList(classifiers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(*(classifier(x) for classifier in self.classifiers))


def quantised(x: Tensor) -> Tensor:
    """Few levels of grey (feature squeezing, Xu et al., arXiv:1704.01155): a derivative of zero."""
    return (x * LEVELS).round() / LEVELS


def blurred(x: Tensor) -> Tensor:
    """The mean of each pixel and its four neighbours, a third of it its own."""
    kernel = torch.tensor([[0, 1, 0], [1, 2, 1], [0, 1, 0]], dtype=x.dtype, device=x.device) / 6
    return F.conv2d(x, kernel[None, None], padding=1)


def detached(x: Tensor) -> Tensor:
    """A purifier through which no gradient goes (Athalye et al., arXiv:1802.00420)."""
    return blurred(x).detach()


def frozen(x: Tensor) -> Tensor:
    """Noise that looks random and is the same in every call."""
    generator = torch.Generator().manual_seed(7)
    return (x + NOISE * torch.randn(x.shape[1:], generator=generator)).clamp(0, 1)


def noisy(x: Tensor) -> Tensor:
    """Fresh noise (randomised smoothing's base, Cohen et al., arXiv:1902.02918)."""
    return x + NOISE * torch.randn_like(x)


def resized(x: Tensor) -> Tensor:
    """A random size and place, and back (Xie et al., arXiv:1711.01991)."""
    size = int(torch.randint(9, 13, ()))
    left, top = (int(torch.randint(0, 13 - size, ())) if size < 12 else 0 for _ in range(2))
    small = F.interpolate(x, (size, size), mode="nearest")
    padded = F.pad(small, (left, 12 - size - left, top, 12 - size - top))
    return F.interpolate(padded, (8, 8), mode="bilinear", align_corners=False)


def cosines() -> Tensor:
    """(8, 8), the orthonormal cosine transform."""
    places = torch.arange(8.0)
    matrix = torch.cos(torch.pi * (2 * places + 1) * places[:, None] / 16) / 2
    matrix[0] /= 2**0.5
    return matrix


def compressed(x: Tensor) -> Tensor:
    """JPEG's rounding of a block's cosine coefficients (Guo et al., arXiv:1711.00117)."""
    matrix = cosines().to(x)
    return matrix.T @ ((matrix @ x @ matrix.T) * LEVELS).round() / LEVELS @ matrix


class Turned(torch.autograd.Function):
    """The image itself, with a gradient of the wrong sign."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, v: Tensor) -> Tensor:
        return -v


def broken(x: Tensor) -> Tensor:
    """The image itself, with a gradient of NaN where it is black."""
    return (x * x).sqrt() * x.sign()


def saturated(logits: Tensor) -> Tensor:
    """Probabilities of zero and one (defensive distillation, Papernot et al., arXiv:1511.04508)."""
    return (TEMPERATURE * logits).softmax(1)


def voted(*logits: Tensor) -> Tensor:
    """How many of an ensemble vote for each class."""
    return torch.stack([F.one_hot(each.argmax(1), each.shape[1]) for each in logits]).sum(0).float()


def mean(*logits: Tensor) -> Tensor:
    """The ensemble's mean logits, which its votes follow."""
    return torch.stack(logits).mean(0)


def trained_on_noise(steps: int = 400) -> nn.Module:
    """A small network that has learned digits under `NOISE`, in seconds."""
    images = load_split("digits", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimiser = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(steps):
            chosen = torch.randint(len(images), (128,))
            loss = F.cross_entropy(network(noisy(images.x[chosen])), images.y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval().requires_grad_(False)


class Opaque(nn.Module):
    """A network's decisions with confidences that are noise, all in one piece: no part of it can be seen."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self._held = (classifier,)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self._held[0](x)
        best = F.one_hot(logits.argmax(1), logits.shape[1])
        return torch.frac(torch.sin(logits * 1e3) * 100).abs() + 2 * best


@dataclass(frozen=True)
class Planted:
    """A defence whose answer is known.

    knowing: what an attacker differentiates who knows the trick. masked: whether it is one.
    """

    name: str
    model: nn.Module
    knowing: nn.Module
    masked: bool = True


def planted() -> list[Planted]:
    """All of them, the honest ones last."""
    net, large, robust = (
        load_classifier("digits", f"cnn-{name}") for name in ("small", "large", "small-linf")
    )
    score = load_score("digits", "score")
    first_order = coup(net, score, n_steps=10, gradient="first_order")
    noise_trained = Before(noisy, trained_on_noise())
    return [
        Planted("quantised input", Before(quantised, net), net),
        Planted("detached purifier", Before(detached, net), Before(blurred, net)),
        Planted("saturated softmax", Behind(saturated, net), net),
        Planted("frozen noise", Before(frozen, net), Before(frozen, net)),
        Planted("random resizing", Before(resized, net), Before(resized, net)),
        Planted("ensemble of votes", Behind(voted, net, large, robust), Behind(mean, net, large, robust)),
        Planted("JPEG's rounding", Before(compressed, net), net),
        Planted("gradient of the wrong sign", Before(Turned.apply, net), net),
        Planted("gradient of NaN", Before(broken, net), net),
        Planted("noise for confidences", Opaque(net), net),
        Planted("COUP's max", coup(net, score, n_steps=10), first_order),
        Planted("undefended", net, net, masked=False),
        Planted("adversarially trained", robust, robust, masked=False),
        Planted("trained on noise, with noise", noise_trained, noise_trained, masked=False),
    ]


def audited(one: Planted, images: Images, *, budget: str = "quick", folder: Path = FOLDER) -> Audit:
    """The audit of this defence alone: nothing else is there to borrow images from."""
    place = folder / one.name.replace("'", "").replace(",", "")
    return audit({"it": one.model}, images.x, images.y, eps=EPS, budget=budget, folder=place, verbose=False)


def known(
    one: Planted, images: Images, found: Audit, *, n_iter: int = ITERATIONS, eot: int = DRAWS
) -> np.ndarray:
    """What the attacker who knows leaves of each image, (n,): the worse of two losses, on fresh draws."""
    probe, scores = found.probes["it"], []
    model, differentiated = (_engine(module, images, probe) for module in (one.model, one.knowing))
    for loss in ("ce", "margin"):
        attack = Attack(
            f"apgd-{loss}", "linf", EPS, n_iter=n_iter, eot=eot if probe.random else 1, max_batch=len(images)
        )
        attacked = Images(attack(differentiated, images.x, images.y).x_adv, images.y)
        shown = outcomes_of(model, attacked, found.settings, place=0, max_batch=1280)
        scores.append(Predictions(**{name: np.array(values) for name, values in shown.items()}))
    return worst_of(scores)


def _engine(module: nn.Module, images: Images, found: Probe) -> nn.Module:
    if isinstance(module, Purified):
        return module
    wrapped = Audited(module, images.x.shape[1:])
    wrapped.random, wrapped.alone = found.random, found.alone
    return wrapped


def line(one: Planted, images: Images) -> dict[str, str]:
    """A row of the table: what the audit reaches, what the attacker who knows does, and the signs."""
    found = audited(one, images)
    worst, knowing = found.worst["it"].right, known(one, images, found)
    row = found.measured.rows["it"]
    return {
        "Defence": one.name,
        "Masked": "yes" if one.masked else "no",
        "Clean": str(Accuracy.of(row["clean"].right)),
        "Its own gradient, APGD-ce": str(Accuracy.of(row["ce"].right)) if "ce" in row else MISSING,
        "Audit, worst case": str(Accuracy.of(worst)),
        "Attacker who knows": str(Accuracy.of(knowing)),
        "Audit − knowing": str(Difference.of(worst, knowing)),
        "Signs": "; ".join(sign.name for sign in found.signs if sign.masking) or "none",
    }


def main(n: int = 128) -> None:
    """Audit them all, print each row as it is made, and write the page."""
    images, rows = load_split("digits", "test").first(n), []
    for one in planted():
        rows.append(line(one, images))
        print("; ".join(rows[-1].values()), flush=True)
    frame = pd.DataFrame(rows).set_index("Defence")
    caption = (
        f"digits, first {n} test images; L∞, eps = {EPS}. Each is audited alone, with the budget quick. The "
        "attacker who knows differentiates what is behind the trick: the worse of APGD-ce and APGD-margin, "
        f"{ITERATIONS} iterations, {DRAWS} draws a gradient where there is noise. Accuracies in % of a fresh "
        "draw, with 95 % intervals. Made by `python -m benchmarks.planted`."
    )
    PAGE.write_text(f"{markdown(frame)}\n\n{caption}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
