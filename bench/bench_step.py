"""How fast is an optimizer step, and how near to the memory's bandwidth? What `make bench` runs.

Times PACE and MADA beside `torch.optim.AdamW` and beside the same rules in plain torch, on three lists of shapes in
float32 and bfloat16; `harness.py` says how. Prints a table for each, and writes all samples to `step.json` and a chart
to `step.webp`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import host
import torch
from baselines import TENSORS_PER_GRAPH, AutogradMADA, CompiledPACE, EagerPACE
from harness import (
    BandwidthProbe,
    Case,
    ColdWalk,
    Contender,
    Row,
    as_json,
    count,
    held_bytes,
    itemsize,
    machine,
    measure,
    moved_bytes,
    save,
    table,
)
from shapes import gpt2
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

try:
    import pace_kernels
    from pace_kernels.backend import describe
except ImportError as reason:
    sys.exit(
        f"bench_step: pace_kernels cannot be imported ({reason}); install it first, or set PYTHONPATH to the checkout"
    )

OURS, MADA, REFERENCE = "pace", "mada", "adamw-fused"
PRESET, AUTOGRAD = "mada-adamw", "mada-autograd"
KERNELS = (
    OURS,
    "pace-stats",
    MADA,
    PRESET,
    "pullback-adamw",
    "pullback-adamw-0",
    "pullback-sgd-0",
)  # the rows that run pace_kernels
PICTURED = (
    OURS,
    "pace-stats",
    REFERENCE,
    "adamw-foreach",
    "adamw-ema",
    "pace-eager",
    "pace-compile",
    MADA,
    PRESET,
    "pullback-adamw",
)  # the rows of the picture and of the page of results: ten at most
LONGEST_BAR = 8.0  # times of PACE: longer bars are cut, and say so


# ---- contenders ----


def optimizer(build: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[list[nn.Parameter]], Contender]:
    def make(parameters: list[nn.Parameter]) -> Contender:
        made = build(parameters, **options)
        return Contender(made.step, lambda: made.state)

    return make


def adamw_and_ema(parameters: list[nn.Parameter]) -> Contender:
    model = nn.ParameterList(parameters)
    adamw = AdamW(parameters, fused=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def step() -> None:
        adamw.step()
        averaged.update_parameters(model)

    return Contender(step, lambda: [adamw.state, *averaged.parameters(), *averaged.buffers()])


def adamw_and_foreach_ema(parameters: list[nn.Parameter]) -> Contender:
    """Without AveragedModel's count of steps, whose copy to a GPU waits for it in every step."""
    adamw, average_ = AdamW(parameters, fused=True), get_ema_multi_avg_fn(0.99)
    averages, weights = [p.detach().clone() for p in parameters], [p.detach() for p in parameters]

    def step() -> None:
        adamw.step()
        average_(averages, weights, None)

    return Contender(step, lambda: [adamw.state, averages])


def averaged_by_torch(
    base: Callable[..., torch.optim.Optimizer], **how: Any
) -> Callable[[list[nn.Parameter]], Contender]:
    """The base, fused, and torch's AveragedModel: one foreach call, or (avg_fn) tensor by tensor."""

    def make(parameters: list[nn.Parameter]) -> Contender:
        model = nn.ParameterList(parameters)
        made, averaged = base(parameters, lr=1e-3, fused=True), AveragedModel(model, **how)

        def step() -> None:
            made.step()
            averaged.update_parameters(model)

        return Contender(step, lambda: [made.state, *averaged.parameters(), *averaged.buffers()])

    return make


def pulled_back(
    base: Callable[..., torch.optim.Optimizer], **options: Any
) -> Callable[[list[nn.Parameter]], Contender]:
    def make(parameters: list[nn.Parameter]) -> Contender:
        made = pace_kernels.Pullback(base(parameters, lr=1e-3, fused=True), **options)
        return Contender(made.step, lambda: [made.state, made.averager._buffers])

    return make


def pullback_moved(dtype: torch.dtype) -> int:
    """AdamW's step; the copy of the weights; x', x, v, e read and x₊, e₊ written. 60 in float32."""
    return adamw_moved(dtype) + 2 * itemsize(dtype) + 4 * itemsize(dtype) + 8


def sgd_moved(dtype: torch.dtype) -> int:
    return moved_bytes(dtype, states=0)


def average_moved(base: Callable[[torch.dtype], int]) -> Callable[[torch.dtype], int]:
    """The base's step, and a pass that reads x and e and writes e."""
    return lambda dtype: base(dtype) + itemsize(dtype) + 8


