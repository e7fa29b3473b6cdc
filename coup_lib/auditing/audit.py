"""`audit`: any defence under the whole strict protocol, in one call."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coup_lib import paths
from coup_lib.attacks import NORMS
from coup_lib.auditing.defence import (
    PROBED,
    Audited,
    Defence,
    Model,
    Probe,
    as_module,
    as_planes,
    check_data,
    fingerprint,
    own_gradients,
    probe,
)
from coup_lib.auditing.protocol import EFFORTS, AuditSettings, Bench, measure
from coup_lib.auditing.result import Audit
from coup_lib.checks import choice, count, number
from coup_lib.data import Images
from coup_lib.purify import Purified

NAME = re.compile(r"[\w. +-]+")


def audit(
    defences: Mapping[str, Model | Defence],
    x: Any,
    y: Any,
    *,
    norm: str = "linf",
    eps: float | str,
    budget: str = "quick",
    folder: str | Path = "build/audit",
    seed: int = 0,
    max_batch: int = 640,
    verbose: bool = True,
) -> Audit:
    """Put defences through every attack of the protocol, and everything made against one on all the others.

    What is finished is on record in the folder: run again after a kill, or in several processes at once, it
    goes on from there. A defence of other weights, code or answers has other records.

    Args:
        defences: name → a module from images in [0, 1] to logits, a pair (purifier, classifier) of modules,
            or a `Defence`, which has other gradients beside its own.
        x: images (n, ...) in [0, 1] as the defences take them; a tensor or an array.
        y: labels (n,).
        norm: "linf" or "l2".
        eps: the radius in units of the images, a number or a string as "8/255".
        budget: "quick", "full" (the paper's numbers), or "smoke" to see that it runs.
        folder: of the records and of what `Audit.save` writes.
        max_batch: the most images in one call; halved as long as memory runs out.
        verbose: show progress, with the time left.

    Raises:
        ValueError: naming what was expected and what came, before any attack.
    """
    norm, eps = choice("norm", str(norm).lower(), NORMS), number("eps", eps, 0)
    effort = EFFORTS[choice("budget", budget, EFFORTS)]
    images, labels = check_data(x, y)
    place = Path(folder).resolve()
    if place.is_relative_to(paths.PUBLISHED.resolve()):
        raise ValueError(f"folder: expected one that is not among the published results; got {folder}")
    if not isinstance(defences, Mapping) or not defences:
        raise ValueError('defences: expected at least one by name, as {"mine": module}')
    given = {}
    for name, one in defences.items():
        _check_name("defences", name)
        given[name] = one if isinstance(one, Defence) else Defence(one)
        for gradient in given[name].gradients:
            _check_name(f"{name}, gradients", gradient)
            if gradient == "exact":
                raise ValueError(
                    f"{name}, gradients: expected those beside the defence's own; got {gradient!r}"
                )
    device = next(
        (
            weights.device
            for one in given.values()
            for weights in as_module("defence", one.model).parameters()
        ),
        images.device,
    )
    images, labels = images.to(device), labels.to(device)
    probes, models, identities = {}, {}, {}
    for name, one in given.items():
        probes[name], models[name], identities[name] = _prepared(name, one, images, labels)
    classes = {found.classes for found in probes.values()}
    if len(classes) > 1:
        raise ValueError(f"defences: expected the same classes in all of them; got {sorted(classes)}")
    settings = AuditSettings(
        profile=str(place / "records"),
        norm=norm,
        eps=eps,
        n_images=len(images),
        n_iter=effort.n_iter,
        eot=effort.eot,
        n_targets=effort.n_targets,
        square_queries=effort.square_queries,
        n_draws=effort.n_draws,
        torch_device=device,
        max_batch=count("max_batch", max_batch),
        seed=count("seed", seed, 2**31 - 9, low=0),
    )
    flat = Images(images.reshape(len(images), *as_planes(images.shape[1:])), labels)
    bench = Bench(models, identities)
    return Audit(probes, measure(bench, probes, flat, settings, effort, verbose=verbose), settings, place)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{what}: expected names of letters, digits, spaces and . + - _; got {name!r}")


def _prepared(
    name: str, one: Defence, x: torch.Tensor, y: torch.Tensor
) -> tuple[Probe, dict[str, nn.Module], dict[str, str]]:
    """(what is found out about a defence, gradient → module to be attacked, gradient → its fingerprint)."""
    few, shape = x[:PROBED], x.shape[1:]
    model = as_module(name, one.model)
    given = {gradient: as_module(f"{name}, {gradient}", other) for gradient, other in one.gradients.items()}
    found = probe(model, few, y[:PROBED])
    modules = {"exact": model, **own_gradients(model, few[:2]), **given}
    identities = {gradient: fingerprint(module, few[:8]) for gradient, module in modules.items()}
    return found, {key: _wrapped(module, shape, found) for key, module in modules.items()}, identities


def _wrapped(module: nn.Module, shape: torch.Size, found: Probe) -> nn.Module:
    if isinstance(module, Purified):
        return module
    wrapped = Audited(module, shape)
    wrapped.random, wrapped.probabilities = found.random, found.probabilities
    return wrapped
