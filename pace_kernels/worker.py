"""A thread that works beside training: on averages in host memory, on steps of offloaded parameters.

It lives while there are jobs, so that an idle optimizer has none: it can be copied, forked and dropped, and a process
ends when the jobs are done.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

import torch


class Worker:
    """Makes calls one after the other, in a thread of its own. The first exception drops the calls behind it, and is
    raised by the next :meth:`join`."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._runs = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pid = os.getpid()

    def submit(self, job: Callable[[], object]) -> None:
        self._check_process()
        with self._changed:
            if self._error is not None:  # join() raises it; what follows an error is not done
                return
            self._jobs.append(job)
            if not self._runs:
                # Not a daemon: an interpreter that ends waits for it, instead of stopping it within a step.
                self._thread = threading.Thread(target=self._run, name="pace_kernels")
                self._thread.start()
                self._runs = True

    def join(self) -> None:
        """Waits until all is done; raises what a job has raised, once."""
        if threading.current_thread() is self._thread:  # a job may call what joins
            return
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _check_process(self) -> None:
        """In a forked process there is no thread, and the lock may be held by one that is not there."""
        if self._pid != os.getpid():
            pending = self._runs
            self._start()
            if pending:
                raise RuntimeError(
                    "the process was forked while an optimizer worked in host memory, and the copy has a part of that: "
                    "fork after optimizer.state_dict(), which waits, or load a checkpoint here"
                )

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    if not self._jobs:
                        self._runs = False
                        self._changed.notify_all()
                        return
                    job = self._jobs.popleft()
                try:
                    job()
                except BaseException as error:
                    with self._changed:
                        self._error = error
                        self._jobs.clear()
                finally:
                    del job  # it holds tensors

    def __deepcopy__(self, memo: object) -> Worker:
        return Worker()

    def __reduce__(self) -> tuple[type[Worker], tuple[()]]:
        return Worker, ()
