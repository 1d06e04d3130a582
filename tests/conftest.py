"""How the tests run together: one thread each, those of the CUDA library last, and chance by the day.

In CI hypothesis draws the same examples on every run; on a developer's machine, new ones.
"""

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import products
import pytest
import torch
from emulated import build
from hypothesis import settings

collect_ignore = ["xla"]  # for another Python: tests/test_xla.py

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# `make test` runs a worker on each of two cores: further threads would only wait for each other there, and in the
# processes that tests start. A test of threads sets their number itself.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# What `make quick` goes without, beside what needs the CUDA library: other environments, trainers, builds, trainings,
# processes by the dozen. A single test says @pytest.mark.slow.
SLOW = (
    "test_bench*.py",
    "test_evaluation_changes_no_bit.py",
    "test_examples.py",
    "test_experiments_*.py",
    "test_fuzz.py",
    "test_gpu_command.py",
    "test_packaging.py",
    "test_results.py",
    "test_sanitizers.py",
    "test_sharded*.py",
    "test_site.py",
    "test_theory.py",
    "test_trainers_*.py",
    "test_triton*.py",
    "test_xla.py",
)


def needs_library(item: pytest.Item) -> bool:
    return getattr(getattr(item, "module", None), "build", None) is build


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if exitstatus and not products.FULL:
        terminalreporter.write_line(f"products of cases were sampled by PACE_DAY={products.day()}")


def pytest_configure() -> None:
    os.environ.setdefault("PACE_DAY", str(products.day()))  # one day for all workers, over midnight too


def pytest_itemcollected(item: pytest.Item) -> None:
    if needs_library(item) or any(map(item.path.match, SLOW)):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the CUDA library comes last in each worker's share: --dist worksteal deals the list out in equal runs,
    and files stay together but for those at the ends."""
    kinds = [item for item in items if not needs_library(item)], [item for item in items if needs_library(item)]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [
        item
        for n in range(workers)
        for kind in kinds
        for item in kind[n * len(kind) // workers : (n + 1) * len(kind) // workers]
    ]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the CUDA library, which takes minutes, while other tests run."""
    if session.config.option.collectonly or os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return
    if any(map(needs_library, session.items)) and build.missing() is None:
        threading.Thread(target=_build, daemon=True).start()


def _build() -> None:
    with contextlib.suppress(RuntimeError):  # which the first test that needs the library meets again
        build.library()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def many_small_steps() -> Iterator[None]:
    """For tests with trainers on models of a few hundred weights: each training begins with gc.collect(), 0.4 s over
    the objects of all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
