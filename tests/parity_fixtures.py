"""What was computed with the published networks (tests/parity), and the weights that it was computed with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARITY = Path(__file__).parent / "parity"


@cache
def manifest(name: str) -> dict[str, Any]:
    """A file of keys and shapes."""
    return json.loads((PARITY / f"{name}.json").read_text())


@cache
def published(name: str) -> dict[str, Any]:
    """The arrays of a fixture, as tensors where they are numbers."""
    with np.load(PARITY / f"{name}.npz") as file:
        return {key: torch.from_numpy(value) if value.ndim else value[()] for key, value in file.items()}


def seeded(shapes: Iterable[tuple[str, Iterable[int]]], seed: int) -> dict[str, Tensor]:
    """The fixtures' weights by key, drawn in this order from NumPy's legacy generator."""
    generator, weights = np.random.RandomState(seed), {}
    for key, shape in shapes:
        z = generator.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
        weights[key] = torch.from_numpy(scaled(z, key.rpartition(".")[2]))
    return weights


def scaled(z: np.ndarray, kind: str) -> np.ndarray:
    """Standard normal numbers as weights of this kind, by the fixtures' recipe."""
    if kind == "resample_filter":
        return np.full(z.shape, 0.25, np.float32)
    if kind == "running_var":
        return 1 + np.float32(0.25) * np.abs(z)
    if kind in ("bias", "b", "running_mean"):
        return np.float32(0.1) * z
    if z.ndim == 1:
        return 1 + np.float32(0.1) * z
    return z * np.float32(1 / np.sqrt(z.shape[0] if kind == "W" else np.prod(z.shape[1:])))


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the raw bytes, in order."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values())).hexdigest()


def off(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())
