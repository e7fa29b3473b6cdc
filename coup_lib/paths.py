"""Where things lie, the same whatever folder a notebook is run from."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_checkout = PACKAGE.parent
# An installed package has no checkout around it: results and figures then belong to the caller's folder.
ROOT = _checkout if (_checkout / "notebooks").is_dir() else Path.cwd()

WEIGHTS = PACKAGE / "weights"
FIGURES = Path(os.environ.get("COUP_FIGURES", ROOT / "figures"))
RESULTS = Path(os.environ.get("COUP_RESULTS", ROOT / "results"))
