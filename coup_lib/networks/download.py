"""Downloads of large files that go on where they broke off."""

import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tqdm import tqdm

from coup_lib.files import CheckpointError

RETRIES, PAUSE = 2, 2.0  # attempts in a row that bring nothing; seconds before the next one
TIMEOUT = 30.0
BLOCK = 1 << 20
NOTHING_LEFT = 416  # "range not satisfiable": what a server says when asked to go on from the end


class WebPage(CheckpointError):
    """The server sent a page for people instead of the file."""


def download(address: str, part: Path, label: str) -> None:
    """Fetch address into part, going on behind what is there already if the server can, else from the start.

    A bar named `label` shows the progress and the time left.

    Raises:
        ConnectionError: if the server cannot be reached or stops sending; part keeps what has come.
        WebPage: if a web page comes; part is as it was.
    """
    furthest = fruitless = 0
    while fruitless <= RETRIES:
        time.sleep(PAUSE * fruitless)
        problem = "the connection broke off"
        try:
            if _go_on(address, part, label):
                return
        except ConnectionError as error:
            problem = str(error)
        fruitless = 0 if _size(part) > furthest else fruitless + 1
        furthest = max(furthest, _size(part))
    raise ConnectionError(f"{address}: {problem}; {_size(part):,} bytes are here, the next try goes on there")


def _go_on(address: str, part: Path, label: str) -> bool:
    """Append what the server still has to give; whether the file is whole then."""
    have = _size(part)
    with _open(address, have) as response:
        start, total = _extent(response)
        if response.status == NOTHING_LEFT and total == have:
            return True
        if response.status == NOTHING_LEFT or start not in (0, have):  # part is of another file
            part.unlink()
            return False
        if response.headers.get_content_type() == "text/html":
            raise WebPage(f"{address} sent a web page")
        with part.open("ab" if start else "wb") as file, _bar(label, start, total) as bar:
            for block in _blocks(response):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return total is None or _size(part) >= total


def _open(address: str, start: int) -> Any:
    """The response from byte `start` on, or from 0 if the server cannot, or that nothing is left."""
    headers = {"User-Agent": "coup-lib"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code == NOTHING_LEFT:
            return error
        raise ConnectionError(str(error)) from error


def _extent(response: Any) -> tuple[int, int | None]:
    """The first byte that comes, and the size of the whole file if it is told."""
    extent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", response.headers.get("Content-Range", ""))
    if extent:
        return int(extent[1] or 0), int(extent[2]) if extent[2] else None
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _blocks(response: Any) -> Iterator[bytes]:
    """What comes until the end or until the connection breaks; the size tells which it was."""
    with suppress(OSError, HTTPException):
        while block := response.read(BLOCK):
            yield block


def _bar(label: str, start: int, total: int | None) -> tqdm:
    """A progress bar; in the log of a notebook or a job it is written only now and then."""
    pause = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=label,
        initial=start,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=pause,
        maxinterval=pause,
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
