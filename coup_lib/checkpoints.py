"""Trained weights in the package: written whole or not at all, read only if their SHA-256 is as recorded."""

import hashlib
from pathlib import Path

from safetensors.torch import load, save
from torch import nn

from coup_lib.files import write_atomically
from coup_lib.networks import build_network
from coup_lib.paths import WEIGHTS

SUMS = "SHA256SUMS"


class CheckpointError(RuntimeError):
    """A weights file is not the one that was published."""


def load_network(profile_dataset: str, name: str, *, folder: Path = WEIGHTS) -> nn.Module:
    """A trained network, in eval mode and with requires_grad off.

    ValueError for an unknown data set or name, FileNotFoundError for a missing file,
    CheckpointError for a file whose SHA-256 is not the one in folder/SHA256SUMS.
    """
    network = build_network(profile_dataset, name)
    network.load_state_dict(load(verified_bytes(weights_path(profile_dataset, name, folder), folder)))
    return network.eval().requires_grad_(False)


def save_network(network: nn.Module, dataset: str, name: str, *, folder: Path = WEIGHTS) -> Path:
    """Write the weights and their line in SHA256SUMS; the path of the weights."""
    path = weights_path(dataset, name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    content = save(state)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    sums = read_sums(folder) if (folder / SUMS).exists() else {}
    sums[_relative(path, folder)] = hashlib.sha256(content).hexdigest()
    lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
    write_atomically(folder / SUMS, lambda temporary: temporary.write_text(lines))
    return path


def weights_path(dataset: str, name: str, folder: Path = WEIGHTS) -> Path:
    """Where a network's weights lie: folder/dataset/name.safetensors."""
    return folder / dataset / f"{name}.safetensors"


def verified_bytes(path: Path, folder: Path = WEIGHTS) -> bytes:
    """The content of path, hashed and compared before anything parses it; raises like load_network."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train them with: python -m coup_lib.train")
    content, name = path.read_bytes(), _relative(path, folder)
    expected, got = read_sums(folder).get(name, "no line for it"), hashlib.sha256(content).hexdigest()
    if got != expected:
        raise CheckpointError(f"{path}: expected SHA-256 {expected} ({folder / SUMS}), got {got}")
    return content


def read_sums(folder: Path = WEIGHTS) -> dict[str, str]:
    """The digest of each file, named relative to folder, as sha256sum writes them."""
    lines = (folder / SUMS).read_text().splitlines()
    return {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
