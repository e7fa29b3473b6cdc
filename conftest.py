"""Tests and `pytest --nbval-lax` run at smoke size; a papermill run is not touched by this."""

import os
import tempfile
from pathlib import Path

# Set before coup_lib is imported, here and in the kernels that nbval starts.
os.environ["COUP_SMOKE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may be read back from an earlier run, or from another one at the same time: the tests are there to
# run the code. Only the processes that share a run, which get this one's environment, share a folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="coup-smoke-")
    os.environ["COUP_RESULTS"] = str(Path(_folder.name) / "results")
    os.environ.pop("COUP_PUBLISHED", None)
    os.environ["COUP_FIGURES"] = str(Path(_folder.name) / "figures")
