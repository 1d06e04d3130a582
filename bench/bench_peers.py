"""How fast is a step beside the optimizers that others publish? What `make bench-peers` runs, on the CPU.

Every peer takes part in the same interleaved rounds as our own optimizers; `harness.py` says how. Each is compared with
the one of ours that computes the same rule, or with PACE where none does. A peer that cannot be installed or does not
run is a row with the reason. What was measured is in `peers.json`, complete after every case: a second run measures
only what is missing. What is printed and `peers.webp` are made from that file alone.

All contenders of a case share weights and gradients. So the first step of each is checked: it must move the weights and
leave the gradients alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import bench_step
import torch
from bench_step import AUTOGRAD, MADA, OURS, PRESET, REFERENCE, draw, optimizer, some_of
from harness import (
    MIN_ROUNDS,
    BandwidthProbe,
    Case,
    ColdWalk,
    Contender,
    Row,
    Watch,
    as_json,
    fill_,
    from_json,
    heading,
    held_bytes,
    in_short,
    itemsize,
    load,
    machine,
    markdown_table,
    measure,
    moved_bytes,
    packed,
    quartiles,
    ratio,
    save,
)
from shapes import gpt2
from torch import Tensor, nn
from torch.optim import AdamW

import pace_kernels
from pace_kernels.backend import describe

LION, ADAN, YOGI = "mada-lion", "mada-adan", "mada-yogi"
SCHEDULE_FREE = "schedule-free"
# What install_peers.py left beside the packages.
REASONS = Path(sys.prefix, "peers.json")
BUILT = Path(sys.prefix, "torch_extensions")
# AdamW's default. That of some peers is 0, and a step without decay is another, shorter one.
DECAY = 0.01


@dataclass(frozen=True)
class Peer(Row):
    ours: str = ""  # key of the row that it is compared with
    package: str = ""  # the distribution that it comes from, where that is not torch
    module: str = ""  # what to import of it


# ---- contenders ----

Make = Callable[[list[nn.Parameter]], Contender]


def known(key: str, ours: str = "", **changes: Any) -> Peer:
    """The row of bench_step.py."""
    (row,) = (row for row in bench_step.ROWS if row.key == key)
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(Row)}
    return Peer(**fields | changes, ours=ours)


def checked(make: Make) -> Make:
    """`make` whose first step raises if it leaves the weights alone, or changes the gradients, which are shared."""

    def build(parameters: list[nn.Parameter]) -> Contender:
        contender = make(parameters)
        step, largest = contender.step, max(parameters, key=nn.Parameter.numel)

        def some(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1)[:256].clone()

        def first() -> None:
            contender.step = step  # what is timed from now on
            # Small, so that a step shows in bfloat16 as well: at 0.5, where others may have moved them, it rounds away.
            largest.detach().view(-1)[:256].fill_(0.01)
            gradients, gradient, weights = [p.grad for p in parameters], some(largest.grad), some(largest)
            step()
            dropped = any(p.grad is not g for p, g in zip(parameters, gradients, strict=True))
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            if dropped or not torch.equal(some(largest.grad), gradient):
                for g in gradients:  # the other rows go on with what they were promised
                    fill_(g).mul_(0.1)
                raise RuntimeError("a step drops or changes the gradients, so that it cannot take turns with others")
            if torch.equal(some(largest), weights):
                raise RuntimeError("a step does not move the weights")

        contender.step = first
        return contender

    return build


def with_gradients_of_its_own(make: Make) -> Make:
    """For steps that use the gradients as scratch memory. They get them afresh before each step, which is not timed;
    hanging them in is, and takes microseconds."""

    def build(parameters: list[nn.Parameter]) -> Contender:
        contender = make(parameters)
        step, own = contender.step, [torch.empty_like(p.grad) for p in parameters]

        def prepare() -> None:
            for p, g in zip(parameters, own, strict=True):
                g.copy_(p.grad)

        def with_own() -> None:
            shared = [p.grad for p in parameters]
            for p, g in zip(parameters, own, strict=True):
                p.grad = g
            try:
                step()
            finally:
                for p, g in zip(parameters, shared, strict=True):
                    p.grad = g

        return Contender(with_own, contender.state, prepare)

    return build


@contextmanager
def without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A deep copy of a parameter has a copy of its gradient. Where a model is copied before training, there is none."""
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g


