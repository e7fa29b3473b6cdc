"""Train the networks of the small profiles and write their model card.

python -m training.train                                                digits: minutes on two CPU cores
python -m training.train --dataset cifar10 --batch 1024 --compiled      CIFAR-10: for a GPU; goes on where
                                                                        it was killed

The same seed, thread count, processor and PyTorch give the same weights, bit for bit; elsewhere sums are
taken in another order and the weights differ slightly.
"""

import argparse
import json
import time
from collections.abc import Sequence
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
from training.fit import PRECISIONS

RECIPES = {"digits": train_digits, "cifar10": train_cifar}
TRAINED = {"digits": "digits", "cifar10": "cifar10-small"}  # data set → the profile that its networks are for
CARD_TIMES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
STATES = ROOT / "build" / "training"
COMMANDS = "commands.json"  # beside the weights: network → the commands that trained it, one after the other


# --- what is measured ---


@torch.no_grad()
def right(network: nn.Module, data: Images) -> np.ndarray:
    """Whether the network classifies each image of the data correctly, (n,), 0 or 1."""
    predicted = torch.cat([network(x).argmax(1) for x in data.x.split(512)])
    return (predicted == data.y).cpu().numpy().astype(float)


def flops(network: nn.Module, shape: tuple[int, int, int] = (1, 8, 8)) -> int:
    """Floating-point operations of one forward pass of one image (a multiply-add counts two)."""
    x = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, torch.full((1,), 0.1)) if is_score(network) else network(x)
    return counter.get_total_flops()


def is_score(network: nn.Module) -> bool:
    """Whether it predicts noise; else it is a classifier."""
    return isinstance(network, NoiseNet | PatchedDDPMpp)


# --- the command ---


def train(
    dataset: str,
    name: str,
    *,
    seed: int,
    steps: int | None = None,
    batch: int | None = None,
    begin_with: Path | None = None,
    compiled: bool = False,
    **resumable: Any,
) -> nn.Module:
    """One trained network, fixed by the seed and the thread count.

    `steps`, and `batch` of CIFAR-10's score network, are the recipe's, unless given.
    `begin_with`: weights from which CIFAR-10's score network is trained further, instead of from scratch.
    `compiled`: that network while it is trained, by torch.compile.
    `resumable`: `precision` and `state` of `fit`, for CIFAR-10, whose training takes long.
    """
    torch.manual_seed(seed)
    network, data = build_network(dataset, name), load_split(dataset, "train")
    settings: dict[str, Any] = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
    if dataset == "cifar10":
        device = named_device("auto")
        network, data = network.to(device), data.to(device)
        settings |= resumable
    if isinstance(network, NoiseNet):
        return train_digits.train_noise_net(network, data, load_split(dataset, "validation"), **settings)
    if isinstance(network, PatchedDDPMpp):
        held_out = load_split(dataset, "validation").to(data.x.device)
        settings |= {"compiled": compiled} | ({"batch": batch} if batch else {})
        if begin_with:
            load_state(network, load_file(begin_with), str(begin_with)).train().requires_grad_(True)
            settings["begins_with"] = file_digest(begin_with)
        return train_cifar.train_score(network, data, held_out, **settings)
    attack = _attack(dataset, name)
    if dataset == "cifar10":
        recipe = train_cifar.ROBUST[name]
        network.load_state_dict(load_classifier(dataset, recipe.begins_with).state_dict())
        settings = {"steps": recipe.steps, "lr": recipe.lr} | settings
        return train_cifar.train_robust(network, data, attack, **settings)
    return train_digits.train_classifier(network, data, attack=attack, **settings)


def _attack(dataset: str, name: str) -> Attack | None:
    """What an adversarially trained classifier meets under training, by the norm it is named after."""
    profile = PROFILES[TRAINED[dataset]]
    for norm, robust in profile.robust_classifiers.items():
        if name == robust:
            cifar = dataset == "cifar10"
            n_iter = train_cifar.ROBUST[name].pgd_steps if cifar else train_digits.PGD_STEPS
            return Attack("pgd", NORM_LABELS[norm], profile.eps[norm], n_iter=n_iter, eot=1)
    return None


def model_card(dataset: str, *, folder: Path = WEIGHTS) -> str:
    """The README.md of a folder of weights, every number measured on the files that lie there."""
    recipes = RECIPES[dataset]
    names = [name for name in NETWORKS[dataset] if weights_path(dataset, name, folder).exists()]
    networks = {name: load_network(dataset, name, folder=folder) for name in names}
    splits = {split: load_split(dataset, split) for split in SIZES[dataset]}
    classifiers = {name: net for name, net in networks.items() if not is_score(net)}
    scores = {name: net for name, net in networks.items() if is_score(net)}
    return recipes.CARD.format(
        **{split: len(data) for split, data in splits.items()},
        split_seed=SPLIT_SEED,
        commands=_command_lines(read_commands(dataset, folder)),
        t_max=T_MAX,
        **recipes.CARD_FACTS,
        pgd_step=PGD_STEP,
        loss_images=min(recipes.CARD_IMAGES, len(splits["validation"])),
        classifiers="\n".join(_classifier_row(dataset, *row, splits) for row in classifiers.items()),
        times=" | ".join(f"t = {t}" for t in CARD_TIMES),
        rules="---|" * len(CARD_TIMES),
        scores="\n".join(
            _score_row(dataset, name, net, split, splits[split], recipes.CARD_IMAGES)
            for name, net in scores.items()
            for split in recipes.CARD_SPLITS
        ),
    )


