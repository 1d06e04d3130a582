"""Made the files format0-*.pt, with the package as it was at commit f84b320, whose checkpoints have no format version:

    git worktree add ../format0 f84b320 && cd ../format0
    PACE_CUDA=0 python setup.py build_ext --inplace
    PYTHONPATH=. python ../pace_kernels/tests/data/make_format0.py OUT

Each has a model and an optimizer after 4 steps, saved, and the weights and states after 3 more, that a training which
goes on from the file has to end with. By the CPU's kernels, which give the same bits on every processor.

Since then the average is e + w (x₊ − e), where it was (1 − w) e + w x₊, and the ends with an average have other bits.
`python make_format0.py FILES`, with the package of today, writes "ends" anew, from what is saved, which it leaves as it
is; and keeps those of f84b320 under "ends_of_old", from which today's differ by roundings alone.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

INSIDE = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7, "hyper_warmup": 2, "hyper_lr": 0.01}
# The class, its options, those of the second group, and whether it is saved with the average swapped in.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "pace": ("PACE", {}, {"lr": 0.05, "betas": (0.0, 0.9)}, False),
    "pace-swapped": ("PACE", {"lambda_pullback": 2.0}, {}, True),
    "mada": ("MADA", INSIDE, {"weight_decay": 0.0}, False),
    "mada-pulled-swapped": ("MADA", {**INSIDE, "lambda_pullback": 2.0, "use_ema_eval": True}, {}, True),
    "mada-by-group": (
        "MADA",
        {**INSIDE, "coefficients": "group", "second_moment": "max"},
        {"learn": ("beta1",)},
        False,
    ),
    "adan": ("MADA", {"beta3": 0.92, "rho": 1.0, "learn": ()}, {}, False),
}
DTYPES = [torch.float32, torch.bfloat16]


def model_of(dtype: torch.dtype) -> torch.nn.Module:
    """Without torch's random numbers, which may differ between versions."""
    model = torch.nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(1.0, p.numel() + 1).reshape(p.shape) / 7)
    return model


def optimizer_of(package: Any, case: str, model: Any) -> Any:
    kind, options, second, _ = CASES[case]
    groups = [{"params": [model.weight]}, {"params": [model.bias], **second}]
    return getattr(package, kind)(groups, lr=0.02, backend="cpu", **options)


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        for p in model.parameters():
            n = torch.arange(1, p.numel() + 1, dtype=torch.int64)
            p.grad = (((n * 7919 + t * 104729) % 1009).reshape(p.shape).double() / 504.5 - 1).to(p.dtype)
        optimizer.step()


def ends(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    states = [dict(optimizer.state[p]) for p in model.parameters()]
    learned = [g.get("coefficient_values") for g in optimizer.param_groups]
    return {"model": model.state_dict(), "states": states, "learned": learned}


def write_ends_anew(file: Path) -> None:
    import pace_kernels

    made = torch.load(file, weights_only=True)
    for dtype in DTYPES:
        entry = made[str(dtype)]
        if "ends_of_old" not in entry:
            entry["ends_of_old"] = entry["ends"]
        model = model_of(dtype)
        optimizer = optimizer_of(pace_kernels, file.stem.split("-", 1)[1], model)
        model.load_state_dict(entry["saved"]["model"])
        optimizer.load_state_dict(copy.deepcopy(entry["saved"]["optimizer"]))
        optimizer.train()
        train(model, optimizer, range(4, 7))
        entry["ends"] = copy.deepcopy(ends(model, optimizer))
    torch.save(made, file)


if __name__ == "__main__":
    import pace_kernels

    if Path(sys.argv[1]).suffix:
        for name in sys.argv[1:]:
            write_ends_anew(Path(name))
        sys.exit()
    for case in CASES:
        made = {}
        for dtype in DTYPES:
            model = model_of(dtype)
            optimizer = optimizer_of(pace_kernels, case, model)
            train(model, optimizer, range(4))
            if CASES[case][3]:
                optimizer.eval()
            saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            assert "format_version" not in saved["optimizer"]["param_groups"][0]
            optimizer.train()
            train(model, optimizer, range(4, 7))
            made[str(dtype)] = {"saved": saved, "ends": copy.deepcopy(ends(model, optimizer))}
        torch.save(made, Path(sys.argv[1]) / f"format0-{case}.pt")
