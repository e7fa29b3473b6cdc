"""Published classifiers, for users who have them: needs `pip install coup-lib[robustbench]`."""

import sys
from typing import Any

from torch import nn


def robustbench_model(name: str, **settings: Any) -> nn.Module:
    """A RobustBench classifier such as "Standard", images in [0, 1] to logits, normalisation inside.

    `settings` go to robustbench.utils.load_model: dataset="cifar10", threat_model="Linf",
    model_dir="./models". A file put at <model_dir>/<dataset>/<threat_model>/<name>.pt is used as it is;
    else robustbench downloads it.

    Raises:
        ImportError: naming the extra to install.
    """
    _mend_autoattack()
    try:
        from robustbench.utils import load_model
    except ImportError as error:
        raise ImportError(
            f"robustbench_model({name!r}) needs robustbench and torchvision, and {error}; "
            "install them with: pip install 'coup-lib[robustbench]'"
        ) from error
    return load_model(model_name=name, **settings).eval().requires_grad_(False)


def _mend_autoattack() -> None:
    """robustbench 1.1.1 depends on pyautoattack but imports `autoattack`; give it the one it installed."""
    try:
        import autoattack  # noqa: F401
    except ImportError:
        import pyautoattack
        import pyautoattack.state

        sys.modules["autoattack"] = pyautoattack
        sys.modules["autoattack.state"] = pyautoattack.state
