"""These tests need a GPU, and only torch and pytest beside it. Without one they are skipped as a whole.

PACE_GPU_DRY_RUN=1 runs their code on the CPU instead, with the backends "cpu" and "torch" in place of "cuda" and
"triton", and without what only a GPU has: a test of the tests. PACE_GPU_TEST_SECONDS=n skips what has not started
after n seconds, for a run within a time limit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]  # helpers, cases

import on_gpu  # noqa: E402

# The most telling first, and Triton's, which compile a kernel a case, after all of CUDA's.
ORDER = ("bits", "pullback", "graphs", "sync", "amp", "streams", "offload", "launches", "layouts", "ops", "sanitizer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]

    def rank(item: pytest.Item) -> tuple[bool, bool, bool, int]:
        topic = item.path.stem.removeprefix("test_gpu_")
        late = topic == "bits" and "float16" in item.name
        return topic == "sanitizer", on_gpu.BACKENDS[1] in item.name, late, ORDER.index(topic)

    places = [i for i, item in enumerate(items) if item in here]
    for i, item in zip(places, sorted(here, key=rank), strict=True):
        items[i] = item
    if not on_gpu.HERE:
        for item in here:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HERE in item.path.parents and on_gpu.seconds_left() <= 0:
        pytest.skip(f"the time limit of {os.environ['PACE_GPU_TEST_SECONDS']} s is over")
