"""In CI hypothesis draws the same examples on every run; on a developer's machine, new ones."""

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from emulated import build
from hypothesis import settings

collect_ignore = ["xla"]  # for another Python: tests/test_xla.py

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the CUDA library, which takes minutes, while other tests run."""
    if session.config.option.collectonly:
        return
    first, *_ = [item.path.name for item in session.items] or [""]
    wanted = any(getattr(item.module, "build", None) is build for item in session.items if hasattr(item, "module"))
    if wanted and not first.startswith("test_cuda") and build.missing() is None:
        threading.Thread(target=_build, daemon=True).start()


def _build() -> None:
    with contextlib.suppress(RuntimeError):  # which the first test that needs the library meets again
        build.library()


@pytest.fixture(scope="module")
def many_small_steps() -> Iterator[None]:
    """For tests with trainers on models of a few hundred weights: a second thread only waits there, and each training
    begins with gc.collect(), 0.4 s over the objects of all that was imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
