"""In CI hypothesis draws the same examples on every run; on a developer's machine, new ones."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


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
