"""torchrun --nproc_per_node 2 examples/fsdp2.py"""

import argparse

import torch
import torch.distributed as dist
from gpt import GPT, GPTConfig
from torch.distributed.fsdp import fully_shard

from pace_kernels import PACE, clip_coefficient

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
steps = parser.parse_args().steps

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
rank = dist.get_rank()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
mesh = dist.init_device_mesh(device, (dist.get_world_size(),))

torch.manual_seed(0)
model = GPT(GPTConfig(vocab=32, context=32, layers=2, width=64)).to(device)
for part in (*model.blocks, model):
    fully_shard(part, mesh=mesh)
optimizer = PACE(model.parameters(), lr=2e-3)
torch.manual_seed(rank)  # each rank has batches of its own


def loss_of(start):
    rows = (start + torch.arange(33, device=device)) * 7 % 32
    return torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


for _ in range(steps):
    optimizer.zero_grad()
    loss_of(torch.randint(32, (8, 1), device=device)).backward()
    coefficient, _ = clip_coefficient(model.parameters(), 1.0)
    optimizer.step(clip_coef=coefficient)
with optimizer.averaged(model), torch.no_grad():  # on all ranks
    loss = loss_of(torch.arange(32, device=device)[:, None])
weights = optimizer.ema_state_dict(model, full=True)  # on all ranks; rank 0 gets the weights
if rank == 0:
    print(f"loss of the average {loss.item():.3f}, {len(weights)} tensors to ship")
dist.destroy_process_group()