def before_training(make: Make) -> Make:
    def build(parameters: list[nn.Parameter]) -> Contender:
        with without_gradients(parameters):
            return make(parameters)

    return build


def of(module: str, name: str, **options: Any) -> Make:
    """The optimizer `name`, looked up when it is built, so that a package that lacks it is a row with the reason."""

    def make(parameters: list[nn.Parameter]) -> Contender:
        build = getattr(importlib.import_module(module), name)
        return optimizer(build, **options)(parameters)

    return make


def schedule_free(parameters: list[nn.Parameter]) -> Contender:
    made = importlib.import_module("schedulefree").AdamWScheduleFree(
        parameters, lr=1e-3, weight_decay=DECAY, foreach=True
    )
    made.train()
    return Contender(made.step, lambda: made.state)


def heavyball_adamw(parameters: list[nn.Parameter]) -> Contender:
    made = importlib.import_module("heavyball").AdamW(parameters, lr=1e-3, weight_decay=DECAY, consume_grad=False)
    return Contender(made.step, lambda: made.state)


def adamw_and_ema_pytorch(parameters: list[nn.Parameter]) -> Contender:
    model = nn.ParameterList(parameters)
    adamw = AdamW(parameters, lr=1e-3, fused=True)
    averaged = importlib.import_module("ema_pytorch").EMA(
        model, beta=0.99, update_after_step=0, update_every=1, include_online_model=False, use_foreach=True
    )

    def step() -> None:
        adamw.step()
        averaged.update()

    return Contender(step, lambda: [adamw.state, *averaged.ema_model.parameters(), *averaged.buffers()])


def deepspeed_adam(parameters: list[nn.Parameter]) -> Contender:
    made = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(parameters, lr=1e-3, weight_decay=DECAY)
    return Contender(made.step, lambda: made.state)


def moves(states: int, *, float32: bool = False) -> dict[str, Any]:
    """What a step must move and hold: that many states in the parameters' format, or in float32."""
    state_dtype = torch.float32 if float32 else None
    return {
        "moved": partial(moved_bytes, states=states, state_dtype=state_dtype),
        "held": partial(held_bytes, states=states, state_dtype=state_dtype),
    }


def moves_quantized(states: int, bits: int) -> dict[str, Any]:
    """The same with states of a few bits, scales aside."""
    return {
        "moved": lambda dtype: moved_bytes(dtype, states=0) + 2 * states * bits // 8,
        "held": lambda dtype: 1 + states * bits // 8,
    }


TORCHAO = "torchao.optim"
POPT = {"package": "pytorch_optimizer", "module": "pytorch_optimizer"}


def popt(name: str, states: int, ours: str, note: str, **options: Any) -> Peer:
    """One of pytorch_optimizer's, in its foreach form."""
    make = of("pytorch_optimizer", name, lr=1e-3, foreach=True, weight_decay=DECAY, **options)
    note = f"foreach, states in the parameters' format; {note}"
    key, title = f"popt-{name.lower()}", f"pytorch_optimizer {name}"
    return Peer(key, title, make, **moves(states), scratch=24, note=note, ours=ours, **POPT)


def preset(name: str, states: int, note: str) -> Peer:
    make = optimizer(partial(pace_kernels.MADA.preset, name))
    return Peer(f"mada-{name}", f'MADA, preset "{name}"', make, **moves(states, float32=True), note=note)


NO_AVERAGE = "no average of the weights and no pullback"


def quantized(bits: int) -> str:
    return f"{NO_AVERAGE}; states of {bits} bits for tensors from 4,096 elements, so its steps are not quite AdamW's"


