"""Installs the peers that `bench_peers.py` measures into the environment that runs this, each on its own.

Their names are in the extra `peers` of pyproject.toml. torch stays the one that is there. What cannot be installed is
remembered with pip's reason in `peers.json`, at the root of the environment; the benchmark shows it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_peers import BUILT, REASONS

PIP_SECONDS = 900
BUILD_SECONDS = 1800
BUILD_DEEPSPEED = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


def requirements() -> list[str]:
    """Of the extra `peers`, as the installed project has them."""
    found = importlib.metadata.requires("pace_kernels") or []
    return [text.partition(";")[0].strip() for text in found if re.search(r"""extra\s*==\s*["']peers["']""", text)]


def why_failed(output: str) -> str:
    """The line of an output that tells most: the last that reports an error, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|error|\w*Error)\b", line)]
    return (errors or lines or ["no output"])[-1]


def run(command: list[str], seconds: float, **environment: str) -> str:
    """The reason why the command failed, or nothing."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        started = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            started.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"it took more than {seconds:g} s"
        finally:
            if started.poll() is None:  # with the compilers that it started
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
        output.seek(0)
        return why_failed(output.read()) if started.returncode else ""


def install(requirement: str, constraints: Path) -> str:
    # DS_BUILD_OPS: DeepSpeed would compile operators for GPUs otherwise, or fail because there is no CUDA.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), requirement]
    return run(command, PIP_SECONDS, DS_BUILD_OPS="0")


def build_deepspeed() -> str:
    """Compiles CPUAdam now, so that it does not count as the first step of the benchmark."""
    for lock in BUILT.rglob("lock"):
        lock.unlink()  # of a build that was cut off, for whose end torch would wait forever
    BUILT.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    command = [sys.executable, "-c", BUILD_DEEPSPEED]
    return run(command, BUILD_SECONDS, DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(BUILT), PATH=path)


def main() -> None:
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n")
        for requirement in requirements():
            package = re.split(r"[^\w.-]", requirement)[0]
            reason = install(requirement, constraints)
            if package == "deepspeed" and not reason:
                reason = build_deepspeed()
            reasons[package] = reason
            print(f"{package}: {reason or 'installed'}", flush=True)
            REASONS.write_text(json.dumps(reasons, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
