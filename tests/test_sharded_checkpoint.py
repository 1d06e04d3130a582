"""Promise: what was saved on any number of ranks goes on, on any number of ranks, as if never stopped; and the averaged
weights of a sharded model come together as one."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from ranks import run
from test_sharded import differences, make, net, shard, steps, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

# Learning would follow the order of sums, which is that of the shards: with it the same number of ranks is compared.
OPTIONS: dict[str, dict[str, Any]] = {
    "PACE": {"log_stats": True},
    "MADA": {"hyper_lr": 0.0, "lambda_pullback": 0.1, "use_ema_eval": True},
}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def straight(rule: str) -> tuple[torch.nn.Module, Any]:
    """An unsharded training that nothing interrupts."""
    model = net()
    optimizer = make(rule, model.parameters(), **OPTIONS[rule])
    steps(model, optimizer, range(7))
    return model, optimizer


def trained(rule: str, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = shard(net())
    optimizer = make(rule, model.parameters(), **(options or OPTIONS[rule]))
    steps(model, optimizer, range(4))
    return model, optimizer


def fresh(rule: str, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = shard(net())
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().fill_(9.0)
    return model, make(rule, model.parameters(), **(options or OPTIONS[rule]))


@functools.cache
def saving_group() -> Any:
    """Its own, since it communicates from another thread: in that of the steps its collectives would meet theirs."""
    return torch.distributed.new_group(backend="gloo")


def save(rule: str, folder: str, flat: bool, asynchronous: bool) -> None:
    model, optimizer = trained(rule)
    weights, states = get_state_dict(model, optimizer, options=FLAT if flat else None)
    saved = {"model": weights, "optimizer": states}
    if not asynchronous:
        dcp.save(saved, checkpoint_id=folder)
        return
    future = dcp.async_save(saved, checkpoint_id=folder, process_group=saving_group())
    steps(model, optimizer, range(4, 6))  # goes on while it is written
    future.result()


def load(rule: str, folder: str, flat: bool) -> list[str]:
    model, optimizer = fresh(rule)
    options = FLAT if flat else None
    weights, states = get_state_dict(model, optimizer, options=options)
    loaded = {"model": weights, "optimizer": states}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    steps(model, optimizer, range(4, 7))
    return differences(model, optimizer, *straight(rule))


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("rule", OPTIONS)
def test_saved_on_some_ranks_and_loaded_on_others(rule: str, saving: int, loading: int, tmp_path: Path) -> None:
    run(saving, save, rule, str(tmp_path), False, False)
    assert run(loading, load, rule, str(tmp_path), False) == [[]] * loading


@pytest.mark.parametrize("rule", OPTIONS)
def test_flat(rule: str, tmp_path: Path) -> None:
    run(4, save, rule, str(tmp_path), True, False)
    assert run(2, load, rule, str(tmp_path), True) == [[]] * 2


@pytest.mark.parametrize("rule", OPTIONS)
def test_saved_asynchronously(rule: str, tmp_path: Path) -> None:
    run(2, save, rule, str(tmp_path), False, True)
    assert run(4, load, rule, str(tmp_path), False) == [[]] * 4


def through_a_full_state_dict(rule: str) -> tuple[bool, list[str]]:
    """Gathered on rank 0, as a checkpoint of one file, which all ranks then read."""
    model, optimizer = trained(rule)
    gathered = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    alone = torch.distributed.get_rank() == 0 or not gathered[1].get("state")
    file = [gathered]
    torch.distributed.broadcast_object_list(file, src=0)
    weights, states = file[0]
    other, resumed = fresh(rule)
    spread = StateDictOptions(full_state_dict=True)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states, options=spread)
    steps(other, resumed, range(4, 7))
    return alone, differences(other, resumed, *straight(rule))


@pytest.mark.parametrize("rule", OPTIONS)
def test_full_state_dicts(rule: str) -> None:
    assert run(2, through_a_full_state_dict, rule) == [(True, [])] * 2


def learning_goes_on() -> tuple[list[str], bool]:
    """With coefficients that move: the same bits on as many ranks."""
    options = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7, "hyper_warmup": 2, "hyper_lr": 0.01}
    model, optimizer = trained("MADA", **options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    other, resumed = fresh("MADA", **options)
    set_optimizer_state_dict(other, resumed, saved)
    other.load_state_dict(weights)
    for m, o in ((model, optimizer), (other, resumed)):
        steps(m, o, range(4, 7))
    found = [
        n
        for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(whole(p), whole(q))
    ]
    moved = optimizer.coefficients["rho"] != options["rho"]
    return found, moved and optimizer.coefficients == resumed.coefficients


def test_learned_coefficients_go_on() -> None:
    assert run(2, learning_goes_on) == [([], True)] * 2


def gathers(rule: str) -> list[bool]:
    model, optimizer = trained(rule)
    reference = net()
    wanted = make(rule, reference.parameters(), **OPTIONS[rule])
    steps(reference, wanted, range(4))
    averages = wanted.ema_state_dict(reference)
    before = [whole(p).clone() for p in model.parameters()]
    sharded = optimizer.ema_state_dict(model)
    full = optimizer.ema_state_dict(model, full=True)
    with optimizer.averaged():
        inside = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first = torch.distributed.get_rank() == 0

    def same(found: dict[str, Any]) -> bool:
        return found.keys() == averages.keys() and all(torch.equal(found[k], averages[k]) for k in averages)

    return [
        all(value.placements == p.placements for value, p in zip(sharded.values(), model.parameters(), strict=True)),
        same({k: whole(v) for k, v in sharded.items()}),
        same(full) if first else full == {},
        same(inside) if first else inside == {},
        all(torch.equal(a, whole(p)) for a, p in zip(before, model.parameters(), strict=True)),
    ]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rule", OPTIONS)
def test_averaged_weights_gather_to_one_state_dict_on_one_rank(rule: str, world: int) -> None:
    assert run(world, gathers, rule) == [[True] * 5] * world


def swapped_is_said() -> str:
    model, optimizer = trained("PACE")
    optimizer.eval()
    saved = get_optimizer_state_dict(model, optimizer, options=FLAT)
    other, resumed = fresh("PACE")
    try:
        set_optimizer_state_dict(other, resumed, saved, options=FLAT)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_a_flat_checkpoint_saved_while_swapped_is_refused() -> None:
    assert all("saved between eval() and train()" in said for said in run(2, swapped_is_said))


def zero(rule: str) -> tuple[list[str], bool]:
    """ZeroRedundancyOptimizer: consolidated on rank 0, loaded on all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from pace_kernels import MADA, PACE

    options = {"hyper_process_group": "world"} if rule == "MADA" else {}

    def build() -> tuple[Any, Any]:
        model = DistributedDataParallel(net())
        kind = {"PACE": PACE, "MADA": MADA}[rule]
        return model, ZeroRedundancyOptimizer(model.parameters(), kind, lr=1e-2, **options)

    model, optimizer = build()
    steps(model, optimizer, range(4))
    optimizer.consolidate_state_dict(to=0)
    saved = [pickle.dumps(optimizer.state_dict()) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(saved, src=0)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(pickle.loads(saved[0]))
    for m, o in ((model, optimizer), (other, resumed)):
        steps(m, o, range(4, 7))
    found = [n for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True) if not torch.equal(p, q)]
    return found, rule == "PACE" or optimizer.optim.coefficients == resumed.optim.coefficients


@pytest.mark.parametrize("rule", OPTIONS)
def test_zero_redundancy_optimizer(rule: str) -> None:
    assert run(2, zero, rule) == [([], True)] * 2
