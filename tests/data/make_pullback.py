"""Made the files pullback-*.pt, with the package as it was at commit 02fa833, version 0.1.0:

    git worktree add ../pullback-0.1.0 02fa833 && cd ../pullback-0.1.0
    PACE_CUDA=0 python setup.py build_ext --inplace
    PYTHONPATH=.:../pace_kernels/tests python ../pace_kernels/tests/data/make_pullback.py OUT

Each has a model and optimizer after 4 steps, saved, the averages at that time, and the weights after 3 more. In these
the averages rest (``ema_update_freq`` is 4): a later formula of the average does not change where these end.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from data.make_format0 import DTYPES, model_of, train
from data.make_release010 import FLAT

# The base, the options, those of the second group, and how it is saved: plain, swapped, or flat.
CASES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any], dict[str, Any], str]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.02), {"lambda_pullback": 3.0}, {"gain": 0.25}, "plain"),
    "adamw-swapped": (lambda p: torch.optim.AdamW(p, lr=0.02), {"lambda_pullback": 3.0}, {}, "swapped"),
    "adamw-flat": (lambda p: torch.optim.AdamW(p, lr=0.02), {"lambda_pullback": 3.0}, {}, "flat"),
    "momentum-flat": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"gain": 0.1}, {}, "flat"),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), {"gain": 0.1, "pullback_from": "step"}, {}, "plain"),
    "sgd-swapped": (lambda p: torch.optim.SGD(p, lr=0.1), {"gain": 0.1}, {"use_ema_eval": False}, "swapped"),
    "average": (lambda p: torch.optim.SGD(p, lr=0.1), {"lambda_pullback": 0.0}, {}, "plain"),
}


def optimizer_of(package: Any, case: str, model: Any) -> Any:
    base, options, second, _ = CASES[case]
    groups = [{"params": [model.weight]}, {"params": [model.bias], **second}]
    return package.Pullback(base(groups), ema_update_freq=4, backend="cpu", **options)


if __name__ == "__main__":
    import pace_kernels

    for case, (*_, how) in CASES.items():
        made = {}
        for dtype in DTYPES:
            model = model_of(dtype)
            optimizer = optimizer_of(pace_kernels, case, model)
            train(model, optimizer, range(4))
            averages = [optimizer.averager.state[p]["ema"].clone() for p in model.parameters()]
            if how == "swapped":
                optimizer.eval()
            state = (
                get_optimizer_state_dict(model, optimizer, options=FLAT) if how == "flat" else optimizer.state_dict()
            )
            saved = copy.deepcopy({"model": model.state_dict(), "optimizer": state})
            optimizer.train()
            train(model, optimizer, range(4, 7))
            ends = copy.deepcopy(model.state_dict())
            made[str(dtype)] = {"saved": saved, "averages": averages, "ends": ends}
        torch.save(made, Path(sys.argv[1]) / f"pullback-{case}.pt")
