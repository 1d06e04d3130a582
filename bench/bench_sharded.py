"""What stepping DTensors costs beside plain tensors of the same local shapes: `python bench/bench_sharded.py`.

Two processes (gloo) with one thread each. Rounds are interleaved; medians and quartiles of rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import machine, save

from pace_kernels import MADA, PACE

# Number of tensors and their shape: many small tensors show the cost of each, few large ones that of memory.
SIZES = {"500 tensors of 2,000": (500, (20, 100)), "20 tensors of 1 M": (20, (1000, 1000))}
QUICK = {"3 tensors of 20": (3, (5, 4))}


def measure(rank: int, world: int, rendezvous: str, rounds: int, quick: bool, out: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for size, (count, shape) in (QUICK if quick else SIZES).items():
        for rule in (PACE, MADA):
            kinds: dict[str, Any] = {}
            for kind in ("plain", "sharded"):
                params = []
                for _ in range(count):
                    value = distribute_tensor(torch.randn(shape), mesh, [Shard(0)], src_data_rank=None)
                    grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)], src_data_rank=None)
                    if kind == "plain":
                        value, grad = value.to_local().clone(), grad.to_local().clone()
                    params.append(torch.nn.Parameter(value))
                    params[-1].grad = grad
                kinds[kind] = rule(params, lr=1e-3)
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for n in range(rounds + 2):
                for kind, optimizer in kinds.items():
                    dist.barrier()
                    start = time.perf_counter()
                    optimizer.step()
                    if n >= 2:
                        times[kind].append(time.perf_counter() - start)
            ms = {kind: [1e3 * q for q in statistics.quantiles(values, n=4)] for kind, values in times.items()}
            rows.append({"size": size, "rule": rule.__name__, "ms": ms, "ratio": ms["sharded"][1] / ms["plain"][1]})
    if rank == 0:
        save({"machine": machine(torch.device("cpu")), "rounds": rounds, "rows": rows}, Path(out))
    dist.barrier()
    os._exit(0)  # gloo's threads, taken down while the other process is, may abort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="small tensors, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out / "sharded.json"
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        mp.spawn(measure, (2, rendezvous, args.rounds, args.quick, str(out)), nprocs=2)
    print(f"{'':24}{'plain, ms':>12}{'sharded, ms':>14}{'ratio':>8}")
    for row in json.loads(out.read_text())["rows"]:
        plain, sharded = (row["ms"][kind][1] for kind in ("plain", "sharded"))
        print(f"{row['rule'] + ', ' + row['size']:30}{plain:8.2f}{sharded:12.2f}{row['ratio']:10.2f}")


if __name__ == "__main__":
    main()
