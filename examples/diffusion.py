"""A diffusion model of points on a spiral, evaluated with the average of its weights. PACE keeps it like the usual EMA
of such trainings: no pull, and a constant averaging weight."""

import argparse
import math

import torch

from pace_kernels import PACE

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=3000)
steps = parser.parse_args().steps

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU())
model.append(torch.nn.Linear(128, 2))
optimizer = PACE(model.parameters(), lr=5e-3, lambda_pullback=0, ema_kappa=None, beta_ema=0.01)


def loss_of(count):
    """The mean squared error of the model's noise in noisy points, at random levels."""
    turn, level, noise = torch.rand(count, 1).sqrt() * 3 * math.pi, torch.rand(count, 1), torch.randn(count, 2)
    points = torch.cat([turn.cos(), turn.sin()], 1) * turn / 6
    angle = level * math.pi / 2
    noisy = angle.cos() * points + angle.sin() * noise
    return (model(torch.cat([noisy, level], 1)) - noise).square().mean()


@torch.no_grad()
def evaluate():
    torch.manual_seed(1)
    return loss_of(50_000).item()


for _ in range(steps):
    optimizer.zero_grad()
    loss_of(128).backward()
    optimizer.step()
live = evaluate()
with optimizer.averaged(model):
    print(f"loss {live:.4f} live, {evaluate():.4f} averaged")