ROWS = [
    known(OURS, note="AdamW, average and clipped pullback in one pass over memory"),
    known("pace-stats", note="and the sums of its telemetry in the same pass"),
    known("pullback-adamw", note="the average and the clipped pullback in a pass of their own after AdamW's step"),
    known("pullback-adamw-0", note="the average alone, in a pass of its own"),
    known(MADA, note="all six coefficients learned; no average"),
    known(PRESET),
    Peer(
        SCHEDULE_FREE,
        "ScheduleFreeAdamW",
        optimizer(pace_kernels.ScheduleFreeAdamW, lr=1e-3, weight_decay=DECAY),
        **moves(2, float32=True),
        note="z and the second moment in float32; the average is worked out of weights and z by eval()",
    ),
    preset("lion", 1, "Lion by MADA's kernel, states in float32"),
    preset("adan", 4, "Adan by MADA's kernel, states in float32"),
    preset("yogi", 2, "Yogi by MADA's kernel, states in float32"),
    known(REFERENCE, PRESET, note=f"{NO_AVERAGE}; states in the parameters' format"),
    known("adamw-foreach", PRESET, note=f"{NO_AVERAGE}; states in the parameters' format"),
    known(
        "adamw-ema",
        OURS,
        name="AdamW fused + AveragedModel",
        note="the average by a second pass over memory, in the parameters' format (torch.optim.swa_utils, foreach); "
        "no pullback",
    ),
    known(
        "adamw-ema-loop",
        OURS,
        name="AdamW fused + AveragedModel, for-loop",
        scratch_of_one=12,
        note="the same, tensor by tensor; no pullback",
    ),
    Peer(
        "adamw-ema-pytorch",
        "AdamW fused + ema-pytorch",
        adamw_and_ema_pytorch,
        **moves(3),
        scratch=4,
        note="the average by a second pass over memory, in the parameters' format (foreach, after every step); "
        "no pullback",
        ours=OURS,
        package="ema-pytorch",
        module="ema_pytorch",
    ),
    Peer(
        "deepspeed",
        "DeepSpeed CPUAdam",
        deepspeed_adam,
        **moves(2, float32=True),
        note=f"{NO_AVERAGE}; AdamW in C++, one tensor at a time, states in float32; compiled for this CPU when "
        "it is installed",
        ours=PRESET,
        package="deepspeed",
        module="deepspeed.ops.adam",
    ),
    Peer(
        "torchao-8bit",
        "torchao AdamW8bit",
        of(TORCHAO, "AdamW8bit", lr=1e-3),
        **moves_quantized(2, 8),
        scratch=12,
        compiles=True,
        note=f"{quantized(8)}; one compiled graph for each shape",
        ours=PRESET,
        package="torchao",
        module=TORCHAO,
    ),
    Peer(
        "torchao-4bit",
        "torchao AdamW4bit",
        of(TORCHAO, "AdamW4bit", lr=1e-3),
        **moves_quantized(2, 4),
        scratch=12,
        compiles=True,
        note=f"{quantized(4)}; one compiled graph for each shape",
        ours=PRESET,
        package="torchao",
        module=TORCHAO,
    ),
    Peer(
        "bnb-8bit",
        "bitsandbytes AdamW8bit",
        of("bitsandbytes.optim", "AdamW8bit", lr=1e-3),
        **moves_quantized(2, 8),
        scratch_of_one=40,
        note=quantized(8),
        ours=PRESET,
        package="bitsandbytes",
        module="bitsandbytes.optim",
    ),
    Peer(
        "bnb-32bit",
        "bitsandbytes AdamW",
        of("bitsandbytes.optim", "AdamW", lr=1e-3),
        **moves(2, float32=True),
        scratch_of_one=32,
        note=f"{NO_AVERAGE}; states in float32",
        ours=PRESET,
        package="bitsandbytes",
        module="bitsandbytes.optim",
    ),
    Peer(
        "optimi",
        "optimi AdamW, for-loop",
        with_gradients_of_its_own(of("optimi", "AdamW", lr=1e-3, foreach=False, triton=False)),
        moved=lambda dtype: moved_bytes(dtype, states=2 + (itemsize(dtype) < 4), state_dtype=None),
        held=lambda dtype: held_bytes(dtype, states=3 + (itemsize(dtype) < 4), state_dtype=None),
        scratch_of_one=16,
        note=f"{NO_AVERAGE}; states in the parameters' format, in bfloat16 with Kahan summation, a third state; a step "
        "overwrites the gradients",
        ours=PRESET,
        package="torch-optimi",
        module="optimi",
    ),
    Peer(
        "optimi-foreach",
        "optimi AdamW, foreach",
        with_gradients_of_its_own(of("optimi", "AdamW", lr=1e-3, foreach=True, triton=False)),
        moved=lambda dtype: moved_bytes(dtype, states=2 + (itemsize(dtype) < 4), state_dtype=None),
        held=lambda dtype: held_bytes(dtype, states=3 + (itemsize(dtype) < 4), state_dtype=None),
        scratch=16,
        note=f"{NO_AVERAGE}; as the for-loop otherwise",
        ours=PRESET,
        package="torch-optimi",
        module="optimi",
    ),
    Peer(
        "schedulefree",
        "AdamWScheduleFree",
        with_gradients_of_its_own(schedule_free),
        moved=moves(2)["moved"],
        held=lambda dtype: held_bytes(dtype, states=3, state_dtype=None),  # with the gradients of its own
        scratch=16,
        note="keeps z and trains at an interpolation y of z and the average x, which it works out from y and z when "
        "asked (eval()): no first moment, and no array for the average, which is uniform at a constant learning rate; "
        "no clipped pullback; foreach, states in the parameters' format; a step overwrites the gradients",
        ours=SCHEDULE_FREE,
        package="schedulefree",
        module="schedulefree",
    ),
    Peer(
        "heavyball",
        "heavyball AdamW",
        heavyball_adamw,
        **moves(2, float32=True),
        scratch=24,
        compiles=True,
        note=f"{NO_AVERAGE}; compiled, states in float32, stochastic rounding of bfloat16 weights; consume_grad=False, "
        "so that it leaves the gradients to the others",
        ours=PRESET,
        package="heavyball",
        module="heavyball",
    ),
    popt("Lion", 1, LION, NO_AVERAGE),
    popt("Adan", 4, ADAN, NO_AVERAGE),
    popt("Yogi", 2, YOGI, NO_AVERAGE),
    popt("Grams", 2, OURS, f"another rule: Adam's step with the gradient's sign; {NO_AVERAGE}"),
    popt("Ano", 2, OURS, f"another rule: the gradient's size with the momentum's sign; {NO_AVERAGE}"),
    popt(
        "AdEMAMix",
        3,
        OURS,
        "another rule: a second, slower average, of gradients; no average of the weights and no pullback",
    ),
    known(
        "pace-eager",
        OURS,
        note="the same rule, one tensor at a time with in-place operations, states in float32 (baselines.py)",
    ),
    known(AUTOGRAD, MADA, scratch=68),  # as measured
]
OUR_KEYS = (OURS, "pace-stats", "pullback-adamw", "pullback-adamw-0", MADA, PRESET, SCHEDULE_FREE, LION, ADAN, YOGI)
PICTURED = (
    OURS,
    REFERENCE,
    "adamw-ema",
    "deepspeed",
    "schedulefree",
    "heavyball",
    "bnb-8bit",
    MADA,
    AUTOGRAD,
    "pullback-adamw",
)
COPIES_THE_MODEL = ("adamw-ema", "adamw-ema-loop", "adamw-ema-pytorch")
ONLY = bench_step.ONLY  # row -> sizes and formats, where that is not all of them


