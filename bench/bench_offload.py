"""What a step of `Offload(PACE)` takes beside that of PACE, and what the bus and the CPU say that it must take.

    python bench/bench_offload.py [--device cuda] [--size gpt2] [--dtype float32] [--seconds 60] [--quick]

The gradients lie on the device when a step begins, so that nothing is hidden behind a backward pass: that is timed by
`throughput.py`. A step copies the gradients down, steps on the CPU, and copies the weights up. Each of the three is
timed alone, in the same run: the longest of them is the time of a step that overlaps all it can, their sum that of one
that overlaps nothing. Medians of the rounds, interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from harness import machine, make_parameters, markdown_table
from shapes import gpt2, llama
from torch import Tensor, nn

from pace_kernels import PACE, Offload

SIZES = {
    "gpt2": gpt2(),
    "1.7b": llama(vocabulary=49152, layers=24, width=2048, hidden=8192),
    "tiny": gpt2(vocabulary=503, context=64, layers=1, width=64),
}


def copied(tensors: list[Tensor], to: list[Tensor]) -> Callable[[], None]:
    def copy() -> None:
        for source, target in zip(tensors, to, strict=True):
            target.copy_(source, non_blocking=True)

    return copy


def parts(device: torch.device, size: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by what it is called in the table."""
    master = 32 if dtype == torch.bfloat16 else None

    def params(where: torch.device) -> list[nn.Parameter]:
        return make_parameters(SIZES[size], dtype, where)

    def offload(fraction: float) -> Callable[[], object]:
        return Offload(params(device), PACE, fraction=fraction, master_weight_bits=master).step

    host = params(torch.device("cpu"))
    there = [param.detach() for param in params(device)]
    pinned = [torch.empty_like(param, device="cpu", pin_memory=device.type == "cuda") for param in there]
    return {
        "PACE on the device": PACE(params(device), master_weight_bits=master).step,
        "Offload(PACE)": offload(1.0),
        "Offload(PACE, fraction=0.5)": offload(0.5),
        "gradients down": copied(there, pinned),
        "PACE on the CPU": PACE(host, master_weight_bits=master).step,
        "weights up": copied(pinned, there),
    }


def run(device: torch.device, size: str, dtype: torch.dtype, seconds: float, rounds: int = 15) -> list[list[str]]:
    jobs = parts(device, size, dtype)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    until = time.monotonic() + seconds
    for number in range(rounds + 2):  # two to warm up
        if number > 2 and time.monotonic() > until:
            break
        for name, job in jobs.items():
            torch.cuda.synchronize() if device.type == "cuda" else None
            start = time.perf_counter()
            job()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times[name] += [time.perf_counter() - start] if number >= 2 else []
    found = {name: statistics.median(taken) for name, taken in times.items()}
    needed = [found[name] for name in ("gradients down", "PACE on the CPU", "weights up")]
    found |= {"the longest of the last three": max(needed), "their sum": sum(needed)}
    bus = sum(torch.Size(shape).numel() for shape in SIZES[size]) * dtype.itemsize
    rows = [["", "ms", "GB/s of the bus"]]
    for name, taken in found.items():
        carried = bus if name in ("gradients down", "weights up") else 0
        rows.append([name, f"{1e3 * taken:.3f}", f"{carried / taken / 1e9:.1f}" if carried else ""])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no round begins any more")
    parser.add_argument("--quick", action="store_true", help="tiny, two rounds: shows that it works, and no speed")
    given = parser.parse_args(argv)
    device, size = torch.device(given.device), "tiny" if given.quick else given.size
    about = machine(device)
    rows = run(device, size, getattr(torch, given.dtype), given.seconds, 2 if given.quick else 15)
    where = f"{about.get('gpu') or about['cpu']}, {torch.get_num_threads()} threads, torch {about['torch']}"
    print(f"Offload, {size}, {given.dtype}; {where}\n\n{markdown_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