def read_commands(dataset: str, folder: Path = WEIGHTS) -> dict[str, list[str]]:
    """Network → the commands that trained it; each but the first began with what the one before had left."""
    path = folder / dataset / COMMANDS
    return json.loads(path.read_text()) if path.exists() else {}


def _write_command(dataset: str, name: str, command: str, folder: Path, *, further: bool) -> None:
    commands = read_commands(dataset, folder)
    commands[name] = [*(commands.get(name, []) if further else []), command]
    text = json.dumps(commands, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / dataset / COMMANDS, lambda temporary: temporary.write_text(text))


def _command_lines(commands: dict[str, list[str]]) -> str:
    """A line for each way of training, with the networks that were trained so."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for name, lines in commands.items():
        ways.setdefault(tuple(lines), []).append(name)
    return "\n".join(
        f"- {', '.join(names)}: {', then '.join(f'`{line}`' for line in lines)}"
        for lines, names in ways.items()
    )


def _classifier_row(dataset: str, name: str, network: nn.Module, splits: dict[str, Images]) -> str:
    cells = (_accuracy_cell(network, splits[split]) for split in ("validation", "test"))
    return f"| {_size(dataset, name, network)} | {' | '.join(cells)} |"


def _accuracy_cell(network: nn.Module, data: Images) -> str:
    found = Accuracy.of(right(network, data))
    return f"{found.value:.2f} % [{found.low:.1f}, {found.high:.1f}]"


def _score_row(dataset: str, name: str, network: nn.Module, split: str, data: Images, most: int) -> str:
    shown = data.first(min(most, len(data)))
    losses = (denoising_loss(network, shown, t) for t in CARD_TIMES)
    where = "" if split == "validation" else f", on {split} images"
    return f"| {_size(dataset, name + where, network)} | {' | '.join(f'{loss:.4f}' for loss in losses)} |"


def _size(dataset: str, name: str, network: nn.Module) -> str:
    size = sum(parameter.numel() for parameter in network.parameters())
    return f"{name} | {size} | {flops(network, SHAPES[dataset]) / 1e6:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train, save, write the model card."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", choices=tuple(NETWORKS), default="digits")
    parser.add_argument("--only", help="train this network alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it in the last digits")
    parser.add_argument("--steps", type=int, help="other than the recipe's")
    parser.add_argument("--batch", type=int, help="images per step of CIFAR-10's score network")
    parser.add_argument("--begin-with", type=Path, help="weights of the score network to train further")
    parser.add_argument(
        "--compiled", action="store_true", help="the score network, by torch.compile (CIFAR-10)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of products (CIFAR-10)")
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--card-only", action="store_true", help="measure what is there, train nothing")
    options = parser.parse_args(arguments)
    dataset, names = options.dataset, tuple(NETWORKS[options.dataset])
    if options.only:
        names = (choice("--only", options.only, names),)
    for name in ("steps", "batch"):
        if (given := getattr(options, name)) is not None:
            count(f"--{name}", given)
    if options.begin_with:
        choice("--only, with --begin-with", options.only, (PROFILES["cifar10-small"].score,))
        if not options.begin_with.is_file():
            raise FileNotFoundError(f"--begin-with: no weights at {options.begin_with}")
    torch.set_num_threads(options.threads)
    command = _command(options)
    for name in () if options.card_only else names:
        started = time.monotonic()
        state = STATES / f"{dataset}-{name}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        network = train(
            dataset,
            name,
            seed=options.seed,
            steps=options.steps,
            batch=options.batch,
            begin_with=options.begin_with,
            compiled=options.compiled,
            precision=options.precision,
            state=state,
        )
        half = isinstance(network, PatchedDDPMpp)  # what it rounds is far below what training leaves open
        path = save_network(network, dataset, name, folder=options.folder, half=half)
        _write_command(dataset, name, command, options.folder, further=options.begin_with is not None)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.monotonic() - started:.0f} s", flush=True)
    card = model_card(dataset, folder=options.folder)
    write_atomically(options.folder / dataset / "README.md", lambda temporary: temporary.write_text(card))
    print(card)


def _command(options: argparse.Namespace) -> str:
    """The command line again, as the card names it."""
    command = f"python -m training.train --seed {options.seed} --threads {options.threads}"
    command += f" --dataset {options.dataset}" if options.dataset != "digits" else ""
    command += f" --only {options.only}" if options.only else ""
    command += f" --steps {options.steps}" if options.steps else ""
    command += f" --batch {options.batch}" if options.batch else ""
    command += f" --begin-with {options.begin_with}" if options.begin_with else ""
    command += " --compiled" if options.compiled else ""
    return command + (f" --precision {options.precision}" if options.precision != "float32" else "")


if __name__ == "__main__":
    main()
