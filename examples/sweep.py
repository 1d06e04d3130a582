"""A sweep of lr and lambda_pullback, judged by the average."""

import argparse
from itertools import product

import torch

from pace_kernels import PACE

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=500)
steps = parser.parse_args().steps

torch.manual_seed(0)
x, held_out = torch.randn(2, 1024, 8)


def wanted(x):
    return (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)


def loss_of(lr, pull):
    torch.manual_seed(1)  # the same weights and batches for all
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    optimizer = PACE(model.parameters(), lr=lr, lambda_pullback=pull)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (32,))]
        optimizer.zero_grad()
        (model(batch) - wanted(batch) - torch.randn(32, 1)).square().mean().backward()
        optimizer.step()
    with optimizer.averaged(model), torch.no_grad():
        return (model(held_out) - wanted(held_out)).square().mean().item()


results = [(loss_of(lr, pull), lr, pull) for lr, pull in product([1e-3, 3e-3, 1e-2], [0.0, 0.15, 1.0, 5.0])]
for loss, lr, pull in sorted(results):
    print(f"loss {loss:.4f}  lr {lr}  lambda_pullback {pull}")
