"""The model on paper: the least time that a step can take, from its bytes and a GPU's published memory bandwidth.

    time ≥ bytes a parameter × parameters / bandwidth

What it prints is a BOUND. Nothing was measured: the bytes come from the accounting of `harness.py` (each operand read
once, each changed operand written once; an optimizer of several passes pays for each pass), the bandwidths from data
sheets. A data sheet's bandwidth is the memory's peak; kernels that do nothing but copy reach less of it, which is why
`gpu.py` measures a copy beside every row. Launches, host time and caches are not in the model: steps of small models,
whose tensors fit into a GPU's L2, are not described by it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from baselines import EagerPACE
from bench_step import adamw_held, adamw_moved, mada_held, mada_moved, pace_held, pace_moved, preset_held, preset_moved
from harness import count, held_bytes, itemsize, moved_bytes, tensors_in
from shapes import gpt2, llama
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

LABEL = "BOUND computed from published bandwidths, not a measurement"
DTYPES = (torch.float32, torch.bfloat16)
Bytes: TypeAlias = Callable[[torch.dtype], int]  # a parameter, given the parameters' format


@dataclass(frozen=True)
class Gpu:
    name: str
    gb_per_s: float  # 10^9 bytes a second
    memory_gb: float
    source: str


GPUS = [
    Gpu("A100 SXM 80GB", 2039, 80, "NVIDIA A100 Tensor Core GPU data sheet: 2,039 GB/s, 80 GB HBM2e"),
    Gpu("H100 SXM", 3350, 80, "NVIDIA H100 Tensor Core GPU data sheet: 3.35 TB/s, 80 GB HBM3"),
    Gpu("H200 SXM", 4800, 141, "NVIDIA H200 Tensor Core GPU data sheet: 4.8 TB/s, 141 GB HBM3e"),
    Gpu("B200", 8000, 180, "NVIDIA DGX B200 data sheet, an eighth of 64 TB/s, 1,440 GB; HGX B200 also has 7.7 TB/s"),
    Gpu("MI300X", 5300, 192, "AMD Instinct MI300X data sheet: 5.3 TB/s, 192 GB HBM3"),
]  # fmt: skip

SIZES = {
    "124M": gpt2(),
    "1.7B": llama(vocabulary=49152, layers=24, width=2048, hidden=8192),
    "7B": llama(vocabulary=32000, layers=32, width=4096, hidden=11008, tied=False),
}


# ---- bytes ----


class CountBytes(TorchDispatchMode):
    """Bytes that eager operations move: each reads its tensors once, and writes its results once.

    Only numbers of more than one element count.
    """

    # Operations that read nothing of the tensor that they write.
    OVERWRITE = ("aten.copy_", "aten.fill_", "aten.zero_")
    # Operations whose schema says that they write what they only do with a gradient scale.
    READ_ONLY = {"aten._fused_adamw_": ("grads",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.inplace_view in func.tags or func.is_view:
            return out
        name = str(func.overloadpacket)
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            mutated = mutated and argument.name not in self.READ_ONLY.get(name, ())
            if not (mutated and name in self.OVERWRITE):
                read |= self.sizes(value)
            if mutated:
                written |= self.sizes(value)
        if not any(r.alias_info is not None for r in func._schema.returns) and "empty" not in name:
            written |= self.sizes([out])
        self.nbytes += sum(read.values()) + sum(written.values())
        return out

    @staticmethod
    def sizes(value: Any) -> dict[int, int]:
        return {t.data_ptr(): t.numel() * t.element_size() for t in tensors_in(value) if t.numel() > 1}


def counted(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Bytes:
    """Bytes a parameter that a step of a plain torch optimizer moves, counted operation by operation."""

    def moved(dtype: torch.dtype) -> int:
        n = 4096
        param = nn.Parameter(torch.ones(n, dtype=dtype))
        param.grad = torch.ones_like(param)
        optimizer = build([param])
        optimizer.step()  # creates the states
        with CountBytes() as mode:
            optimizer.step()
        return round(mode.nbytes / n)

    return moved


def ema_pass(dtype: torch.dtype) -> int:
    """An average in the weights' format, in a pass of its own: weights and average read, average written."""
    return 3 * itemsize(dtype)


@dataclass(frozen=True)
class Step:
    """An optimizer's step: bytes moved, and bytes held as states."""

    name: str
    moved: Bytes
    held: Bytes


def one_pass(states: int, read_only: int = 0) -> tuple[Bytes, Bytes]:
    """`moved` and `held` of a pass over float32 states; all that are moved are held."""
    return (
        lambda dtype: moved_bytes(dtype, states, read_only=read_only),
        lambda dtype: held_bytes(dtype, states + read_only),
    )


