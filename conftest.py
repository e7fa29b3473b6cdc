"""Tests and `pytest --nbval-lax` run at smoke size; a papermill run is not touched by this."""

import os
import shutil
from pathlib import Path

# Set before coup_lib is imported, here and in the kernels that nbval starts.
os.environ["COUP_SMOKE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may be read back from an earlier run: the tests are there to run the code. One of several processes
# that share this run must not take away what another has made.
if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(Path(__file__).parent / "build" / "smoke", ignore_errors=True)
