"""How long load_state_dict takes with many small tensors, beside that of torch.optim.AdamW: the target is 3 times.

    python bench/bench_load.py [TENSORS [GROUPS]]

Interleaved in one process, the median of 7 rounds. A load of AdamW copies two tensors a parameter and casts the step;
PACE's has a third, MADA's five more, and all of it is checked before anything changes. AdamW's looks each tensor up in
the lists of its groups' parameters, so that it takes longer with few groups: all parameters in one is what most have.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from pace_kernels import MADA, PACE

KINDS: dict[str, Any] = {"AdamW": torch.optim.AdamW, "PACE": PACE, "MADA": MADA}
ROUNDS = 7


def trained(kind: Any, tensors: int, groups: int = 1) -> Any:
    params = [torch.nn.Parameter(torch.ones(16)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = kind([{"params": params[i::groups]} for i in range(groups)])
    optimizer.step()
    return optimizer


def main() -> None:
    tensors, groups = (int(value) for value in (*sys.argv[1:3], *("10000", "1")[len(sys.argv) - 1 :]))
    optimizers = {name: trained(kind, tensors, groups) for name, kind in KINDS.items()}
    saved = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.load_state_dict(saved[name])
            times[name].append(time.perf_counter() - begin)
    adamw = statistics.median(times["AdamW"])
    print(
        f"load_state_dict of {tensors} parameters with 16 elements in {groups} groups, torch {torch.__version__}, CPU"
    )
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:6} {median * 1e3:7.1f} ms, {median / adamw:.2f} times AdamW's")


if __name__ == "__main__":
    main()
