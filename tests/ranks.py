"""Processes with a process group (gloo), which tests send functions to. Started once for each number of ranks."""

from __future__ import annotations

import faulthandler
import functools
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds


def _serve(rank: int, world: int, rendezvous: str, connection: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            order = connection.recv()
        except EOFError:  # the tests are over
            break
        function, arguments = order
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Ranks:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._connections, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, os.path.join(self._folder.name, "rendezvous"), there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function, of a module that can be imported, returns on each rank."""
        for connection in self._connections:
            connection.send((function, arguments))
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(10 if failures else TIMEOUT):
                failures.append(f"rank {rank} did not answer")
                continue
            try:
                done, result = connection.recv()
            except EOFError:
                self._processes[rank].join(timeout=10)
                done, result = False, f"it died, exit code {self._processes[rank].exitcode}"
            results.append(result)
            if not done:
                failures.append(f"rank {rank}: {result}")
        if failures:
            start.cache_clear()
            self.kill()  # the others may be waiting in a collective
            raise AssertionError("\n".join(failures))
        return results

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


@functools.cache
def start(world: int) -> Ranks:
    return Ranks(world)


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``world`` ranks; AssertionError with the traceback where one
    raises."""
    return start(world)(function, *arguments)
