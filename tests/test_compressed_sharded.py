"""Promise: compressed states have the same bits however their parameters are sharded, and are saved on any number of
ranks and loaded on any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from ranks import run
from test_compressed_others import KINDS
from test_sharded import mesh_of, steps, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from pace_kernels import PACE, master_state_dict

OPTIONS: list[dict[str, Any]] = [
    {"state_bits": 8, "master_weight_bits": 32},
    {"state_bits": 8, "ema_bits": 24, "master_weight_bits": 24},
    {"state_bits": 16, "ema_bits": 16, "stochastic_rounding": True},
]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def net() -> nn.Sequential:
    """Rows of 65 and 130: no number of ranks but 1 gets equal shares."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 130), nn.Linear(32, 130), nn.Embedding(3, 2048)).bfloat16()


def sharded(layout: str = "fsdp") -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, mesh = net(), mesh_of(layout)
    if layout == "tensor parallel":
        # The first is cut within its rows, 64 = 2 · 32; the third too, whose 32 can't be: its states are float32.
        parallelize_module(
            model, mesh["tensor"], {"0": RowwiseParallel(), "1": ColwiseParallel(), "2": RowwiseParallel()}
        )
        mesh = mesh["data"]
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: nn.Module, which: int) -> PACE:
    return PACE(model.parameters(), lr=1e-2, ema_kappa=0.5, **OPTIONS[which])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether this rank's part is that of the whole; without a collective, which neither gloo nor NCCL has of int16."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if not isinstance(ours, DTensor):
        return torch.equal(ours, theirs)
    part = distribute_tensor(theirs, ours.device_mesh, ours.placements, src_data_rank=None)
    return torch.equal(ours.to_local(), part.to_local())


def differences(model: nn.Module, optimizer: Any, reference: nn.Module, wanted: Any) -> list[str]:
    found = []
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        q = q[1]
        ours, theirs = optimizer.state[p], wanted.state[q]
        if not same(p.detach(), q.detach()):
            found.append(name)
        if ours.keys() != theirs.keys():
            found.append(f"{name}: {sorted(ours)} instead of {sorted(theirs)}")
            continue
        found += [f"{name}.{k}" for k, v in ours.items() if not same(v, theirs[k])]
    return found


def other_weights(model: Any, reference: Any) -> list[str]:
    named = zip(model.named_parameters(), reference.parameters(), strict=True)
    return [name for (name, p), q in named if not torch.equal(whole(p), q)]


def check(which: int, layout: str) -> list[str]:
    reference, model = net(), sharded(layout)
    optimizer, wanted = optimizer_of(model, which), optimizer_of(reference, which)
    steps(model, optimizer, range(4))
    steps(reference, wanted, range(4))
    found = differences(model, optimizer, reference, wanted)
    with optimizer.averaged(model), wanted.averaged(reference):
        found += other_weights(model, reference)
    steps(model, optimizer, range(4, 6))
    steps(reference, wanted, range(4, 6))
    masters, theirs = master_state_dict(model, optimizer), master_state_dict(reference, wanted)
    found += [f"master {n}" for n, value in masters.items() if not torch.equal(whole(value), theirs[n])]
    return found + differences(model, optimizer, reference, wanted)


@pytest.mark.parametrize("which", range(len(OPTIONS)))
@pytest.mark.parametrize("world", (2, 3, 4))
def test_shards_have_the_bits_of_the_whole(world: int, which: int) -> None:
    assert run(world, check, which, "fsdp") == [[]] * world


def check_other(kind: str, which: int) -> list[str]:
    """MADA's presets, schedule-free and the pullback. What MADA learns by is summed in another order over shards."""
    reference, model = net(), sharded("fsdp")
    optimizer, wanted = (KINDS[kind](m.parameters(), **OPTIONS[which]) for m in (model, reference))
    steps(model, optimizer, range(3))
    steps(reference, wanted, range(3))
    found = differences(model, optimizer, reference, wanted)
    with optimizer.averaged(model), wanted.averaged(reference):
        found += other_weights(model, reference)
    for m, o in ((model, optimizer), (reference, wanted)):
        with o.editing_weights(), torch.no_grad():
            m[3].weight.mul_(0.5)
    again = KINDS[kind](model.parameters(), **OPTIONS[which])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, again, range(3, 5))
    steps(reference, wanted, range(3, 5))
    return found + differences(model, again, reference, wanted)


@pytest.mark.parametrize("which", range(len(OPTIONS)))
@pytest.mark.parametrize("kind", ["MADA", "adan", "lion", "schedule-free", "pullback"])
def test_other_optimizers_have_the_bits_of_the_whole(kind: str, which: int) -> None:
    assert run(2, check_other, kind, which) == [[]] * 2


def check_converted(kind: str, which: int) -> list[str]:
    """torch converts DTensors by swapping their contents, which weak references to them would keep it from."""
    model = sharded("fsdp")
    optimizer = KINDS[kind](model.parameters(), **OPTIONS[which])
    steps(model, optimizer, range(2))
    with optimizer.averaged(model):
        pass
    steps(model, optimizer, range(2, 4))
    for p in model.parameters():
        p.grad = None
    with optimizer.editing_weights():
        model.float()
    with optimizer.averaged(model):
        pass
    return [str(p.dtype) for p in model.parameters() if p.dtype != torch.float32]


@pytest.mark.parametrize("kind", ["MADA", "schedule-free", "pullback", "average"])
def test_a_sharded_model_is_converted_after_steps(kind: str) -> None:
    assert run(2, check_converted, kind, 0) == [[]] * 2


def check_tensor_parallel() -> list[str]:
    model, reference = sharded("tensor parallel"), net()
    optimizer, wanted = optimizer_of(model, 0), optimizer_of(reference, 0)
    why = {tensor.name: tensor.why_float32 for tensor in optimizer.memory().tensors}
    found = [] if sum(text is None for text in why.values()) == 2 else [str(why)]
    found += [] if any("no multiples of 32" in (text or "") for text in why.values()) else [str(why)]
    steps(model, optimizer, range(4))
    steps(reference, wanted, range(4))
    others = [line for line in differences(model, optimizer, reference, wanted) if not line.startswith("2.weight")]
    return found + others


def test_shards_within_rows() -> None:
    assert run(4, check_tensor_parallel) == [[]] * 4


def save(which: int, folder: str, flat: bool) -> None:
    model = sharded()
    optimizer = optimizer_of(model, which)
    steps(model, optimizer, range(3))
    weights, states = get_state_dict(model, optimizer, options=FLAT if flat else None)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def load(which: int, folder: str, flat: bool) -> list[str]:
    model, reference = sharded(), net()
    optimizer, wanted = optimizer_of(model, which), optimizer_of(reference, which)
    options = FLAT if flat else None
    weights, states = get_state_dict(model, optimizer, options=options)
    loaded = {"model": weights, "optimizer": states}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    steps(model, optimizer, range(3, 5))
    steps(reference, wanted, range(5))
    return differences(model, optimizer, reference, wanted)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "which", "flat"), ((4, 3, 0, False), (3, 1, 0, True), (2, 4, 1, True), (1, 2, 2, False))
)
def test_saved_and_loaded_on_other_numbers_of_ranks(
    saved_on: int, loaded_on: int, which: int, flat: bool, tmp_path: Path
) -> None:
    run(saved_on, save, which, str(tmp_path), flat)
    assert run(loaded_on, load, which, str(tmp_path), flat) == [[]] * loaded_on