def compiled_pace(parameters: list[nn.Parameter]) -> Contender:
    torch.compiler.reset()  # graphs of other shapes, in memory, would count toward the recompilation limit
    return optimizer(CompiledPACE)(parameters)


def autograd_mada(parameters: list[nn.Parameter]) -> Contender:
    made = AutogradMADA(parameters)
    return Contender(made.step, made.held)


def pace_moved(dtype: torch.dtype) -> int:
    return moved_bytes(dtype, states=3)


def pace_held(dtype: torch.dtype) -> int:
    return held_bytes(dtype, states=3)


def mada_moved(dtype: torch.dtype) -> int:
    """m, n, v̄, ṽ, l read and written; the gradient before the last one read, and this one written over it; the last
    one read. 64 in float32."""
    return moved_bytes(dtype, states=6, read_only=1)


def captured_mada_moved(dtype: torch.dtype) -> int:
    """The two gradients change their roles by a copy, where a graph knows tensors alone. 68 in float32."""
    return mada_moved(dtype) + 4


def mada_held(dtype: torch.dtype) -> int:
    return held_bytes(dtype, states=7)


def preset_moved(dtype: torch.dtype) -> int:
    return moved_bytes(dtype, states=2)


def preset_held(dtype: torch.dtype) -> int:
    return held_bytes(dtype, states=2)


def adamw_moved(dtype: torch.dtype) -> int:
    return moved_bytes(dtype, states=2, state_dtype=None)


def adamw_held(dtype: torch.dtype) -> int:
    return held_bytes(dtype, states=2, state_dtype=None)


ADAMW_NOTE = "torch.optim keeps states in the parameters' format, so in bfloat16 it moves less and rounds each state"

ROWS = [
    Row(OURS, "PACE", optimizer(pace_kernels.PACE), pace_moved, pace_held),
    Row("pace-stats", "PACE, log_stats", optimizer(pace_kernels.PACE, log_stats=True), pace_moved, pace_held),
    Row(REFERENCE, "AdamW fused", optimizer(AdamW, fused=True), adamw_moved, adamw_held, note=ADAMW_NOTE),
    Row("adamw-foreach", "AdamW foreach", optimizer(AdamW, foreach=True), adamw_moved, adamw_held, scratch=12),
    Row("adamw-loop", "AdamW for-loop", optimizer(AdamW, foreach=False), adamw_moved, adamw_held, scratch_of_one=12),
    Row(
        "adamw-ema",
        "AdamW fused + EMA",
        adamw_and_ema,
        lambda dtype: moved_bytes(dtype, states=3, state_dtype=None),
        lambda dtype: held_bytes(dtype, states=3, state_dtype=None),
        scratch=4,
        note="torch.optim.swa_utils.AveragedModel, a pass of its own after the step",
    ),
    Row(
        "pace-eager",
        "PACE, eager torch",
        optimizer(EagerPACE),
        pace_moved,
        pace_held,
        scratch_of_one=24,
        note="one tensor at a time with in-place operations, states in float32 (baselines.py)",
    ),
    Row(
        "pace-compile",
        "PACE, torch.compile",
        compiled_pace,
        pace_moved,
        pace_held,
        scratch_of_one=24,
        note=f"the same rule compiled in graphs of {TENSORS_PER_GRAPH} tensors (baselines.py)",
        compiles=True,
    ),
    Row(MADA, "MADA", optimizer(pace_kernels.MADA), mada_moved, mada_held, note="all six coefficients learned"),
    Row(
        PRESET,
        'MADA, preset "adamw"',
        optimizer(partial(pace_kernels.MADA.preset, "adamw")),
        preset_moved,
        preset_held,
        note="AdamW by MADA's kernel, states in float32",
    ),
    Row(
        AUTOGRAD,
        "MADA, autograd",
        autograd_mada,
        mada_moved,
        lambda dtype: 88,  # six states and the graph, as measured
        scratch=24,
        note="a graph of each step, differentiated by the next gradient (baselines.py), its graph counted as state; "
        "on one tensor in float32 only, since it takes seconds a step",
    ),
    Row(
        "pullback-adamw",
        "Pullback(AdamW fused)",
        pulled_back(AdamW),
        pullback_moved,
        lambda dtype: adamw_held(dtype) + 4 + itemsize(dtype),
        note="a pass of its own after the step, and a copy of the weights before it; compare with PACE",
    ),
    Row(
        "pullback-adamw-0",
        "Pullback(AdamW fused), no pull",
        pulled_back(AdamW, lambda_pullback=0.0),
        average_moved(adamw_moved),
        lambda dtype: adamw_held(dtype) + 4,
        note="an average in a pass of its own after the step",
    ),
    Row(
        "adamw-ema-loop",
        "AdamW fused + EMA, for-loop",
        averaged_by_torch(AdamW, avg_fn=get_ema_avg_fn(0.99)),
        average_moved(adamw_moved),
        lambda dtype: adamw_held(dtype) + itemsize(dtype),
        scratch_of_one=4,
        note="AveragedModel with avg_fn, tensor by tensor, the average in the parameters' format",
    ),
    Row("sgd-fused", "SGD fused", optimizer(SGD, lr=1e-3, fused=True), sgd_moved, lambda dtype: 0),
    Row(
        "pullback-sgd-0",
        "Pullback(SGD fused), no pull",
        pulled_back(SGD, gain=0.0),
        average_moved(sgd_moved),
        lambda dtype: 4,
    ),
    Row(
        "sgd-ema",
        "SGD fused + EMA",
        averaged_by_torch(SGD, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
        average_moved(sgd_moved),
        lambda dtype: itemsize(dtype),
        scratch=4,
    ),
    Row(
        "sgd-ema-loop",
        "SGD fused + EMA, for-loop",
        averaged_by_torch(SGD, avg_fn=get_ema_avg_fn(0.99)),
        average_moved(sgd_moved),
        lambda dtype: itemsize(dtype),
        scratch_of_one=4,
    ),
]
# row -> the sizes and formats that it is run on, where that is not all of them
ONLY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {AUTOGRAD: (("one",), ("float32",))}


# ---- sizes ----


# key -> title and shapes
SIZES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "one": ("One tensor of 32 M", [(32 * 2**20,)]),
    "gpt2": ("GPT-2 124M", gpt2()),
    "small": ("2,000 tensors of 1,000", 2000 * [(1000,)]),
}
QUICK_SIZES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "one": ("One tensor of 64 K", [(64 * 2**10,)]),
    "gpt2": ("A tiny GPT-2", gpt2(vocabulary=503, context=64, layers=2, width=64)),
    "small": ("40 tensors of 1,000", 40 * [(1000,)]),
}
assert sum(map(count, SIZES["gpt2"][1])) == 124_439_808


