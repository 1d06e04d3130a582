"""What compressed states cost on a CPU: a step of PACE with each format beside PACE and AdamW in float32 and bfloat16.

    python bench/bench_compressed.py --out bench/results

All rows step the 124 M parameters of GPT-2, interleaved in one process (harness.py). Rows in float32 step copies of the
same bfloat16 weights and gradients. Writes `compressed.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_step import QUICK_SIZES, SIZES, adamw_held, adamw_moved, optimizer
from harness import BandwidthProbe, Case, ColdWalk, Contender, Row, as_json, machine, measure, save, table
from torch import nn
from torch.optim import AdamW

import pace_kernels
from pace_kernels.backend import describe

FLOAT32, REFERENCE = "pace-float32", "adamw-fused-float32"
# Bytes a parameter of m, v and the average, and of the remainder, with their scales: 1/32 of a byte each.
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "pace-bfloat16": ({}, 12),
    "8-master-32": ({"state_bits": 8, "master_weight_bits": 32}, 5 + 3 / 32),
    "8-master-24": ({"state_bits": 8, "master_weight_bits": 24}, 4 + 3 / 32),
    "8-ema-16-master-32": ({"state_bits": 8, "ema_bits": 16, "master_weight_bits": 32}, 6 + 3 / 32),
    "8-ema-24-master-32": ({"state_bits": 8, "ema_bits": 24, "master_weight_bits": 32}, 7 + 2 / 32),
    "8-stochastic": ({"state_bits": 8, "stochastic_rounding": True}, 3 + 3 / 32),
    "16-master-32": ({"state_bits": 16, "master_weight_bits": 32}, 8 + 1 / 32),
    "master-32": ({"master_weight_bits": 32}, 14),
}


Make = Callable[[list[nn.Parameter]], Contender]


def of_copies(make: Make, float32: bool = False) -> Make:
    """Of weights of its own, as what is in codes would be told from others' writes; or of float32 ones."""

    def build(parameters: list[nn.Parameter]) -> Contender:
        own = [nn.Parameter(p.detach().float() if float32 else p.detach().clone()) for p in parameters]
        for mine, given in zip(own, parameters, strict=True):
            mine.grad = given.grad.float() if float32 else given.grad
        return make(own)

    return build


def named(options: dict[str, Any]) -> str:
    return "PACE, " + (", ".join(f"{name}={value}" for name, value in options.items()) or "bfloat16 weights")


ROWS = [
    Row(
        FLOAT32,
        "PACE, float32 weights",
        of_copies(optimizer(pace_kernels.PACE), True),
        lambda _: 36,
        lambda _: 12,
        scratch=8,
    ),
    Row(
        REFERENCE,
        "AdamW fused, float32 weights",
        of_copies(optimizer(AdamW, fused=True), True),
        lambda _: 28,
        lambda _: 8,
        scratch=8,
    ),
    Row(
        "adamw-fused-bfloat16",
        "AdamW fused, bfloat16 weights",
        of_copies(optimizer(AdamW, fused=True)),
        adamw_moved,
        adamw_held,
    ),
    *(
        Row(
            key,
            named(options),
            of_copies(optimizer(pace_kernels.PACE, **options)),
            lambda _, b=held: round(6 + 2 * b, 1),
            lambda _, b=held: b,
        )
        for key, (options, held) in FORMATS.items()
    ),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="samples of each row (default: 21)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of compressed.json")
    parser.add_argument("--quick", action="store_true", help="a tiny size and 3 rounds: a test, no numbers")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, quick = torch.device("cpu"), arguments.quick
    title, shapes = (QUICK_SIZES if quick else SIZES)["gpt2"]
    case: Case = measure(
        title, ROWS, shapes, torch.bfloat16, device,
        rounds=arguments.rounds or (3 if quick else 21),
        walk=ColdWalk(device, 2**20 if quick else None),
        probe=BandwidthProbe(device, 2**16) if quick else BandwidthProbe(device),
        anchors=(FLOAT32, REFERENCE),
    )  # fmt: skip
    print(table(case, {FLOAT32: "/ PACE float32", REFERENCE: "/ AdamW float32"}))
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"machine": machine(device) | describe(), "quick": quick, "cases": [as_json(case)]}
    save(numbers, arguments.out / "compressed.json")


if __name__ == "__main__":
    main()
