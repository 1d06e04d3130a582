"""A training loop like nanoGPT's, with AdamW. `git apply examples/loop.diff` switches it to PACE: four lines, which
also evaluate and save the average."""

import argparse
from pathlib import Path

import torch
from gpt import GPT, GPTConfig

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
steps = parser.parse_args().steps

torch.manual_seed(0)
data = torch.tensor(list(Path(__file__).with_name("train_lm.py").read_bytes()))
model = GPT(GPTConfig(context=64, layers=2, width=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)


def get_batch(part):
    at = torch.randint(len(part) - 65, (16,))
    rows = torch.stack([part[i : i + 65] for i in at])
    return rows[:, :-1], rows[:, 1:]


def loss_of(part):
    x, y = get_batch(part)
    return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
for step in range(1, steps + 1):
    optimizer.zero_grad()
    loss_of(train).backward()
    optimizer.step()
    if step % 50 == 0 or step == steps:
        with torch.no_grad():
            print(step, f"{sum(loss_of(held_out).item() for _ in range(4)) / 4:.3f}")
torch.save(model.state_dict(), "model.pt")
