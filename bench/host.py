"""What an optimizer's step costs on the host: tensors of 4 elements on the CPU, where nothing but that is left.

`python bench/bench_step.py --host`. One thread, all contenders round-robin in an order shuffled anew each round, the
thread's own CPU time, medians and quartiles; a ratio is the median of the ratios round by round. What happens between
two steps (a scheduler's step, an option replaced) is not in the time.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine, significant
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW

Build = Callable[[list[Any]], Optimizer]
REFERENCE = "AdamW fused"
ROWS: dict[str, Build] = {
    REFERENCE: lambda params: AdamW(params, fused=True),
    "AdamW foreach": lambda params: AdamW(params, foreach=True),
    "PACE": PACE,
    "MADA adamw": lambda params: MADA.preset("adamw", params),
    "MADA lion": lambda params: MADA.preset("lion", params),
    "MADA, all learned": MADA,
    "ScheduleFreeAdamW": ScheduleFreeAdamW,
    "Pullback(AdamW fused)": lambda params: Pullback(AdamW(params, fused=True)),
}
COUNTS = (1, 10, 148, 2000)
ROUNDS = 41
STEPS_A_SAMPLE = 600  # of one tensor; fewer of more


def plain(count: int) -> list[Any]:
    params = [nn.Parameter(torch.randn(4)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(4)
    return params


def in_groups(count: int) -> list[Any]:
    """Eight groups, every other one without decay."""
    params = plain(max(count, 8))
    return [{"params": params[i::8], "weight_decay": 0.01 * (i % 2)} for i in range(8)]


def sharded(count: int) -> list[Any]:
    """DTensors over a mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    params = [nn.Parameter(distribute_tensor(torch.randn(4), mesh, [Shard(0)])) for _ in range(count)]
    for param in params:
        param.grad = distribute_tensor(torch.randn(4), mesh, [Shard(0)])
    return params


def one_cycle(optimizer: Optimizer) -> Callable[[], None]:
    """Replaces lr at every step, and betas where there are such."""
    momentum = "betas" in optimizer.param_groups[0] or "momentum" in optimizer.param_groups[0]
    return OneCycleLR(optimizer, max_lr=1e-3, total_steps=1_000_000, cycle_momentum=momentum).step


def decay_replaced(optimizer: Optimizer) -> Callable[[], None]:
    values = [0.01, 0.02]

    def replace() -> None:
        values.reverse()
        for group in optimizer.param_groups:
            group["weight_decay"] = values[0]

    return replace


# title -> the parameters, and what happens before each step
Between = Callable[[Optimizer], Callable[[], None]]
CASES: dict[str, tuple[Callable[[int], list[Any]], Between | None]] = {
    "one group": (plain, None),
    "eight groups": (in_groups, None),
    "OneCycleLR": (plain, one_cycle),
    "weight_decay replaced": (plain, decay_replaced),
    "DTensors": (sharded, None),
}


class Contender:
    def __init__(self, build: Build, params: list[Any], between: Between | None, steps: int) -> None:
        self.optimizer = build(params)
        self.between = None if between is None else between(self.optimizer)
        self.steps = steps
        self.sample(6)

    def sample(self, steps: int | None = None) -> float:
        """Seconds of CPU time a step."""
        steps, clock = steps or self.steps, time.thread_time
        step = self.optimizer.step  # as a scheduler wraps it
        if self.between is None:
            start = clock()
            for _ in range(steps):
                step()
            return (clock() - start) / steps
        spent = 0.0
        for _ in range(steps):
            start = clock()
            step()
            spent += clock() - start
            self.between()
        return spent / steps


def three(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def measured(title: str, count: int, rounds: int, rows: dict[str, Build]) -> list[dict[str, Any]]:
    make, between = CASES[title]
    random.seed(count)
    contenders = {
        name: Contender(build, make(count), between, max(1, STEPS_A_SAMPLE // count)) for name, build in rows.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in rows}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in random.sample(list(contenders), len(contenders)):
                contenders[name].optimizer.step()  # caches as in a run of it alone
                samples[name].append(contenders[name].sample())
    finally:
        gc.enable()
    base = samples[REFERENCE]
    return [
        {
            "case": title,
            "tensors": count,
            "row": name,
            "microseconds": [significant(1e6 * value) for value in three(own)],
            "against_adamw_fused": [
                significant(value) for value in three([a / b for a, b in zip(own, base, strict=True)])
            ],
        }
        for name, own in samples.items()
    ]


def main(out: Path, *, quick: bool = False, cases: list[str] | None = None, counts: list[int] | None = None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    about = machine(torch.device("cpu"))
    print(f"{about['cpu']}, one thread, torch {about['torch']}, {about['date']}")
    print("µs of CPU time of a step (quartiles); its ratio to that of AdamW(fused=True)")
    results = []
    for title in cases or CASES:
        for count in counts or ((1, 10) if quick else COUNTS):
            found = measured(title, count, 3 if quick else ROUNDS, ROWS)
            results += found
            print(f"\n{title}, {count} tensors", flush=True)
            for row in found:
                low, middle, high = row["microseconds"]
                times = f"{middle:9.1f} ({low:.1f} to {high:.1f})"
                low, middle, high = row["against_adamw_fused"]
                print(f"  {row['row']:22s} {times:32s} {middle:6.2f} ({low:.2f} to {high:.2f})")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": about, "quick": quick, "results": results}, indent=1)
    (out / "host.json").write_text(text + "\n")
    print(f"\n{out / 'host.json'} written")