# ---- sizes ----

SIZES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "one": ("One tensor of 64 M", [(64 * 2**20,)]),
    "gpt2": ("GPT-2 124M", gpt2()),
}
QUICK_SIZES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "one": ("One tensor of 64 K", [(64 * 2**10,)]),
    "gpt2": ("A tiny GPT-2", gpt2(vocabulary=503, context=64, layers=2, width=64)),
}


# ---- what is there ----


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def prepare_deepspeed() -> None:
    """It compiles an operator, which install_peers.py has done, and calls ninja to see that."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if BUILT.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(BUILT))
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@cache
def why_not(package: str, module: str) -> str:
    """The reason why a peer cannot take part, or nothing. Where it was not installed, pip's."""
    reasons = json.loads(REASONS.read_text(encoding="utf-8")) if REASONS.exists() else {}
    if reasons.get(package):
        return f"{package} could not be installed: {reasons[package]}"
    if package == "deepspeed":
        prepare_deepspeed()
    try:
        importlib.import_module(module)
    except Exception as reason:
        if isinstance(reason, ModuleNotFoundError) and reason.name == module.partition(".")[0]:
            return f"{package} is not installed (make bench-peers installs it)"
        return f"{package} cannot be imported: {in_short(reason)}"
    return ""


def excluded(rows: Sequence[Peer], skip_compiled: bool) -> dict[str, str]:
    reasons = {row.key: why_not(row.package, row.module) for row in rows if row.package}
    if skip_compiled:
        reasons |= {
            row.key: "it compiles, which a quick run does not wait for"
            for row in rows
            if row.compiles and not reasons[row.key]
        }
    return {key: reason for key, reason in reasons.items() if reason}


# ---- results ----


