"""Files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


class CheckpointError(RuntimeError):
    """Weights are not the ones that were published, or do not fit their network."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let write() fill a neighbouring file, sync it, then rename it to path: no reader meets half a file.

    Threads, processes and machines may write the same path at once: one of their files is there in the end.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
