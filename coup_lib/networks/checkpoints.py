"""Our weights, read only if their SHA-256 is as recorded, and putting others' into networks that they fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
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


def load_network(dataset: str, name: str, *, folder: Path = WEIGHTS) -> nn.Module:
    """A trained network of this repository, in eval mode and with requires_grad off.

    ValueError for an unknown data set or name, FileNotFoundError for a missing file,
    CheckpointError for a file whose SHA-256 is not the one in folder/SHA256SUMS.
    """
    network, path = build_network(dataset, name), weights_path(dataset, name, folder)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train them with: coup train")
    content = path.read_bytes()
    expected = read_sums(folder).get(f"{dataset}/{path.name}", "no line for it")
    if (got := hashlib.sha256(content).hexdigest()) != expected:  # before anything parses the content
        raise CheckpointError(f"{path}: expected SHA-256 {expected} ({folder / SUMS}), got {got}")
    network.load_state_dict(load(content))
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
    record_sum(f"{dataset}/{path.name}", hashlib.sha256(content).hexdigest(), folder)
    return path


def weights_path(dataset: str, name: str, folder: Path = WEIGHTS) -> Path:
    """Where a network's weights lie: folder/dataset/name.safetensors."""
    return folder / dataset / f"{name}.safetensors"


def read_sums(folder: Path = WEIGHTS) -> dict[str, str]:
    """The SHA-256 of each file, named relative to folder, from its SHA256SUMS; {} without that file."""
    lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).exists() else []
    return {file: digest for digest, file in (line.split(maxsplit=1) for line in lines if line.strip())}


def record_sum(file: str, digest: str, folder: Path) -> None:
    """Write the line of one file, named relative to folder; lines that others write meanwhile stay."""
    with FileLock(folder / f".{SUMS}.lock"):
        sums = sorted((read_sums(folder) | {file: digest}).items())
        lines = "".join(f"{digest}  {file}\n" for file, digest in sums)
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
        CheckpointError: for anything but names and weights, and for weights that are missing, unexpected or
            misshapen, naming the first and the last of them. The network is then as it was.
    """
    own, given = network.state_dict(), bare_weights(state, where)
    for prefix in 2 * PREFIXES:
        if all(key.startswith(prefix) for key in given) and not any(key.startswith(prefix) for key in own):
            given = {key.removeprefix(prefix): value for key, value in given.items()}
    misfits = [
        f"{key}: expected {_described(own.get(key))}, got {_described(given.get(key))}"
        for key in dict.fromkeys([*own, *given])
        if _described(own.get(key)) != _described(given.get(key))
        and (key in given or not key.endswith("num_batches_tracked"))
    ]
    if misfits:
        told = "; and ".join(dict.fromkeys((misfits[0], misfits[-1])))
        raise CheckpointError(
            f"{where} does not fit {type(network).__name__} at {len(misfits)} names, such as {told}"
        )
    network.load_state_dict(own | given)
    return network.eval().requires_grad_(False)


def load_score_sde(network: nn.Module, checkpoint: Mapping[str, Any], where: str) -> nn.Module:
    """The network with the averaged (EMA) weights of a score_sde checkpoint; otherwise like `load_state`.

    The averages are ema.shadow_params, a list in the order of the parameters. The weights under the key
    model are not averaged, and never used.
    """
    try:
        averages = checkpoint["ema"]["shadow_params"]
    except (KeyError, TypeError):
        got = f"keys {shorten(', '.join(map(str, checkpoint)), 80)}" if checkpoint else "an empty dictionary"
        raise CheckpointError(f"{where}: expected averages at ema.shadow_params, got {got}") from None
    # Frozen parameters, too: upstream made its list when every one of them asked for a gradient.
    keys = [key for key, _ in network.named_parameters()]
    if not isinstance(averages, list) or len(averages) != len(keys):
        got = str(len(averages)) if isinstance(averages, list) else f"a {type(averages).__name__}"
        raise CheckpointError(f"{where}: ema.shadow_params: expected {len(keys)} tensors, got {got}")
    state = dict(network.named_buffers()) | dict(zip(keys, averages, strict=True))
    return load_state(network, state, f"{where}: ema.shadow_params")


def bare_weights(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The names and weights without their wrapper; CheckpointError for anything else."""
    if isinstance(state, Mapping):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{where}: expected a mapping of names to weights, got {_described(state)}")
    return dict(state)


def _described(value: Any) -> str:
    """What is at a key, as far as it matters for fitting."""
    if not isinstance(value, Tensor):
        return "nothing" if value is None else f"a {type(value).__name__}"
    return f"shape {tuple(value.shape)}" + ("" if value.is_floating_point() else " of whole numbers")