# ---- results ----

BANDWIDTH = "read-modify-write bandwidth"

# size, format, row, what it is measured against, target
TARGETS = [
    ("one", "float32", OURS, BANDWIDTH, "≥ 0.90"),
    ("gpt2", "float32", OURS, BANDWIDTH, "≥ 0.90"),
    ("one", "float32", OURS, REFERENCE, "≤ 1.15"),
    ("gpt2", "float32", OURS, REFERENCE, "≤ 1.15"),
    ("one", "float32", "pace-eager", OURS, "≥ 10"),
    ("one", "bfloat16", "pace-eager", OURS, "≥ 20"),
    ("small", "float32", OURS, REFERENCE, "≤ 1.2"),
    ("one", "float32", MADA, BANDWIDTH, "≥ 0.60"),
    ("gpt2", "float32", MADA, BANDWIDTH, "≥ 0.60"),
    ("one", "float32", MADA, REFERENCE, "≤ 3"),
    ("gpt2", "float32", MADA, REFERENCE, "≤ 3"),
    ("one", "float32", AUTOGRAD, MADA, "≥ 150"),
    ("one", "float32", PRESET, REFERENCE, "≤ 1.1"),
    ("gpt2", "float32", PRESET, REFERENCE, "≤ 1.1"),
]


def runs_on(key: str, size: str, dtype: str) -> bool:
    sizes, dtypes = ONLY.get(key, ((size,), (dtype,)))
    return size in sizes and dtype in dtypes


def acceptance(cases: Mapping[tuple[str, str], Case]) -> list[dict[str, Any]]:
    """The targets as measured: shares of the bandwidth, ratios of times. Those whose rows did not run are left out."""
    names = {row.key: row.name for row in ROWS}
    found = []
    for size, dtype, key, against, target in TARGETS:
        case = cases.get((size, dtype))
        result = case and case.result(key)
        if against == BANDWIDTH:
            measured = case.share(result) if result else None
            what = f"{names[key]}, share of the {BANDWIDTH}"
        else:
            measured = case.against(result, against) if result else None
            what = f"{names[key]} / {names[against]}"
        if measured is not None:
            found.append({"what": f"{case.title}, {dtype}: {what}", "measured": measured, "target": target})
    return found