def case_of(saved: Mapping[str, Any], numbers: Mapping[str, Any]) -> Case:
    """From what was saved alone, whatever rows there are by now."""
    _, shapes = (QUICK_SIZES if numbers["quick"] else SIZES)[saved["size"]]
    moved = {row["key"]: row.get("bytes_moved_per_parameter", 0) for row in saved["rows"]}

    def row(entry: Mapping[str, Any]) -> Row:
        key = entry["key"]
        return Row(key, entry["name"], bench_step.optimizer(AdamW), lambda dtype: moved[key], lambda dtype: 0)

    return from_json(saved, {entry["key"]: row(entry) for entry in numbers["rows"]}, shapes)


def cells(case: Case, against: Mapping[str, str]) -> list[list[str]]:
    """The case as rows of text. `against`: key -> key of the row of ours that it is compared with."""
    names = {result.row.key: result.row.name for result in case.results}
    lines = [
        ["", "ms", "quartiles", "ns/param", "PACE beside it, ms", "/ PACE", "compared with", "ratio"],
    ]
    lines[0] += ["quartiles of the ratio", "state B/param", "peak extra MB", "first step s", "rounds"]
    for result in case.results:
        if not result.samples:
            lines.append([result.row.name, "–"] + [""] * (len(lines[0]) - 2))
            continue
        low, middle, high = quartiles(result.samples)
        to_pace, pace = case.against(result, OURS), case.result(OURS)
        together = {} if pace is None else {k: v for k, v in pace.samples.items() if k in result.samples}
        line = [result.row.name, f"{1e3 * middle:.2f}", f"{1e3 * low:.2f} – {1e3 * high:.2f}"]
        line += [f"{1e9 * middle / case.numel:.3f}", f"{1e3 * quartiles(together)[1]:.2f}" if together else "–"]
        line += ["–" if to_pace is None else f"{to_pace:.2f}"]
        key = against.get(result.row.key, "")
        other = case.result(key)
        if other is None or len(result.samples.keys() & other.samples.keys()) < MIN_ROUNDS:
            line += [names.get(key, ""), "–" if key else "", ""]
        else:
            low, middle, high = ratio(result.samples, other.samples)
            line += [names[key], f"{middle:.2f}", f"{low:.2f} – {high:.2f}"]
        line += [f"{round(result.state_bytes / case.numel, 2):g}"]
        line += ["?" if result.peak_extra is None else f"{round(result.peak_extra / 1e6, 1):g}"]
        lines.append([*line, f"{result.first_step_s:.2f}", f"{len(result.samples)}"])
    return lines


def where(numbers: Mapping[str, Any]) -> str:
    about = numbers["machine"]
    return f"{about['cpu']}, {about['threads']} threads, {about['cpu_isa'] or about['isa']}, torch {about['torch']}"


def render(numbers: Mapping[str, Any]) -> str:
    """Markdown of what was saved."""
    against = {row["key"]: row["ours"] for row in numbers["rows"]}
    text = [where(numbers)]
    if numbers["quick"]:
        text.append("A quick run, on sizes too small to mean anything.")
    for saved in numbers["cases"]:
        case = case_of(saved, numbers)
        text += [f"{heading(case)}; {saved['date']}", markdown_table(cells(case, against))]
        missing = [f"- {r.row.name}: not measured, {r.missing}" for r in case.results if r.missing]
        text += ["\n".join(missing)] if missing else []
    versions = ", ".join(f"{name} {found}" for name, found in numbers["packages"].items() if found)
    text.append(f"Installed: {versions or 'none of the packages'}.")
    text.append(
        "Ratios are medians over the rounds that both were timed in, above 1 where ours is faster. Where not all rows "
        "fit into memory together, they take turns in several waves, PACE and those compared with others in each "
        "of them: a ratio is of the same minutes, and milliseconds of two rows may not be. PACE beside it is PACE's "
        "median in that row's rounds. "
        f"Weight decay: {numbers['weight_decay']}. State: the bytes of the tensors that the optimizer holds, "
        "counted after the run. Peak extra: what a step needs beyond that. First step: with the "
        "allocation of states, and with compilation where a row compiles."
    )
    shown = {row["key"] for saved in numbers["cases"] for row in saved["rows"]}
    noted = [row for row in numbers["rows"] if row["key"] in shown and row["note"]]
    text.append("\n".join(f"- {row['name']}: {row['note']}" for row in noted))
    return "\n\n".join(text)


