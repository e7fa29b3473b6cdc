"""Train the networks of the digits profile: `python -m coup_lib.train` (minutes on two CPU cores).

The same seed, thread count, processor and PyTorch give the same weights, bit for bit; elsewhere sums are
taken in another order and the weights differ slightly.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from coup_lib.attacks import PGD_STEP, Attack
from coup_lib.checkpoints import load_network, save_network, weights_path
from coup_lib.config import NORM_LABELS
from coup_lib.data import SIZES, SPLIT_SEED, Images, load_split
from coup_lib.files import write_atomically
from coup_lib.networks import NETWORKS, T_MAX, NoiseNet, build_network
from coup_lib.paths import WEIGHTS
from coup_lib.profiles import PROFILES
from coup_lib.sde import VPSDE
from coup_lib.stats import wilson

DATASET = "digits"
CARD_TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
STOP_TIMES = (0.05, 0.1, 0.2)
PGD_STEPS, ROBUST_STEPS = 10, 2000  # of the attack in adversarial training, and of that training


# --- what each network learns ---


def train_classifier(
    network: nn.Module,
    data: Images,
    *,
    seed: int,
    steps: int = 900,
    batch: int = 100,
    lr: float = 3e-3,
    attack: Attack | None = None,
) -> nn.Module:
    """Cross-entropy on deformed, slightly noised images; returns the moving average of the weights.

    With an attack, on the images that it makes of the deformed ones against the network as it stands:
    adversarial training (Madry et al. 2018).
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(network: nn.Module) -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator)
        x = deformed(data.x[rows], generator, shift=0.2, angle=0.2, scale=0.12, shear=0.15)
        if attack:
            x = attack(network, x, data.y[rows]).x_adv
        else:
            x = x + 0.05 * torch.randn(x.shape, generator=generator)
        return F.cross_entropy(network(x), data.y[rows], label_smoothing=0.05)

    return fit(network, loss, steps=steps, lr=lr, decay=0.99, weight_decay=0.05)


def train_noise_net(
    network: NoiseNet,
    data: Images,
    validation: Images,
    *,
    seed: int,
    steps: int = 9000,
    batch: int = 256,
    lr: float = 2e-3,
    real_share: float = 0.1,
) -> nn.Module:
    """Squared error of the predicted noise; returns the moving average where validation was best.

    real_share of the images are training images, the others redrawn from them.
    """
    generator = torch.Generator().manual_seed(seed)
    network.fit_skip(data.x)
    source = redrawable(data.x)

    def loss(network: nn.Module) -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=generator)
        x = redrawn(source[rows], generator, shift=0.09, angle=0.12, scale=0.08, shear=0.08)
        real = torch.rand(batch, 1, 1, 1, generator=generator) < real_share
        x = torch.where(real, data.x[rows], x)
        t = T_MAX * torch.rand(batch, generator=generator) ** 1.5 + 1e-4  # denser where images are sharp
        noise = torch.randn(x.shape, generator=generator)
        return F.mse_loss(network(VPSDE().noised(2 * x - 1, t, noise), t), noise)

    def score(network: nn.Module) -> float:
        return sum(denoising_loss(network, validation, t, repeats=4) for t in STOP_TIMES)

    return fit(network, loss, score, steps=steps, lr=lr, decay=0.998, weight_decay=0.05)


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    score: Callable[[nn.Module], float] | None = None,
    *,
    steps: int,
    lr: float,
    decay: float,
    weight_decay: float,
    every: int = 100,
) -> nn.Module:
    """AdamW on loss(network), warm-up, cosine decay; the moving average of lowest score, else the last."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    average = copy.deepcopy(network)
    best, lowest = average, math.inf
    bar = tqdm(range(steps), mininterval=5)
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        optimizer.zero_grad()
        value = loss(network)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average_into(average, network, min(decay, (2 + step) / (11 + step)))
        if score and (step + 1) % every == 0 and (now := score(average)) < lowest:
            best, lowest = copy.deepcopy(average), now
            bar.set_postfix(validation=f"{now:.4f}")
    return best


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·network, parameter by parameter."""
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


