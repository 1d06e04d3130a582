"""What an optimizer costs in a whole training step: forward, backward, step, on one model.

    python bench/throughput.py [--device cuda] [--out out/bench] [--size gpt2] [--seconds 500]

All optimizers train the same model (`examples/gpt.py`) in turn, a few steps each, in an order that is shuffled in every
round; reported are medians and quartiles over the rounds, and ratios round by round (`harness.py`). On a GPU the model
is GPT-2 124M with float32 weights under bfloat16 autocast, 8 sequences of 1,024 tokens; `gpt2-256` is one of 256, where
the host is the limit, and `lora` trains adapters alone, 416 small tensors; on the CPU it is that of
`examples/train_lm.py`. Tokens are random: what is timed does not depend on them. Steps within the backward pass have
a model of their own. The JSON file and the table are complete after every round.

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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from bench_step import adamw_and_ema, adamw_and_foreach_ema, optimizer
from gpt import GPT, GPTConfig
from harness import Contender, bytes_of, in_short, machine, quartiles, ratio, save, slug, write
from torch import Tensor, nn
from torch.optim import AdamW

import pace_kernels

ROOT = Path(__file__).resolve().parents[1]
GPT2 = GPTConfig(vocab=50257, context=1024, layers=12, heads=12, width=768)
TINY = GPTConfig(context=16, layers=1, width=32)
SIZES = {  # the model, sequences a batch
    "gpt2": (GPT2, 8),
    "gpt2-256": (replace(GPT2, context=256), 1),
    "lora": (replace(GPT2, context=256, layers=52), 1),
    "small": (GPTConfig(), 16),
    "tiny": (TINY, 2),
    "tiny-lora": (TINY, 2),
}
ROWS: dict[str, tuple[str, Callable[[list[nn.Parameter]], Contender]]] = {
    "adamw-fused": ("AdamW fused", optimizer(AdamW, fused=True)),
    "adamw-foreach": ("AdamW foreach", optimizer(AdamW, foreach=True)),
    "adamw-ema": ("AdamW fused + EMA", adamw_and_ema),
    "adamw-ema-foreach": ("AdamW fused + EMA, foreach", adamw_and_foreach_ema),
    "pace": ("PACE", optimizer(pace_kernels.PACE)),
    "mada": ("MADA", optimizer(pace_kernels.MADA)),
    "mada-adamw": ('MADA, preset "adamw"', optimizer(partial(pace_kernels.MADA.preset, "adamw"))),
}
REFERENCE = "adamw-fused"


def in_backward(model: nn.Module) -> Contender:
    """PACE; `step()` ends the iteration."""
    made = pace_kernels.step_in_backward(model, pace_kernels.PACE)
    return Contender(made.step, lambda: made.state)


def in_host_memory(model: nn.Module) -> Contender:
    made = pace_kernels.Offload([p for p in model.parameters() if p.requires_grad], pace_kernels.PACE)
    return Contender(made.step)  # its states are on no device


def adamw_in_backward(model: nn.Module) -> Contender:
    """torch's recipe: an AdamW for each parameter, and a hook that steps it."""
    made = {p: AdamW([p], fused=True) for p in model.parameters() if p.requires_grad}

    def step(p: Tensor) -> None:
        made[p].step()
        made[p].zero_grad()

    for p in made:
        p.register_post_accumulate_grad_hook(step)
    return Contender(lambda: None, lambda: [own.state for own in made.values()])


def offloaded(model: nn.Module) -> Contender:
    from torchao.optim import CPUOffloadOptimizer

    made = CPUOffloadOptimizer([p for p in model.parameters() if p.requires_grad], AdamW, fused=True)
    return Contender(made.step)


# What hooks into the backward pass has a model of its own.
HOOKED: dict[str, tuple[str, Callable[[nn.Module], Contender]]] = {
    "pace-in-backward": ("PACE, step in backward", in_backward),
    "adamw-in-backward": ("AdamW fused, step in backward", adamw_in_backward),
    "pace-offload": ("Offload(PACE)", in_host_memory),
    "torchao-offload": ("torchao CPUOffloadOptimizer(AdamW)", offloaded),
}


