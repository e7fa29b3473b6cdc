"""Train the networks of the small profiles and write their model card.

The same seed, thread count, processor and PyTorch give the same weights, bit for bit; elsewhere sums are
taken in another order and the weights differ slightly.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coup_lib.attacks import NORM_LABELS, PGD_STEP, Attack
from coup_lib.checks import choice, count
from coup_lib.data import SHAPES, SIZES, SPLIT_SEED, Images, load_split
from coup_lib.evaluation.config import device as named_device
from coup_lib.evaluation.outcomes import Accuracy
from coup_lib.evaluation.profiles import PROFILES
from coup_lib.files import write_atomically
from coup_lib.networks.checkpoints import load_network, load_state, save_network, weights_path
from coup_lib.networks.published import file_digest
from coup_lib.networks.small import NETWORKS, T_MAX, NoiseNet, PatchedDDPMpp, build_network
from coup_lib.networks.zoo import load_classifier
from coup_lib.paths import ROOT, WEIGHTS
from training import cifar as train_cifar
from training import digits as train_digits
from training.denoising import denoising_loss
from training.fit import PRECISIONS, Watch

RECIPES = {"digits": train_digits.RECIPES, "cifar10": train_cifar.RECIPES}
TRAINED = {"digits": "digits", "cifar10": "cifar10-small"}  # data set → the profile that its networks are for
STATES = ROOT / "build" / "training"
COMMANDS = "commands.json"  # beside the weights: network → the commands that trained it, one after the other
CARD_TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
EXAMPLES = """\
examples:
  coup train                                                digits: minutes on two CPU cores
  coup train --dataset cifar10 --batch 1024 --compiled      for a GPU; goes on where it was killed"""
# Whose images the card's denoising losses are of, and how many of them at most.
CARD_IMAGES = {"digits": (285, ("validation",)), "cifar10": (128, ("validation", "train"))}


def train(
    dataset: str,
    name: str,
    *,
    seed: int,
    steps: int | None = None,
    batch: int | None = None,
    begin_with: Path | None = None,
    compiled: bool = False,
    precision: str = "float32",
    state: Path | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """One trained network, fixed by the seed and the thread count.

    Args:
        steps: other than the recipe's.
        begin_with, compiled: of CIFAR-10's score network: weights from which it is trained further, instead
            of from scratch; training by torch.compile.
        batch, precision, state, watch: see `Recipe` and `fit`; for CIFAR-10, whose training takes long.
    """
    torch.manual_seed(seed)
    network, data = build_network(dataset, name), load_split(dataset, "train")
    changes: dict[str, Any] = {"seed": seed, "images": len(data)} | ({"steps": steps} if steps else {})
    if dataset == "digits":
        recipe = replace(RECIPES[dataset][name], **changes)
        if isinstance(network, NoiseNet):
            return train_digits.train_noise_net(network, data, load_split(dataset, "validation"), recipe)
        return train_digits.train_classifier(network, data, recipe, training_attack(dataset, name))
    device, attack = named_device("auto"), training_attack(dataset, name)
    network, data = network.to(device), data.to(device)
    recipe = RECIPES[dataset][name]
    recipe = replace(recipe, precision=precision, batch=batch or recipe.batch, **changes)
    if attack:
        network.load_state_dict(load_classifier(dataset, recipe.begins_with).state_dict())
        return train_cifar.train_robust(network, data, attack, recipe, state, watch)
    recipe = replace(recipe, compiled=compiled)
    if begin_with:
        load_state(network, load_file(begin_with), str(begin_with)).train().requires_grad_(True)
        recipe = replace(recipe, begins_with=file_digest(begin_with))
    held_out = load_split(dataset, "validation").to(device)
    return train_cifar.train_score(network, data, held_out, recipe, state, watch)


def training_attack(dataset: str, name: str) -> Attack | None:
    """What an adversarially trained classifier meets under training, by the norm it is named after."""
    profile = PROFILES[TRAINED[dataset]]
    for norm, robust in profile.robust_classifiers.items():
        if name == robust:
            n_iter = RECIPES[dataset][name].pgd_steps
            return Attack("pgd", NORM_LABELS[norm], profile.eps[norm], n_iter=n_iter, eot=1)
    return None


# --- the model card ---


def model_card(dataset: str, *, folder: Path = WEIGHTS) -> str:
    """The README.md of a folder of weights, every number measured on the files that lie there."""
    names = [name for name in NETWORKS[dataset] if weights_path(dataset, name, folder).exists()]
    device = named_device("auto")
    networks = {name: load_network(dataset, name, folder=folder).to(device) for name in names}
    splits = {split: load_split(dataset, split).to(device) for split in SIZES[dataset]}
    most, shown = CARD_IMAGES[dataset]
    ways: dict[tuple[str, ...], list[str]] = {}
    for name, lines in read_commands(dataset, folder).items():
        ways.setdefault(tuple(lines), []).append(name)
    commands = (f"- {', '.join(ways[way])}: {', then '.join(f'`{line}`' for line in way)}" for way in ways)
    classifiers, scores = [], []
    for name, network in networks.items():
        if not is_score(network):
            found = [Accuracy.of(right(network, splits[split])) for split in ("validation", "test")]
            cells = (f"{value.value:.2f} % [{value.low:.1f}, {value.high:.1f}]" for value in found)
            classifiers.append(_row(dataset, name, network, cells))
        for split in shown if is_score(network) else ():
            where = "" if split == "validation" else f", on {split} images"
            images = splits[split].first(min(most, len(splits[split])))
            cells = (f"{denoising_loss(network, images, t):.4f}" for t in CARD_TIMES)
            scores.append(_row(dataset, name + where, network, cells))
    return (
        Path(__file__)
        .with_name(f"{dataset}.md")
        .read_text()
        .format(
            **{split: len(data) for split, data in splits.items()},
            split_seed=SPLIT_SEED,
            commands="\n".join(commands),
            t_max=T_MAX,
            recipes=RECIPES[dataset],
            pgd_step=PGD_STEP,
            loss_images=min(most, len(splits["validation"])),
            classifiers="\n".join(classifiers),
            times=" | ".join(f"t = {t}" for t in CARD_TIMES),
            rules="---|" * len(CARD_TIMES),
            scores="\n".join(scores),
        )
    )


def _row(dataset: str, name: str, network: nn.Module, cells: Iterable[str]) -> str:
    size = sum(parameter.numel() for parameter in network.parameters())
    return f"| {name} | {size} | {flops(network, SHAPES[dataset]) / 1e6:.2f} | {' | '.join(cells)} |"


@torch.no_grad()
def right(network: nn.Module, data: Images) -> np.ndarray:
    """Whether the network classifies each image of the data correctly, (n,), 0 or 1."""
    predicted = torch.cat([network(x).argmax(1) for x in data.x.split(512)])
    return (predicted == data.y).cpu().numpy().astype(float)


def flops(network: nn.Module, shape: tuple[int, int, int] = (1, 8, 8)) -> int:
    """Floating-point operations of one forward pass of one image (a multiply-add counts two)."""
    x = torch.zeros(1, *shape, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.full_like(x[:, 0, 0, 0], 0.1)) if is_score(network) else network(x)
    return counter.get_total_flops()


def is_score(network: nn.Module) -> bool:
    """Whether it predicts noise; else it is a classifier."""
    return isinstance(network, NoiseNet | PatchedDDPMpp)


def read_commands(dataset: str, folder: Path = WEIGHTS) -> dict[str, list[str]]:
    """Network → the commands that trained it; each but the first began with what the one before had left."""
    path = folder / dataset / COMMANDS
    return json.loads(path.read_text()) if path.exists() else {}


# --- the command ---


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of `coup train`; ValueError and FileNotFoundError for mistaken ones."""
    parser = argparse.ArgumentParser(
        prog="coup train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    default = "(default: %(default)s)"
    option("--seed", type=int, default=0, help=f"of weights and noise {default}")
    option("--threads", type=int, default=1, help=f"the weights depend on it in the last digits {default}")
    option("--dataset", choices=tuple(NETWORKS), default="digits", help=f"what is learned {default}")
    option("--only", metavar="NETWORK", help="train this one alone (default: all of the data set)")
    option("--steps", type=int, help="how many (default: the recipe's)")
    option("--batch", type=int, help="images per step (CIFAR-10; default: the recipe's)")
    option(
        "--begin-with",
        type=Path,
        metavar="FILE",
        help="weights of CIFAR-10's score network to train further (default: from scratch)",
    )
    option("--compiled", action="store_true", help="the score network, by torch.compile (CIFAR-10)")
    option("--precision", choices=PRECISIONS, default="float32", help=f"of products (CIFAR-10) {default}")
    option("--folder", type=Path, default=WEIGHTS, help=f"where the weights go {default}")
    option("--card-only", action="store_true", help="measure what is there, train nothing")
    options = parser.parse_args(arguments)
    if options.only:
        choice("--only", options.only, NETWORKS[options.dataset])
    for name in ("steps", "batch"):
        if (given := getattr(options, name)) is not None:
            count(f"--{name}", given)
    if options.begin_with:
        choice("--only, with --begin-with", options.only, (PROFILES["cifar10-small"].score,))
        if not options.begin_with.is_file():
            raise FileNotFoundError(f"--begin-with: no weights at {options.begin_with}")
    return options


def command(options: argparse.Namespace) -> str:
    """The command line again, as the card names it: without defaults, folder and --card-only."""
    words = ["coup train", f"--seed {options.seed}", f"--threads {options.threads}"]
    usual = parsed([])
    for name in ("dataset", "only", "steps", "batch", "begin_with", "compiled", "precision"):
        if (given := getattr(options, name)) != getattr(usual, name):
            words.append(f"--{name.replace('_', '-')}" + ("" if given is True else f" {given}"))
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `coup train`: train, save, write the model card."""
    options = parsed(arguments)
    dataset, folder = options.dataset, options.folder
    torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(NETWORKS[dataset])
    for name in [] if options.card_only else names:
        make(name, options, STATES / f"{dataset}-{name}.pt")
    card = model_card(dataset, folder=folder)
    _write(folder / dataset / "README.md", card)
    print(card)


def make(name: str, options: argparse.Namespace, state: Path, watch: Watch | None = None) -> None:
    """Train a network by these options, and write its weights and the command that made them.

    state, watch: see `fit`.
    """
    started, dataset, folder = time.monotonic(), options.dataset, options.folder
    state.parent.mkdir(parents=True, exist_ok=True)
    network = train(dataset, name, state=state, watch=watch, **settings(options))
    half = isinstance(network, PatchedDDPMpp)  # what it rounds is far below what training leaves open
    path = save_network(network, dataset, name, folder=folder, half=half)
    told = read_commands(dataset, folder)
    told[name] = [*(told.get(name, []) if options.begin_with else []), command(options)]
    _write(folder / dataset / COMMANDS, json.dumps(told, indent=1, sort_keys=True) + "\n")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.monotonic() - started:.0f} s", flush=True)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that `train` takes, by its names."""
    names = ("seed", "steps", "batch", "begin_with", "compiled", "precision")
    return {name: getattr(options, name) for name in names}


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))
