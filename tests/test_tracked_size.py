"""Promise: the repository is small. Results are packed, and pictures have few colours: bench/results_page.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 3_600_000  # bytes of all tracked files; results and pictures are a twentieth


def test_all_tracked_files_together() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git here, as in the source archive")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if (ROOT / name).is_file()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
    assert sum(sizes.values()) <= LARGEST, [(name, sizes[name]) for name in largest]
