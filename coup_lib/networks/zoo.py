"""Every network by name: the small ones of this repository, the published ones, and all of RobustBench."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from coup_lib.checks import choice
from coup_lib.networks import published
from coup_lib.networks.checkpoints import CheckpointError, load_network, load_score_sde, load_state
from coup_lib.networks.ddpmpp import DEEP, DDPMpp
from coup_lib.networks.edm import Denoiser, edm_cifar, load_edm
from coup_lib.networks.precision import Bfloat16
from coup_lib.networks.resnet import cifar_resnet, resnet18
from coup_lib.networks.small import NETWORKS
from coup_lib.networks.wideresnet import WideResNet, wrn_28_10, wrn_40_2, wrn_70_16
from coup_lib.paths import is_smoke, model_dir
from coup_lib.score import DISCRETE_LEVELS, DenoisedScore, NoiseScore

THREATS = ("Linf", "L2")  # RobustBench's folders


@dataclass(frozen=True)
class Architecture:
    """A network that others trained; its name here is that of its file in `published.ARTEFACTS`.

    build: the network, untrained. small: takes its place in a smoke run, with random weights, so that nothing
    is fetched; None: it is small itself. load: puts what is in the file into the network.
    """

    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module] | None = None
    load: Callable[[Any, Any, str], nn.Module] = load_state


small_ddpmpp = partial(DDPMpp, width=16, multipliers=(1, 1), blocks=1)
small_wrn = partial(WideResNet, depth=10, widen=1)

CLASSIFIERS = {
    "cifar10": {
        "wrn-70-16-dropout": Architecture(wrn_70_16, small_wrn),
        "resnet18": Architecture(resnet18),
        "resnet20": Architecture(partial(cifar_resnet, 20)),
        "resnet56": Architecture(partial(cifar_resnet, 56)),
    },
    "cifar100": {"wrn-40-2": Architecture(wrn_40_2, partial(small_wrn, classes=100))},
}
SCORES = {
    "cifar10": {"ddpmpp-deep": Architecture(DEEP, small_ddpmpp, load_score_sde)},
    "cifar100": {"edm-vp": Architecture(edm_cifar, lambda: Denoiser(small_ddpmpp()), load_edm)},
}


def is_ours(dataset: str, name: str) -> bool:
    """Whether the network's weights are in this repository."""
    return name in NETWORKS.get(dataset, {})


def check_classifier(dataset: str, name: str) -> str:
    """The name, if it can be one of a classifier for the data set; reads no file.

    ValueError, with the known names, for an unknown one where RobustBench has none.
    """
    if dataset == "digits":
        return choice("classifier", name, [known for known in NETWORKS[dataset] if known != "score"])
    if name not in CLASSIFIERS[dataset] and not is_ours(dataset, name):
        choice(f"threat model of classifier {name!r}", _robustbench(name)[1], THREATS)
    return name


def load_classifier(dataset: str, name: str, *, trained: bool = True) -> nn.Module:
    """A classifier, images in [0, 1] to logits, normalisation inside, in eval mode and frozen.

    Beside the names of `CLASSIFIERS` any of RobustBench's can be given for CIFAR, "@L2" behind it where it
    was trained for that norm. In a smoke run a small random network takes the place of a large one.

    trained=False gives random weights, to measure what the network costs: nothing is fetched, and a WRN-28-10
    stands for RobustBench's.
    """
    if is_ours(dataset, check_classifier(dataset, name)):
        return load_network(dataset, name)
    if name in CLASSIFIERS[dataset]:
        return _load(name, CLASSIFIERS[dataset][name], trained)
    if is_smoke() or not trained:
        classes = 100 if dataset == "cifar100" else 10
        return _random(partial(small_wrn if is_smoke() else wrn_28_10, classes=classes))
    if (listed := _listed(dataset, name)) in published.ARTEFACTS:  # what RobustBench reads is verified
        return published.load(listed, lambda _: _from_robustbench(dataset, name))
    return _from_robustbench(dataset, name)