def is_complete(saved: Mapping[str, Any], rows: Sequence[Peer], reasons: Mapping[str, str]) -> bool:
    """Whether the case has these rows, and none of them is missing that could run now."""
    return [row["key"] for row in saved["rows"]] == [row.key for row in rows] and saved["excluded"] == dict(reasons)


def settings(numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs must share to be one."""
    about = numbers["machine"]
    return (*(about[key] for key in ("cpu", "torch", "threads")), *(numbers[key] for key in ("quick", "rounds")))


def earlier(path: Path, numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases that an earlier run saved, if it was under the same settings and with the same packages."""
    if not path.exists() and not packed(path).exists():
        return []
    saved = load(path)
    same = settings(saved) == settings(numbers) and saved["packages"] == numbers["packages"]
    return saved["cases"] if same else []


# ---- the run ----


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    keys = [row.key for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=some_of(list(SIZES)), default=list(SIZES), help=f"of {','.join(SIZES)}")
    parser.add_argument("--dtypes", type=some_of(["float32", "bfloat16"]), default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=some_of(keys), help=f"of {','.join(keys)} (default: all)")
    parser.add_argument("--rounds", type=int, help="samples of each row; slow rows get fewer (default: 21)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of peers.json and .webp")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run left there")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, 3 rounds, nothing compiled: a test, no numbers"
    )
    arguments = parser.parse_args(argv)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 21)
    # Named rows run in a quick run as well, even if they compile for a minute.
    arguments.skip_compiled = arguments.quick and not arguments.rows
    arguments.rows = arguments.rows or keys
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    device = torch.device("cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = [row for row in ROWS if row.key in arguments.rows]
    reasons = excluded(chosen, arguments.skip_compiled)
    gc.collect()
    gc.freeze()  # the harness collects garbage before each row's peak: 0.4 s over the objects of all that is imported
    numbers: dict[str, Any] = {
        "machine": machine(device) | describe(),
        "quick": arguments.quick,
        "rounds": arguments.rounds,
        "weight_decay": f"{DECAY:g} or more in all rows",
        "packages": {name: version(name) for name in ("pace_kernels", *(row.package for row in ROWS)) if name},
        "rows": [{"key": row.key, "name": row.name, "ours": row.ours, "note": row.note} for row in ROWS],
        "cases": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "peers.json"
    old = {} if arguments.fresh else {(c["size"], c["dtype"]): c for c in earlier(path, numbers)}
    walk = ColdWalk(device, 2**20 if arguments.quick else None)
    probe = BandwidthProbe(device, 2**16) if arguments.quick else BandwidthProbe(device)
    with tempfile.TemporaryDirectory() as cache_dir:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache_dir  # empty, so that compile times are those of a first run
        for dtype in arguments.dtypes:
            for size in arguments.sizes:
                title, shapes = (QUICK_SIZES if arguments.quick else SIZES)[size]
                rows = [row for row in chosen if bench_step.runs_on(row.key, size, dtype)]
                here = {row.key: reasons[row.key] for row in rows if row.key in reasons}
                saved = old.pop((size, dtype), None)
                kept = saved is not None and is_complete(saved, rows, here)
                print(f"{title}, {dtype}: {'kept, ' + str(path) if kept else 'measuring'}", file=sys.stderr, flush=True)
                if not kept:
                    torch.compiler.reset()  # graphs of other shapes, in memory, would count toward recompilation limits
                    case = measure(
                        title,
                        [dataclasses.replace(row, make=guarded(row)) for row in rows],
                        shapes,
                        getattr(torch, dtype),
                        device,
                        rounds=arguments.rounds,
                        walk=walk,
                        probe=probe,
                        anchors=sorted({OURS, *(row.ours for row in rows if row.ours)}),
                        excluded=here,
                        watch=Watch(keep_going=True),
                    )
                    date = machine(device)["date"]
                    saved = as_json(case) | {"size": size, "excluded": here, "date": date}
                numbers["cases"].append(saved)
                save(numbers | {"cases": [*numbers["cases"], *old.values()]}, path)
    numbers = load(path)
    text = render(numbers)
    draw([case_of(c, numbers) for c in numbers["cases"]], path.with_suffix(".webp"), where(numbers), PICTURED, OUR_KEYS)
    print(text)


def guarded(row: Peer) -> Make:
    return checked(before_training(row.make) if row.key in COPIES_THE_MODEL else row.make)


if __name__ == "__main__":
    main()
