"""`audit`: any defence under the whole strict protocol, in one call."""

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coup_lib import paths
from coup_lib.ascent import largest_radius
from coup_lib.attacks import NORMS
from coup_lib.auditing.defence import (
    Audited,
    Defence,
    Model,
    as_module,
    as_planes,
    check_data,
    own_gradients,
)
from coup_lib.auditing.probe import PROBED, Probe, asked_again, probe
from coup_lib.auditing.protocol import AUDITS, VOTE, AuditSettings, Bench, Prepared, measure
from coup_lib.auditing.result import Audit
from coup_lib.checks import check_labels, choice, count, number
from coup_lib.data import Images
from coup_lib.evaluation.identity import of_content
from coup_lib.evaluation.run import Batch, asked_alone
from coup_lib.purify import Purified, Vote
from coup_lib.randomness import begun

NAME = re.compile(r"[\w +-][\w. +-]{,59}")  # of a defence or a gradient, as it can be part of a file's name
ANSWERS, DIGITS = 8, 3  # of how many images the logits count, and how many of their digits


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
    outside: bool = False,
    verbose: bool = True,
) -> Audit:
    """Put defences through every attack of the protocol, and everything made against one on all the others.

    What is finished is on record in the folder: run again after a kill, or in several processes at once, it
    goes on from there. A defence of other weights, constants or code has other records.

    A class for rejected images counts like any other: an answer that is not the label is wrong.

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
        outside: also attack by filters and flows, which no radius bounds and no worst case counts.
        verbose: show progress, with the time left.

    Raises:
        ValueError: naming what was expected and what came, before any attack.
    """
    norm = choice("norm", str(norm).lower(), NORMS)
    choice("budget", budget, AUDITS)
    given = _by_name(defences)
    images, labels = _beside(given, *check_data(x, y))
    eps = number("eps", eps, 0, largest_radius(norm, images.shape[1:]))
    place = _place(folder)
    bench = _bench(given, images, labels, AUDITS[budget].n_draws)
    settings = AuditSettings(
        **vars(AUDITS[budget]) | {"n_images": len(images)},
        profile=str(place / "records"),
        budget=budget,
        norm=norm,
        eps=eps,
        torch_device=images.device,
        max_batch=count("max_batch", max_batch),
        seed=count("seed", seed, 2**31 - 9, low=0),
    )
    flat = Images(images.reshape(len(images), *as_planes(images.shape[1:])), labels)
    measured = measure(bench, flat, settings, outside=outside, verbose=verbose)
    probes = {
        name: asked_again(one.probe, given[name]["exact"], images) for name, one in bench.defences.items()
    }
    return Audit(probes, measured, settings, place)


def _place(folder: str | Path) -> Path:
    """The folder, made if it is not there; ValueError for a file or one among the published results."""
    place = Path(folder).resolve()
    if place.is_relative_to(paths.PUBLISHED.resolve()):
        raise ValueError(f"folder: expected one that is not among the published results; got {folder}")
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder: expected a folder or none there yet; got the file {folder}")
    place.mkdir(parents=True, exist_ok=True)
    return place


def _by_name(defences: Any) -> dict[str, dict[str, nn.Module]]:
    """Defence → gradient → module, "exact" being the defence itself; ValueError for what is none."""
    if not isinstance(defences, Mapping) or not defences:
        got = type(defences).__name__
        raise ValueError(f'defences: expected at least one by name, as {{"mine": module}}; got {got}')
    given = {}
    for name, one in defences.items():
        one = one if isinstance(one, Defence) else Defence(one)
        for called in (name, *one.gradients):
            if not isinstance(called, str) or not NAME.fullmatch(called):
                expected = "names of letters, digits, spaces and . + - _, 60 at most"
                raise ValueError(f"defences: expected {expected}; got {called!r}")
        if taken := {"exact", VOTE} & {*one.gradients}:
            raise ValueError(f"{name}: expected other gradients than its own; got {', '.join(taken)}")
        given[name] = {"exact": as_module(name, one.model)} | {
            gradient: as_module(f"{name}, {gradient}", module) for gradient, module in one.gradients.items()
        }
    return given


def _beside(given: Mapping[str, Mapping[str, nn.Module]], *data: torch.Tensor) -> list[torch.Tensor]:
    """Images and labels where all weights are, if there are any; ValueError for weights in several places."""
    found = {
        weights.device
        for modules in given.values()
        for module in modules.values()
        for weights in (*module.parameters(), *module.buffers())
    }
    if len(found) > 1:
        raise ValueError(f"defences: expected all on one device; got {', '.join(sorted(map(str, found)))}")
    device = found.pop() if found else data[0].device
    return [values.to(device) for values in data]


def _bench(
    given: Mapping[str, Mapping[str, nn.Module]], x: torch.Tensor, y: torch.Tensor, draws: int
) -> Bench:
    """Every defence `_prepared`; ValueError where their classes differ, or the labels are none of them."""
    batch, bench = Batch(PROBED), Bench({})
    for name, modules in given.items():
        bench.defences[name] = batch.fitting(partial(_prepared, name, modules, x, y, batch, draws))(0)
    classes = {name: one.probe.classes for name, one in bench.defences.items()}
    if len({*classes.values()}) > 1:
        raise ValueError(f"defences: expected the same classes in all of them; got {classes}")
    check_labels(y, next(iter(classes.values())))
    return bench


def _prepared(
    name: str,
    given: Mapping[str, nn.Module],
    x: torch.Tensor,
    y: torch.Tensor,
    batch: Batch,
    draws: int,
    place: int,
) -> Prepared:
    """Ask a defence about as many of the images x as a batch holds, from this place on.

    draws: behind a decision of a random defence that votes.
    """
    x, y = x[place : place + batch.most], y[place : place + batch.most]
    model = given["exact"]
    try:
        found = probe(model, x, y)
    except ValueError as error:
        raise ValueError(
            f"{name}: {str(error).removeprefix('defences: ').removeprefix('classifier: ')}"
        ) from error
    modules = {"exact": model, **own_gradients(model, x[:2]), **given}
    exact, *others = modules.values()
    # Weights, constants and code do not tell what a library does, or a file: answers do.
    rows = [] if found.answers is None else found.answers[:ANSWERS].tolist()
    answers = [[f"{value:.{DIGITS}g}" for value in row] for row in rows]
    identities = dict(zip(modules, of_content([exact, answers], *others), strict=True))
    attacked = {key: _wrapped(module, x.shape[1:], found, finite=True) for key, module in modules.items()}
    if found.random:
        identities[VOTE], vote = f"{draws} draws", Vote(attacked["exact"], draws)
        attacked[VOTE] = _wrapped(vote, x.shape[1:], replace(found, probabilities=False), finite=True)
    judged = _wrapped(model, x.shape[1:], found, finite=False)
    return Prepared(found, attacked, judged, identities, _seconds(judged, x))


@torch.no_grad()
def _seconds(model: nn.Module, x: torch.Tensor) -> float:
    """That a decision on an image takes: in a call of all these, or of one where images are asked alone."""
    x = x[:1] if asked_alone(model) else x
    with begun(model, x.device, 0):
        before = time.perf_counter()
        model(x).cpu()
        return (time.perf_counter() - before) / len(x)


def _wrapped(module: nn.Module, shape: torch.Size, found: Probe, *, finite: bool) -> nn.Module:
    if isinstance(module, Purified):
        return module
    wrapped = Audited(module, shape, finite=finite)
    wrapped.random, wrapped.alone, wrapped.probabilities = found.random, found.alone, found.probabilities
    return wrapped
