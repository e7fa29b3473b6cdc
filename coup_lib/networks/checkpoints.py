"""Trained weights in the package: written whole or not at all, read only if their SHA-256 is as recorded.

And weights that others published: put into a network only if they fit it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor, nn

from coup_lib.files import CheckpointError, write_atomically
from coup_lib.networks.small import build_network
from coup_lib.paths import WEIGHTS

SUMS = "SHA256SUMS"
WRAPPERS = ("state_dict", "model", "net")  # the keys under which training scripts save the weights
PREFIXES = ("module.", "model.")  # what DataParallel and wrapped models put before each key


def load_network(profile_dataset: str, name: str, *, folder: Path = WEIGHTS) -> nn.Module:
    """A trained network, in eval mode and with requires_grad off.

    ValueError for an unknown data set or name, FileNotFoundError for a missing file,
    CheckpointError for a file whose SHA-256 is not the one in folder/SHA256SUMS.
    """
    network = build_network(profile_dataset, name)
    network.load_state_dict(load(verified_bytes(weights_path(profile_dataset, name, folder), folder)))
    return network.eval().requires_grad_(False)


def save_network(
    network: nn.Module, dataset: str, name: str, *, folder: Path = WEIGHTS, half: bool = False
) -> Path:
    """Write the weights, rounded to half precision if asked, and their line in SHA256SUMS; their path."""
    path = weights_path(dataset, name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    content = save(state)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    record_sum(_relative(path, folder), hashlib.sha256(content).hexdigest(), folder)
    return path


def weights_path(dataset: str, name: str, folder: Path = WEIGHTS) -> Path:
    """Where a network's weights lie: folder/dataset/name.safetensors."""
    return folder / dataset / f"{name}.safetensors"


def verified_bytes(path: Path, folder: Path = WEIGHTS) -> bytes:
    """The content of path, hashed and compared before anything parses it; raises like load_network."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train them with: python -m training.train")
    content, name = path.read_bytes(), _relative(path, folder)
    expected, got = read_sums(folder).get(name, "no line for it"), hashlib.sha256(content).hexdigest()
    if got != expected:
        raise CheckpointError(f"{path}: expected SHA-256 {expected} ({folder / SUMS}), got {got}")
    return content


def read_sums(folder: Path = WEIGHTS) -> dict[str, str]:
    """The digest of each file, named relative to folder, as sha256sum writes them; {} where nobody did."""
    lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).exists() else []
    return {file: digest for digest, file in (line.split(maxsplit=1) for line in lines if line.strip())}


def record_sum(file: str, digest: str, folder: Path) -> None:
    """Write the line of one file, named relative to folder; lines that others write meanwhile stay."""
    with FileLock(folder / f".{SUMS}.lock"):
        write_sums(read_sums(folder) | {file: digest}, folder)


def write_sums(sums: Mapping[str, str], folder: Path) -> None:
    """Write what `read_sums` reads, sorted by file."""
    lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
    write_atomically(folder / SUMS, lambda temporary: temporary.write_text(lines))


def load_state(network: nn.Module, state: Mapping[str, Any], where: str) -> nn.Module:
    """The network with the weights of a loaded checkpoint, in eval mode and with requires_grad off.

    One level of {"state_dict": ...}, {"model": ...} or {"net": ...} is unwrapped, and the prefixes "module."
    and "model." are taken off when all keys have them and none of the network's does. Only BatchNorm's
    num_batches_tracked, which old files lack and eval mode ignores, may be missing.

    Args:
        state: what torch.load(..., weights_only=True) gave.
        where: the file's name, for the message.

    Raises:
        CheckpointError: for anything but names and weights, and for weights that do not fit, naming the first
            missing, the first unexpected and the first misshapen key.
    """
    own, given = network.state_dict(), _weights(state, where)
    while prefix := _spare_prefix(given, own):
        given = {key.removeprefix(prefix): value for key, value in given.items()}
    if misfits := _misfits(own, given):
        raise CheckpointError(f"{where} does not fit {type(network).__name__}: {'; '.join(misfits)}")
    network.load_state_dict(own | given)
    return network.eval().requires_grad_(False)


def _weights(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The state without its wrapper."""
    if isinstance(state, Mapping):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{where}: expected a mapping of names to weights, got {_described(state)}")
    return dict(state)


def _spare_prefix(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> str | None:
    """The prefix that all of the given keys have and none of the network's."""
    for prefix in PREFIXES:
        spare = given and not any(key.startswith(prefix) for key in own)
        if spare and all(key.startswith(prefix) for key in given):
            return prefix
    return None


def _misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """A phrase for each way in which the given weights do not fit."""
    keys = {
        "missing": [key for key in own if key not in given and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in given if key not in own],
        "misshapen": [key for key in own if key in given and _described(own[key]) != _described(given[key])],
    }
    return [
        f"{len(names)} {kind}, the first {names[0]}: "
        f"expected {_described(own.get(names[0]))}, got {_described(given.get(names[0]))}"
        for kind, names in keys.items()
        if names
    ]


def _described(value: Any) -> str:
    """What is at a key, as far as it matters for fitting."""
    if value is None:
        return "nothing"
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