STEPS = [
    Step("PACE", pace_moved, pace_held),
    Step("PACE, average at rest", *one_pass(2, read_only=1)),
    Step("PACE without average", *one_pass(2)),
    Step("MADA, all six learned", mada_moved, mada_held),
    Step("MADA, hyperadam", *one_pass(3)),  # m, v̄, the last gradient
    Step("MADA, adamw or yogi", preset_moved, preset_held),
    Step("MADA, avgrad or amsgrad", *one_pass(3)),  # m, v̄, ṽ
    Step("MADA, adan", *one_pass(4)),  # m, n, v̄, the last gradient
    Step("MADA, lion", *one_pass(1)),
    Step("AdamW fused", adamw_moved, adamw_held),
    Step(
        "AdamW fused + EMA, two passes",
        lambda dtype: adamw_moved(dtype) + ema_pass(dtype),
        lambda dtype: held_bytes(dtype, states=3, state_dtype=None),
    ),
    Step("AdamW for-loop", counted(lambda params: AdamW(params, foreach=False)), adamw_held),
    Step("PACE, eager torch", counted(EagerPACE), pace_held),
]

UNPICTURED = ("PACE, average at rest", "MADA, hyperadam", "AdamW for-loop")  # so that ten are left
OTHERS = ("AdamW", "PACE, eager torch")  # how their names begin


# ---- the table ----


def bounds(dtype: torch.dtype) -> list[dict[str, Any]]:
    """For each step and size: bytes, and for each GPU the least milliseconds, None where it does not fit."""
    rows = []
    for step in STEPS:
        moved, held = step.moved(dtype), step.held(dtype)
        for size, shapes in SIZES.items():
            n = sum(map(count, shapes))
            resident = n * (2 * itemsize(dtype) + held) / 1e9  # weights, gradients, states
            times = {g.name: 1e-6 * n * moved / g.gb_per_s if resident <= g.memory_gb else None for g in GPUS}
            rows.append(
                {
                    "optimizer": step.name,
                    "size": size,
                    "parameters": n,
                    "bytes_per_parameter": moved,
                    "state_bytes_per_parameter": held,
                    "resident_gb": resident,
                    "bound_ms": times,
                }
            )
    return rows


def table(dtype: torch.dtype) -> str:
    heads = ["", "B/param", "size", "GB held", *(g.name for g in GPUS)]
    lines = [heads]
    for row in bounds(dtype):
        first = row["size"] == next(iter(SIZES))
        times = ["–" if ms is None else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" for ms in row["bound_ms"].values()]
        name, moved = (row["optimizer"], f"{row['bytes_per_parameter']}") if first else ("", "")
        lines.append([name, moved, row["size"], f"{row['resident_gb']:.1f}", *times])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = [f"{LABEL}: ms a step at least, {str(dtype).removeprefix('torch.')} parameters; –: does not fit"]
    for line in lines:
        padded = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def draw(path: Path) -> None:
    """The bounds as multiples of PACE's, a panel a format. They are the same for every size and GPU."""
    import plots

    steps = sorted((s for s in STEPS if s.name not in UNPICTURED), key=lambda s: s.moved(torch.float32))
    figure, panels = plots.new_figure([6.2, 4.2], 1.6 + 0.25 * len(steps))
    for axes, dtype in zip(panels, DTYPES, strict=True):
        rows = [(s.name, s.moved(dtype) / pace_moved(dtype), not s.name.startswith(OTHERS)) for s in steps]
        plots.bars(axes, rows, max(multiple for _, multiple, _ in rows))
        axes.set(title=str(dtype).removeprefix("torch."), xlabel="least time of a step, × PACE's")
        axes.tick_params(labelleft=axes is panels[0])
    figure.suptitle(
        f"{LABEL}.\nBlue: pace_kernels. The bytes that a step must move, over those of PACE.",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    plots.save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the bounds to this file too")
    parser.add_argument("--png", type=Path, help="draw them as multiples of PACE's into this file (needs matplotlib)")
    arguments = parser.parse_args(argv)
    for dtype in DTYPES:
        print(f"{table(dtype)}\n")
    print("Published bandwidths:")
    for gpu in GPUS:
        print(f"  {gpu.name}: {gpu.gb_per_s:,.0f} GB/s. {gpu.source}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {
            "label": LABEL,
            "gpus": [asdict(gpu) for gpu in GPUS],
            "bounds": {str(dtype).removeprefix("torch."): bounds(dtype) for dtype in DTYPES},
        }
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if arguments.png:
        draw(arguments.png)


if __name__ == "__main__":
    main()