def draw(
    cases: Sequence[Case],
    path: Path,
    subtitle: str,
    shown: Sequence[str] = PICTURED,
    ours: Sequence[str] = KERNELS,
    unit: str = OURS,
) -> None:
    """Times of a step as multiples of PACE's, for three cases of the first one's format: one panel each, and in them
    the rows with these keys, the fastest of the first panel on top. `ours`: the keys of those that run pace_kernels."""
    import plots

    cases = [case for case in cases if case.dtype == cases[0].dtype][:3]
    names = {result.row.key: result.row.name for case in cases for result in case.results}
    times = [{result.row.key: case.against(result, unit) for result in case.results} for case in cases]
    known = {key: next(filter(None, (found.get(key) for found in times)), None) for key in shown}
    rows = sorted((key for key in shown if known[key]), key=lambda key: known[key] or 0.0)
    figure, panels = plots.new_figure([4.8] + [3.2] * (len(cases) - 1), height=1.5 + 0.25 * len(rows))
    longest = min(LONGEST_BAR, max((found.get(key) or 0.0 for found in times for key in rows), default=1.0))
    for axes, case, found in zip(panels, cases, times, strict=True):
        plots.bars(axes, [(names[key], found.get(key), key in ours) for key in rows], longest)
        axes.set_title(f"{case.title}, {str(case.dtype).removeprefix('torch.')}")
        axes.set_xlabel("time of a step, × PACE's")
        axes.axvline(1.0, color=plots.INK, linewidth=0.8)
        axes.tick_params(labelleft=axes is panels[0])
    figure.suptitle(
        f"Blue: pace_kernels. Grey: others. A shorter bar is a faster step; 1 is PACE.\n{subtitle}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    plots.save(figure, path, colors=12)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: names of these, with commas between."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return chosen

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    keys = [row.key for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=some_of(list(SIZES)), default=list(SIZES), help=f"of {','.join(SIZES)}")
    parser.add_argument("--dtypes", type=some_of(["float32", "bfloat16", "float16"]), default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=some_of(keys), help=f"of {','.join(keys)} (default: all)")
    parser.add_argument("--rounds", type=int, help="samples of each row; slow rows get fewer (default: 21)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of step.json and step.webp")
    parser.add_argument("--host", action="store_true", help="what a step costs on the host instead (host.py)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, 3 rounds, no torch.compile: a test, no numbers"
    )
    arguments = parser.parse_args(argv)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 21)
    arguments.rows = arguments.rows or [key for key in keys if not (arguments.quick and key == "pace-compile")]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.host:
        host.main(arguments.out, quick=arguments.quick)
        return
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = machine(device) | describe()
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about['cpu_isa'] or about['isa']}"
    print(f"{where}, torch {about['torch']}, {about['date']}", flush=True)

    walk = ColdWalk(device, 2**20 if arguments.quick else None)
    probe = BandwidthProbe(device, 2**16) if arguments.quick else BandwidthProbe(device)
    rows = [row for row in ROWS if row.key in arguments.rows]
    cases: dict[tuple[str, str], Case] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that compile times are those of a first run
        for dtype in arguments.dtypes:
            for size in arguments.sizes:
                title, shapes = (QUICK_SIZES if arguments.quick else SIZES)[size]
                cases[size, dtype] = case = measure(
                    title,
                    [row for row in rows if runs_on(row.key, size, dtype)],
                    shapes,
                    getattr(torch, dtype),
                    device,
                    rounds=arguments.rounds,
                    walk=walk,
                    probe=probe,
                    anchors=(OURS, MADA, REFERENCE),
                )
                print(f"\n{table(case, {REFERENCE: '/ AdamW fused', OURS: '/ PACE'})}", flush=True)

    print()
    for row in rows:
        if row.note:
            print(f"{row.name}: {row.note}")
    reached = acceptance(cases)
    if reached:
        print("\nMeasured (target)" + (", on sizes too small to mean anything:" if arguments.quick else ":"))
    for line in reached:
        print(f"  {line['what']}: {line['measured']:.2f} ({line['target']})")
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "machine": about,
        "quick": arguments.quick,
        "rounds": arguments.rounds,
        "cases": [as_json(case) for case in cases.values()],
        "acceptance": reached,
    }
    save(numbers, arguments.out / "step.json")
    draw(list(cases.values()), arguments.out / "step.webp", f"{where}, torch {about['torch']}")
    print(f"\n{arguments.out / 'step.json'} and {arguments.out / 'step.webp'} written")


if __name__ == "__main__":
    main()
