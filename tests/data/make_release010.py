"""Made the files release010-*.pt, with the package as it was at 0.1.0, commit 02fa833:

    git worktree add ../release010 02fa833 && cd ../release010
    PACE_CUDA=0 python setup.py build_ext --inplace
    PYTHONPATH=.:../pace_kernels/tests python ../pace_kernels/tests/data/make_release010.py OUT

The trainings are those of make_format0.py. Each file has, for each dtype, what was saved after 4 steps, "saved" by
state_dict() and "flat" by the helper of torch.distributed.checkpoint, and the weights and states after 3 more,
"ends_of_old". While swapped, 0.1.0 had traded float32 weights and averages: "live" is where the average was, "ema" the
memory of the weights.

Since then the average is e + w (x₊ − e), where it was (1 − w) e + w x₊. `python make_release010.py FILES`, with the
package of today, writes "ends" from what is saved. Where there is no average, they are the bits of "ends_of_old".
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from data.make_format0 import CASES, DTYPES, ends, model_of, optimizer_of, train, write_ends_anew

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

if __name__ == "__main__":
    if Path(sys.argv[1]).suffix:
        for name in sys.argv[1:]:
            write_ends_anew(Path(name))
        sys.exit()
    import pace_kernels

    for case in CASES:
        made = {}
        for dtype in DTYPES:
            model = model_of(dtype)
            optimizer = optimizer_of(pace_kernels, case, model)
            train(model, optimizer, range(4))
            if CASES[case][3]:
                optimizer.eval()
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved["flat"] = get_optimizer_state_dict(model, optimizer, options=FLAT)
            saved = copy.deepcopy(saved)
            assert saved["optimizer"]["param_groups"][0]["format_version"] == 1
            optimizer.train()
            train(model, optimizer, range(4, 7))
            made[str(dtype)] = {"saved": saved, "ends_of_old": copy.deepcopy(ends(model, optimizer))}
        torch.save(made, Path(sys.argv[1]) / f"release010-{case}.pt")
