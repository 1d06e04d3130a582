"""In CI hypothesis draws the same examples on every run; on a developer's machine, new ones."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from emulated import build
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the CUDA library, which takes minutes, while other tests run. One that fails fails again in the tests."""
    first, *_ = [item.path.name for item in session.items] or [""]
    wanted = any(getattr(item.module, "build", None) is build for item in session.items if hasattr(item, "module"))
    if wanted and not first.startswith("test_cuda") and build.missing() is None:
        threading.Thread(target=build.library, daemon=True).start()


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
