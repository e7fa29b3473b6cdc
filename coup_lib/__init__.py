"""The executable version of COUP (arXiv 2408.05900): purifiers, their exact gradients, their evaluation."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Where another program has a core, OpenMP's threads that spin while they wait take several times as long.
# It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from coup_lib.attacks import Attack
    from coup_lib.auditing.audit import audit
    from coup_lib.auditing.defence import Defence
    from coup_lib.guidance import Guided
    from coup_lib.networks.zoo import load_classifier, load_score
    from coup_lib.purify import Purified, coup, diffpure, reverse_only
    from coup_lib.score import NoiseScore
    from coup_lib.sde import VPSDE

__all__ = [
    "VPSDE",
    "Attack",
    "Defence",
    "Guided",
    "NoiseScore",
    "Purified",
    "audit",
    "coup",
    "diffpure",
    "load_classifier",
    "load_score",
    "reverse_only",
]
_MODULES = {
    "VPSDE": "sde",
    "Attack": "attacks",
    "Defence": "auditing.defence",
    "Guided": "guidance",
    "NoiseScore": "score",
    "Purified": "purify",
    "audit": "auditing.audit",
    "coup": "purify",
    "diffpure": "purify",
    "load_classifier": "networks.zoo",
    "load_score": "networks.zoo",
    "reverse_only": "purify",
}


def __getattr__(name: str) -> Any:
    """A name's module is imported when the name is first asked for: `coup --help` need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
