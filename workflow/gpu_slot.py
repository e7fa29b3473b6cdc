"""Run a command on a GPU of its own: `python workflow/gpu_slot.py COMMAND ...`.

The first GPU that no other such command holds becomes the command's only one (CUDA_VISIBLE_DEVICES); if all
are taken, wait. Without GPUs, and under Slurm, which hands them out itself, the command just runs.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS_BETWEEN_TRIES = 1.0


def devices() -> list[str]:
    """The GPUs to share: those of CUDA_VISIBLE_DEVICES, or else all of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def hold_one(names: list[str]) -> str:
    """The name of a GPU that is this process's, and its program's after it, until the last of them ends."""
    told = False
    while True:
        for name in names:
            lock = Path(tempfile.gettempdir()) / f"coup-gpu-{os.getuid()}-{name.replace('/', '-')}.lock"
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            os.set_inheritable(handle, True)  # or exec would close it, and with it the lock
            return name
        if not told:
            print(f"all GPUs ({', '.join(names)}) are taken: waiting for one", flush=True)
            told = True
        time.sleep(SECONDS_BETWEEN_TRIES)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected a command; got none")
    if "SLURM_JOB_ID" not in os.environ and (names := devices()):
        os.environ["CUDA_VISIBLE_DEVICES"] = hold_one(names)
    os.execvp(sys.argv[1], sys.argv[1:])