def load_score(dataset: str, name: str, *, trained: bool = True, precision: str = "float32") -> nn.Module:
    """The score s(x, t) of a profile's network, in eval mode and frozen; `trained` as in load_classifier.

    precision: "bfloat16" for products in it; whatever else leaves the network as it is.
    """

    def lowered(network: nn.Module) -> nn.Module:
        return Bfloat16(network) if precision == "bfloat16" else network

    if is_ours(dataset, name):
        return NoiseScore(lowered(load_network(dataset, name))).eval()
    network = _load(name, SCORES[dataset][name], trained)
    if isinstance(network, Denoiser):
        network.model = lowered(network.model)  # what is around it subtracts images that are nearly equal
        return DenoisedScore(network).eval()
    return NoiseScore(lowered(network), time_scale=DISCRETE_LEVELS).eval()


def needed(dataset: str, classifiers: Iterable[str], score: str | None = None) -> list[str]:
    """The artefacts behind these networks, as far as they are listed; none in a smoke run.

    score: None where no purifier is planned.
    """
    names = dict.fromkeys([*classifiers, *([score] if score else [])])
    listed = [_listed(dataset, name) for name in names if not is_ours(dataset, name) and not is_smoke()]
    return [name for name in listed if name in published.ARTEFACTS]


def missing(dataset: str, classifiers: Iterable[str], score: str | None = None) -> list[str]:
    """Those of `needed` that are not here."""
    return published.missing(needed(dataset, classifiers, score))


def _load(name: str, architecture: Architecture, trained: bool) -> nn.Module:
    if is_smoke() and architecture.small:
        return _random(architecture.small)
    if not trained:
        return _random(architecture.build)
    return published.load(name, lambda content: architecture.load(architecture.build(), content, name))


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with seeded random weights, in eval mode and frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def _listed(dataset: str, name: str) -> str:
    """A published network's name among the artefacts; a RobustBench model's is its place but for ".pt"."""
    model, threat = _robustbench(name)
    return name if name in CLASSIFIERS[dataset] | SCORES[dataset] else f"{dataset}/{threat}/{model}"


def _robustbench(name: str) -> tuple[str, str]:
    """(RobustBench's name, threat model) of NAME or NAME@THREAT."""
    model, _, threat = name.partition("@")
    return model, threat or THREATS[0]


def _from_robustbench(dataset: str, name: str) -> nn.Module:
    """A model from the model folder, or fetched into it by RobustBench; CheckpointError if it cannot.

    ImportError, naming the extra to install, without RobustBench.
    """
    (model, threat), file = _robustbench(name), model_dir() / f"{_listed(dataset, name)}.pt"
    try:
        load_model = robustbench_loader()
    except ImportError as error:
        raise ImportError(
            f"{model!r} needs robustbench and torchvision, and {error}; "
            "install them with: pip install 'coup-lib[cifar]'"
        ) from error
    try:
        network = load_model(model, dataset=dataset, threat_model=threat, model_dir=str(model_dir()))
    except Exception as error:
        said = f"{type(error).__name__}: {shorten(str(error), 400)}"
        if file.is_file() and published.is_page(file):
            said = "this is a web page, not a checkpoint"
        raise CheckpointError(f"RobustBench cannot load {model!r} from {file}: {said}") from error
    return network.eval().requires_grad_(False)


def robustbench_loader() -> Callable[..., nn.Module]:
    """`robustbench.utils.load_model`.

    robustbench 1.1.1 depends on pyautoattack but imports `autoattack`: it is given the one it installed.
    """
    try:
        import autoattack  # noqa: F401
    except ImportError:
        import pyautoattack
        import pyautoattack.state

        sys.modules["autoattack"] = pyautoattack
        sys.modules["autoattack.state"] = pyautoattack.state
    from robustbench.utils import load_model

    return load_model