class Adapted(nn.Module):
    """A linear layer at rest, and what is learned on top of it: two matrices of rank 8."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(8, layer.in_features) / 8)
        self.up = nn.Parameter(torch.zeros(layer.out_features, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


def with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for module in [m for m in model.modules() if not isinstance(m, Adapted)]:
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Adapted(layer))
    return model


class Training:
    def __init__(self, size: str, device: torch.device) -> None:
        config, self.batch = SIZES[size]
        torch.manual_seed(0)
        model = GPT(config)
        self.device, self.model = device, (with_adapters(model) if "lora" in size else model).to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
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


def memory_of(training: Training, contender: Contender) -> dict[str, Any]:
    """What a training step holds with this optimizer and no other."""
    training.seconds(contender, 2)  # creates states, and compiles
    return {"peak_bytes": training.peak_bytes(contender), "state_bytes": bytes_of(contender.state())}


def run(
    device: torch.device,
    size: str,
    rounds: int,
    steps: int,
    until: float = float("inf"),
    keep: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """`keep` gets the report after every round. No round begins after `until`, a value of time.monotonic()."""
    rows: dict[str, dict[str, Any]] = {"none": {"name": "no optimizer"}}
    rows |= {key: {"name": name} for key, (name, _) in (*ROWS.items(), *HOOKED.items())}
    for key, (_, hook) in HOOKED.items():  # before there is another model
        training = Training(size, device)
        try:
            rows[key] |= memory_of(training, hook(training.model))
        except Exception as reason:
            rows[key]["missing"] = in_short(reason)
        del training
        gc.collect()
    training = Training(size, device)
    training.step(None)
    rows["none"] |= {"peak_bytes": training.peak_bytes(None), "state_bytes": 0}
    for key, (_, make) in ROWS.items():
        gc.collect()
        try:
            rows[key] |= memory_of(training, make(training.parameters))
        except Exception as reason:
            rows[key]["missing"] = in_short(reason)
    made: dict[str, tuple[Training, Contender | None]] = {"none": (training, None)}
    for key in [*ROWS, *HOOKED]:
        if "missing" not in rows[key]:
            own = Training(size, device) if key in HOOKED else training
            made[key] = own, HOOKED[key][1](own.model) if key in HOOKED else ROWS[key][1](own.parameters)
            own.seconds(made[key][1], 2)
    report = {
        "machine": machine(device),
        "size": size,
        "parameters": sum(p.numel() for p in training.parameters),
        "tokens_per_step": training.tokens.numel(),
        "rounds": 0,
        "steps_per_sample": steps,
        "rows": rows,
    }
    samples: dict[str, dict[int, float]] = {key: {} for key in made}
    order, shuffler = list(made), random.Random(0)
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        shuffler.shuffle(order)
        for key in order:
            samples[key][number] = made[key][0].seconds(made[key][1], steps)
        for key, taken in samples.items():
            low, middle, high = quartiles(taken)
            rows[key] |= {
                "seconds_median": middle,
                "seconds_quartiles": [low, high],
                "tokens_per_s": training.tokens.numel() / middle,
                "ratio_to_adamw_fused": ratio(taken, samples[REFERENCE])[1],
                "samples_s": taken,
            }
        report["rounds"] = number + 1
        keep(report)
    return report


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
        if "seconds_median" not in row:
            lines.append(f"| {row['name']} | – {row.get('missing', '')} | | | | | |")
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
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no round begins any more")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    size = arguments.size or ("gpt2" if device.type == "cuda" else "small")
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"throughput-{slug(machine(device))}" + (f"-{size}" if size not in ("gpt2", "small") else "")

    def keep(report: dict[str, Any]) -> None:
        save(report, arguments.out / f"{name}.json")
        write(arguments.out / f"{name}.md", as_markdown(report))
        print(f"round {report['rounds']} of {size}", flush=True)

    until = time.monotonic() + arguments.seconds
    print(as_markdown(run(device, size, arguments.rounds, arguments.steps, until, keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
