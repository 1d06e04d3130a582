"""What an optimizer costs in a whole training step: forward, backward, step, on one model.

    python bench/throughput.py [--device cuda] [--out out/bench] [--size gpt2]

All optimizers train the same model (`examples/gpt.py`) in turn, a few steps each, in an order that is shuffled in every
round; reported are medians and quartiles over the rounds, and ratios round by round (`harness.py`). On a GPU the model
is GPT-2 124M with float32 weights under bfloat16 autocast, 8 sequences of 1,024 tokens; on the CPU it is that of
`examples/train_lm.py`. Tokens are random: what is timed does not depend on them.

Peak memory is of one optimizer alone: a training step with its states and no others', by torch's allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from bench_step import adamw_and_ema, optimizer
from gpt import GPT, GPTConfig
from harness import Contender, bytes_of, in_short, machine, quartiles, ratio, save, slug
from torch import nn
from torch.optim import AdamW

import pace_kernels

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # the model, sequences a batch
    "gpt2": (GPTConfig(vocab=50257, context=1024, layers=12, heads=12, width=768), 8),
    "small": (GPTConfig(), 16),
    "tiny": (GPTConfig(context=16, layers=1, width=32), 2),
}
ROWS: dict[str, tuple[str, Callable[[list[nn.Parameter]], Contender]]] = {
    "adamw-fused": ("AdamW fused", optimizer(AdamW, fused=True)),
    "adamw-foreach": ("AdamW foreach", optimizer(AdamW, foreach=True)),
    "adamw-ema": ("AdamW fused + EMA", adamw_and_ema),
    "pace": ("PACE", optimizer(pace_kernels.PACE)),
    "mada": ("MADA", optimizer(pace_kernels.MADA)),
    "mada-adamw": ('MADA, preset "adamw"', optimizer(partial(pace_kernels.MADA.preset, "adamw"))),
}
REFERENCE = "adamw-fused"


class Training:
    def __init__(self, size: str, device: torch.device) -> None:
        config, self.batch = SIZES[size]
        torch.manual_seed(0)
        self.device, self.model = device, GPT(config).to(device)
        self.parameters = list(self.model.parameters())
        shape = (self.batch, config.context)
        self.tokens = torch.randint(config.vocab, shape, device=device)
        self.targets = torch.randint(config.vocab, shape, device=device)
        gpu = device.type == "cuda"
        self.autocast = partial(torch.autocast, "cuda", torch.bfloat16) if gpu else contextlib.nullcontext

    def step(self, contender: Contender | None) -> None:
        with self.autocast():
            loss = self.model.loss(self.tokens, self.targets)
        loss.backward()
        if contender is not None:
            contender.step()
        self.model.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, contender: Contender | None, steps: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(contender)
        self.synchronize()
        return (time.perf_counter() - start) / steps

    def peak_bytes(self, contender: Contender | None) -> int | None:
        """At the peak of a step, of everything that the allocator holds."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step(contender)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def memory_of(training: Training, make: Callable[[list[nn.Parameter]], Contender]) -> dict[str, Any]:
    """What a training step holds with this optimizer and no other."""
    gc.collect()
    try:
        contender = make(training.parameters)
        training.seconds(contender, 2)  # creates states, and compiles
    except Exception as reason:
        return {"missing": in_short(reason)}
    return {"peak_bytes": training.peak_bytes(contender), "state_bytes": bytes_of(contender.state())}


def run(device: torch.device, size: str, rounds: int, steps: int) -> dict[str, Any]:
    training = Training(size, device)
    made: dict[str, Contender | None] = {"none": None}
    training.step(None)
    rows: dict[str, dict[str, Any]] = {
        "none": {"name": "no optimizer", "peak_bytes": training.peak_bytes(None), "state_bytes": 0}
    }
    for key, (name, make) in ROWS.items():
        rows[key] = {"name": name, **memory_of(training, make)}
    for key, (_, make) in ROWS.items():
        if "missing" not in rows[key]:
            made[key] = make(training.parameters)
            training.seconds(made[key], 2)
    samples: dict[str, dict[int, float]] = {key: {} for key in made}
    order, shuffler = list(made), random.Random(0)
    for number in range(rounds):
        shuffler.shuffle(order)
        for key in order:
            samples[key][number] = training.seconds(made[key], steps)
    tokens = training.tokens.numel()
    for key, taken in samples.items():
        low, middle, high = quartiles(taken)
        rows[key] |= {
            "seconds_median": middle,
            "seconds_quartiles": [low, high],
            "tokens_per_s": tokens / middle,
            "ratio_to_adamw_fused": ratio(taken, samples[REFERENCE])[1],
            "samples_s": taken,
        }
    return {
        "machine": machine(device),
        "size": size,
        "parameters": sum(p.numel() for p in training.parameters),
        "tokens_per_step": tokens,
        "rounds": rounds,
        "steps_per_sample": steps,
        "rows": rows,
    }


def as_markdown(report: dict[str, Any]) -> str:
    about = report["machine"]
    lines = [
        f"{report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens a step; "
        f"{about.get('gpu') or about['cpu']}, torch {about['torch']}, {about['date'][:10]}; medians of "
        f"{report['rounds']} rounds",
        "",
        "| | ms a training step | quartiles | tokens/s | / AdamW fused | state MB | peak MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"].values():
        if "missing" in row:
            lines.append(f"| {row['name']} | – {row['missing']} | | | | | |")
            continue
        low, high = (1e3 * s for s in row["seconds_quartiles"])
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        lines.append(
            f"| {row['name']} | {1e3 * row['seconds_median']:.2f} | {low:.2f} – {high:.2f} "
            f"| {row['tokens_per_s']:,.0f} | {row['ratio_to_adamw_fused']:.3f} × | {row['state_bytes'] / 1e6:,.0f} "
            f"| {peak} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="a sample")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    size = arguments.size or ("gpt2" if device.type == "cuda" else "small")
    report = run(device, size, arguments.rounds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(report, arguments.out / f"throughput-{slug(report['machine'])}.json")
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