# --- more data than there is ---


def deformed(
    x: Tensor,
    generator: torch.Generator,
    *,
    shift: float,
    angle: float,
    scale: float,
    shear: float,
    finer: int = 1,
    mode: str = "bilinear",
) -> Tensor:
    """Each image of x (n, C, H, W) under its own affine map, sampled finer-fold: (n, C, finer·H, finer·W).

    The maps are uniform within the bounds, in half images, radians and fractions.
    """

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(len(x), generator=generator) - 1)

    a, s, k = uniform(angle), 1 + uniform(scale), uniform(shear)
    rows = [a.cos() * s, k - a.sin(), uniform(shift), a.sin() * s, a.cos() * s, uniform(shift)]
    size = [len(x), x.shape[1], finer * x.shape[2], finer * x.shape[3]]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), size, align_corners=False)
    return F.grid_sample(x, grid, mode=mode, align_corners=False)


def redrawn(x: Tensor, generator: torch.Generator, **bounds: float) -> Tensor:
    """Deformed digits with the grey levels of real ones: k/16, half of the pixels empty.

    load_digits counts the ink of a 32×32 bitmap in blocks of 4×4, so we deform, threshold and count there.
    Interpolated grey levels instead *raise* the validation loss of a denoiser.
    """
    bitmap = deformed(x, generator, finer=4, mode="bicubic", **bounds) > 0.5
    return F.avg_pool2d(bitmap.float(), 4)


def redrawable(x: Tensor, rounds: int = 4) -> Tensor:
    """Grey levels, not confined to [0, 1], that redrawn() without deformation turns into x again, nearly."""
    still, source = {"shift": 0.0, "angle": 0.0, "scale": 0.0, "shear": 0.0}, x
    for _ in range(rounds):
        source = source + 0.6 * (x - redrawn(source, torch.Generator(), **still))
    return source


# --- what is measured ---


@torch.no_grad()
def accuracy(network: nn.Module, data: Images) -> float:
    """The fraction of data that network classifies correctly."""
    return (network(data.x).argmax(1) == data.y).float().mean().item()


@torch.no_grad()
def denoising_loss(network: nn.Module, data: Images, t: float, *, repeats: int = 8, seed: int = 0) -> float:
    """Mean squared error per pixel of the predicted noise at time t, over repeats fixed noises per image."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * data.x.repeat(repeats, 1, 1, 1) - 1
    times, noise = torch.full((len(x),), t), torch.randn(x.shape, generator=generator)
    return F.mse_loss(network(VPSDE().noised(x, times, noise), times), noise).item()


def flops(network: nn.Module) -> int:
    """Floating-point operations of one forward pass of one image (a multiply-add counts two)."""
    x = torch.zeros(1, 1, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.full((1,), 0.1)) if isinstance(network, NoiseNet) else network(x)
    return counter.get_total_flops()


# --- the command ---


def train(dataset: str, name: str, *, seed: int, steps: int | None = None) -> nn.Module:
    """One trained network, fixed by the seed and the thread count; steps only to try the code out."""
    torch.manual_seed(seed)
    network, data = build_network(dataset, name), load_split(dataset, "train")
    fewer: dict[str, Any] = {} if steps is None else {"steps": steps}
    if isinstance(network, NoiseNet):
        return train_noise_net(network, data, load_split(dataset, "validation"), seed=seed, **fewer)
    for norm, robust in PROFILES[dataset].robust_classifiers.items():
        if name == robust:
            eps = PROFILES[dataset].eps[norm]
            attack = Attack("pgd", NORM_LABELS[norm], eps, seed=seed, n_iter=PGD_STEPS, eot=1)
            longer = {"steps": ROBUST_STEPS, **fewer}
            return train_classifier(network, data, seed=seed, attack=attack, **longer)
    return train_classifier(network, data, seed=seed, **fewer)


def model_card(dataset: str, *, command: str, folder: Path = WEIGHTS) -> str:
    """The README.md of a folder of weights, every number measured on the files that lie there."""
    names = [name for name in NETWORKS[dataset] if weights_path(dataset, name, folder).exists()]
    networks = {name: load_network(dataset, name, folder=folder) for name in names}
    classifiers = {name: net for name, net in networks.items() if not isinstance(net, NoiseNet)}
    scores = {name: net for name, net in networks.items() if isinstance(net, NoiseNet)}
    return CARD.format(
        **SIZES[dataset],
        split_seed=SPLIT_SEED,
        command=command,
        t_max=T_MAX,
        pgd_steps=PGD_STEPS,
        pgd_step=PGD_STEP,
        classifiers="\n".join(_classifier_row(dataset, name, net) for name, net in classifiers.items()),
        times=" | ".join(f"t = {t}" for t in CARD_TIMES),
        rules="---|" * len(CARD_TIMES),
        scores="\n".join(_score_row(dataset, name, net) for name, net in scores.items()),
    )


CARD = """# Networks of the digits profile

