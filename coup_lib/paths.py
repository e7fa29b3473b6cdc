"""Where things lie, the same whatever folder a notebook is run from."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_checkout = PACKAGE.parent
# An installed package has no checkout around it: results and figures then belong to the caller's folder.
ROOT = _checkout if (_checkout / "notebooks").is_dir() else Path.cwd()

SMOKE_VARIABLE = "COUP_SMOKE"
DATA_VARIABLE = "COUP_DATA"
MODELS_VARIABLE = "COUP_MODELS"
WEIGHTS_VARIABLE = "COUP_WEIGHTS"
PDF_VARIABLE = "COUP_PDF"  # if set, figures are written as PDFs, too


def is_smoke() -> bool:
    """Whether COUP_SMOKE asks for the smallest sizes (the tests set it: the same code, a few images)."""
    return os.environ.get(SMOKE_VARIABLE, "") not in ("", "0")


# A run writes here; results/ and figures/ change when it is published (`make full`, `store`).
_outputs = ROOT / "build" / "smoke" if is_smoke() else ROOT / "build"
# The small networks': those of the package, or others that were trained in their place.
WEIGHTS = Path(os.environ.get(WEIGHTS_VARIABLE, PACKAGE / "weights")).absolute()
FIGURES = Path(os.environ.get("COUP_FIGURES", _outputs / "figures")).absolute()
RESULTS = Path(os.environ.get("COUP_RESULTS", _outputs / "results")).absolute()
# The published records stand behind them, but for smoke runs and for runs in a place of their own.
_behind = RESULTS if is_smoke() or "COUP_RESULTS" in os.environ else ROOT / "results"
PUBLISHED = Path(os.environ.get("COUP_PUBLISHED", _behind)).absolute()


def data_dir() -> Path:
    """Where CIFAR lies, torchvision's root: COUP_DATA, or else a folder in the user's cache."""
    return Path(os.environ.get(DATA_VARIABLE) or cache_dir() / "data").expanduser().absolute()


def model_dir() -> Path:
    """Where published networks lie, RobustBench's model_dir: COUP_MODELS, or else the folder of downloads."""
    return Path(os.environ.get(MODELS_VARIABLE) or cache_dir()).expanduser().absolute()


def cache_dir() -> Path:
    """Where downloads go unless told otherwise: $TORCH_HOME/coup, $XDG_CACHE_HOME/coup or ~/.cache/coup."""
    home = os.environ.get("TORCH_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "coup"
