"""A thread that computes in host memory while training goes on.

It lives as long as there are jobs: an idle optimizer has none, so that it can be copied, forked and dropped.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

import torch

Job = Callable[[], object]


class Worker:
    """Does jobs one after the other, in a thread of its own. ``failed`` is the first exception, after which no job is
    done."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._runs = False
        self._thread = 0  # the one that does them
        self._process = os.getpid()
        self.failed: BaseException | None = None

    def submit(self, job: Job) -> None:
        self.look()
        with self._changed:
            if self.failed is None:
                self._jobs.append(job)
            idle = not self._runs
        if idle:
            try:
                # Not a daemon: an interpreter that ends waits for it, instead of stopping it within a job.
                threading.Thread(target=self._run, name="pace_kernels").start()
            except RuntimeError:  # an interpreter that ends starts no thread, nor does a system without more of them
                self._run()

    def join(self) -> None:
        """Waits until all is done. Raises RuntimeError in a signal's handler that interrupts a job of this thread,
        which would wait for itself."""
        self.look()
        if self._runs and self._thread == threading.get_ident():
            raise RuntimeError("in the middle of work in host memory, which a signal interrupted")
        if self._jobs and not self._runs:
            self._run()  # a job whose thread was not started, because a signal came in between
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)

    def look(self) -> None:
        """In a forked process there is no thread, and the lock may be held by one that is not there."""
        if self._process != os.getpid():
            lost = self._runs or self._jobs
            self._begin()
            if lost:
                self.failed = RuntimeError(
                    "the process was forked while a thread worked in host memory, which the new one does not have: "
                    "fork after optimizer.state_dict(), which waits for it"
                )

    def _run(self) -> None:
        try:
            with self._changed:
                if self._runs:
                    return
                self._runs, self._thread = True, threading.get_ident()
            with torch.no_grad():
                while (job := self._next()) is not None:
                    job()
        except BaseException as error:
            with self._changed:
                self.failed, self._runs = error, False
                self._jobs.clear()
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            if self._jobs:
                return self._jobs.popleft()
            self._runs = False
            self._changed.notify_all()
            return None
