"""Folders that several test runs, and the workers of one, build in."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """One process at a time; a child that is passed the file's descriptor holds the lock for as long as it lives."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
