"""A few steps of everything on small tensors, to be run under compute-sanitizer: python sanitized.py BACKEND.

Steps are slowed down by it 10 to 100 times. What is checked is addressing and races, so every kind of kernel runs on
lengths that leave a rest, layouts that are not contiguous, and more than one block; what they compute is tested
elsewhere.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from pace_kernels import MADA, PACE, Pullback


def pulled(params: list[torch.nn.Parameter], backend: str, capturable: bool) -> Pullback:
    base = torch.optim.AdamW(params, capturable=capturable and params[0].is_cuda)  # torch's is for GPUs alone
    return Pullback(base, backend=backend, log_stats=True)


RUNS: list[tuple[Any, dict[str, Any]]] = [
    (PACE, {"log_stats": True}),
    (PACE, {"capturable": True, "ema_update_freq": 2}),
    (MADA, {"hyper_warmup": 0}),
    (MADA, {"hyper_warmup": 0, "capturable": True, "lambda_pullback": 1.0, "use_ema_eval": True}),
    (MADA, {"learn": (), "beta3": 0.0, "rho": 1.0}),
    (pulled, {"capturable": False}),
    (pulled, {"capturable": True}),
]


def run(backend: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for build, options in RUNS:
            views = [torch.rand(20_003)[1:], torch.rand(37, 53).t(), torch.rand(()), torch.rand(0, 4), torch.rand(7)]
            params = [torch.nn.Parameter(view.to(device, dtype)) for view in views]
            optimizer = build(params, backend=backend, **options)
            for _ in range(3):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            if build is not MADA:
                optimizer.get_step_stats()
                optimizer.eval()
                optimizer.train()


if __name__ == "__main__":
    run(sys.argv[1], torch.device(sys.argv[2] if len(sys.argv) > 2 else "cuda"))