Written by `{command}`, this card included. The same command on the same
processor and PyTorch gives the same files; another thread count or processor rounds differently.

Data: `sklearn.datasets.load_digits`, 1797 images of 8×8 pixels in [0, 1], split (stratified,
seed {split_seed}) into {train} for training, {validation} for validation and {test} for the test. Sizes,
augmentation and stopping were chosen on validation; the test split served for nothing but its column below.
Accuracies with their 95 % Wilson interval. The classifiers named after a norm are adversarially trained on
PGD-{pgd_steps} images (step {pgd_step:.3f} eps) at the profile's eps; their robustness is in notebook 06.

| classifier | parameters | MFLOP per image | accuracy, validation (n = {validation}) | test (n = {test}) |
|---|---|---|---|---|
{classifiers}

Noise predictor, for t in (0, {t_max}]: mean squared error of the predicted noise per pixel on validation
({validation} images, 8 noises each; 1 is what predicting zero would cost).

| network | parameters | MFLOP per image | {times} |
|---|---|---|{rules}
{scores}
"""


def _classifier_row(dataset: str, name: str, network: nn.Module) -> str:
    splits = [load_split(dataset, split) for split in ("validation", "test")]
    return f"| {_size(name, network)} | {' | '.join(_accuracy_cell(network, data) for data in splits)} |"


def _accuracy_cell(network: nn.Module, data: Images) -> str:
    share = accuracy(network, data)
    low, high = wilson(round(share * len(data)), len(data))
    return f"{100 * share:.2f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _score_row(dataset: str, name: str, network: nn.Module) -> str:
    losses = (denoising_loss(network, load_split(dataset, "validation"), t) for t in CARD_TIMES)
    return f"| {_size(name, network)} | {' | '.join(f'{loss:.4f}' for loss in losses)} |"


def _size(name: str, network: nn.Module) -> str:
    return f"{name} | {sum(p.numel() for p in network.parameters())} | {flops(network) / 1e6:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train, save, write the model card."""
    parser = argparse.ArgumentParser(prog="python -m coup_lib.train", description=__doc__)
    parser.add_argument("--only", choices=tuple(NETWORKS[DATASET]), help="train this network alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    parser.add_argument("--steps", type=int, help="fewer than the published weights took, to try it out")
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where the weights go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in [options.only] if options.only else NETWORKS[DATASET]:
        started = time.monotonic()
        network = train(DATASET, name, seed=options.seed, steps=options.steps)
        path = save_network(network, DATASET, name, folder=options.folder)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.monotonic() - started:.0f} s", flush=True)
    command = f"python -m coup_lib.train --seed {options.seed} --threads {options.threads}"
    command += f" --steps {options.steps}" if options.steps else ""
    card = model_card(DATASET, command=command, folder=options.folder)
    write_atomically(options.folder / DATASET / "README.md", lambda temporary: temporary.write_text(card))
    print(card)


if __name__ == "__main__":
    main()
