"""The executable version of COUP (arXiv 2408.05900): purifiers, their exact gradients, their evaluation."""

from typing import TYPE_CHECKING, Any

from coup_lib.attacks import Attack
from coup_lib.guidance import Guided
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.purify import Purified, coup, diffpure, reverse_only
from coup_lib.score import NoiseScore
from coup_lib.sde import VPSDE

if TYPE_CHECKING:
    from coup_lib.auditing.audit import audit
    from coup_lib.auditing.defence import Defence

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


def __getattr__(name: str) -> Any:
    """An audit draws and tabulates; those who only purify need not wait for what that loads."""
    if name not in ("Defence", "audit"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from coup_lib.auditing import audit, defence

    return audit.audit if name == "audit" else defence.Defence
