"""Promise: ``PACE(ema_device="cpu")`` has the weights and averages of PACE, which a worker moves in host memory, and
refuses what it can't do."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import pace_kernels
from pace_kernels import PACE, host_average

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
PLAIN: dict[str, Any] = {"lr": 1e-2, "lambda_pullback": 0.0}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name]), (key, name)


CASES = [
    (torch.float32, {}),
    (torch.float32, {"ema_update_freq": 3}),
    (torch.float32, {"ema_kappa": None, "beta_ema": 0.25}),
    (torch.float32, {"ema_rho": 2.0, "ema_gamma": 0.5, "betas": (0.0, 0.9)}),
    (torch.float32, {"backend": "torch", "ema_update_freq": 2}),
    (torch.float32, {"state_bits": 8, "ema_bits": 32}),
    (torch.float64, {"ema_update_freq": 2}),
    (torch.bfloat16, {"master_weight_bits": 32, "ema_update_freq": 2}),
]


@pytest.mark.parametrize("dtype, options", CASES)
def test_it_has_the_bits_of_pace(dtype: torch.dtype, options: dict[str, Any]) -> None:
    models = net(dtype), net(dtype)
    one, other = (
        PACE(m.parameters(), **PLAIN, **options, **more)
        for m, more in zip(models, ({}, {"ema_device": "cpu"}), strict=True)
    )
    for _ in range(4):
        for model, optimizer in zip(models, (one, other), strict=True):
            train(model, optimizer, 2)
        assert_same(one.state_dict(), other.state_dict())
    with one.averaged(models[0]), pace_kernels.averaged(models[1], other):
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
        assert not torch.equal(models[0][0].weight, net(dtype)[0].weight)
    exported = [o.ema_state_dict(m, dtype=torch.float32) for m, o in zip(models, (one, other), strict=True)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_of_bfloat16_without_master_weights_the_stored_weights_are_averaged() -> None:
    model = net(torch.bfloat16)
    optimizer = PACE(model.parameters(), **PLAIN, ema_kappa=None, beta_ema=0.5, ema_device="cpu")
    average = model[0].weight.detach().float()
    for _ in range(3):
        train(model, optimizer, 1)
        average = average + 0.5 * (model[0].weight.detach().float() - average)
    assert torch.equal(optimizer.state_dict()["state"][0]["ema"], average)


def test_checkpoints_go_both_ways() -> None:
    runs = []
    for first, second in ((None, "cpu"), ("cpu", None), ("cpu", "cpu"), (None, None)):
        model = net()
        optimizer = PACE(model.parameters(), **PLAIN, ema_device=first)
        train(model, optimizer)
        saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
        later = PACE(model.parameters(), **PLAIN, ema_device=second)
        later.load_state_dict(saved)
        assert later.param_groups[0].get("ema_device") == second
        train(model, later)
        for copied in (copy.deepcopy(later), pickle.loads(pickle.dumps(later))):
            assert_same(copied.state_dict(), later.state_dict())
        runs.append(later.state_dict())
    for other in runs[1:]:
        assert_same(runs[0], other)


def test_the_option_may_change_between_steps() -> None:
    models = net(), net()
    one, other = (PACE(m.parameters(), **PLAIN) for m in models)
    for place in ("cpu", None, "cpu"):
        other.param_groups[0]["ema_device"] = place
        for model, optimizer in zip(models, (one, other), strict=True):
            train(model, optimizer, 3)
    assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("options", ({"skip_nonfinite": True}, {}))
def test_a_step_that_is_left_undone_moves_no_average(options: dict[str, Any]) -> None:
    models = net(), net()
    optimizers = [
        PACE(m.parameters(), **PLAIN, ema_update_freq=2, **options, **more)
        for m, more in zip(models, ({}, {"ema_device": "cpu"}), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        if options:
            model[0].weight.grad.fill_(float("inf"))
        else:
            optimizer.found_inf = torch.ones(())
        with torch.no_grad():
            model[1].bias.add_(1)  # which an average would see
        optimizer.step()
        assert_same(before, optimizer.state_dict())
        if not options:
            del optimizer.found_inf
        train(model, optimizer, 2)
    assert_same(optimizers[0].state_dict(), optimizers[1].state_dict())


REFUSED = [
    ({"ema_device": "cuda"}, 'ema_device must be None or "cpu"'),
    ({"ema_device": "cpu", "lambda_pullback": 0.1}, "needs lambda_pullback=0, got 0.1"),
    ({"ema_device": "cpu", "use_ema_eval": False}, "needs use_ema_eval=True"),
    ({"ema_device": "cpu", "state_bits": 8}, "needs ema_bits=32, got 8"),
    ({"ema_device": "cpu", "ema_bits": 16}, "needs ema_bits=32, got 16"),
    ({"ema_device": "cpu", "capturable": True}, "needs capturable=False"),
]


@pytest.mark.parametrize("options, sentence", REFUSED)
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PACE(net().parameters(), **{**PLAIN, **options})


def test_two_parameters_over_one_memory_are_refused() -> None:
    one = nn.Parameter(torch.ones(8))
    other = nn.Parameter(one.detach())
    optimizer = PACE([one, other], **PLAIN, ema_device="cpu")
    one.grad = other.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="two parameters are one memory"):
        optimizer.step()
    assert torch.equal(one, torch.ones(8)) and not optimizer.state


def test_training_goes_on_while_the_average_is_moved_and_readers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go, moved = threading.Event(), []
    lane = host_average.lane_of(torch.device("cpu"))

    def block(event: Any) -> None:
        assert may_go.wait(60)
        moved.append(event)

    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu", ema_update_freq=2)
    monkeypatch.setattr(lane, "block", block)
    train(model, optimizer, 3)  # the second step's move is held up, and the third step does not wait
    assert not moved
    threading.Timer(0.2, may_go.set).start()
    optimizer.state_dict()
    assert len(moved) == 1


@pytest.mark.parametrize("reader", ("state_dict", "eval", "step"))
def test_an_error_of_the_worker_is_raised_by_the_next_call(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu")
    train(model, optimizer, 2)
    optimizer.state_dict()
    lane = host_average.lane_of(torch.device("cpu"))

    def fail(event: Any) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(lane, "block", fail)
        train(model, optimizer, 1)
        optimizer._averages.worker._thread.join()
    with pytest.raises(MemoryError, match="no memory"):
        getattr(optimizer, reader)()
    train(model, optimizer, 1)  # said once
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_forked_process_steps_and_does_not_wait_for_threads_that_it_does_not_have() -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu", backend="torch")
    train(model, optimizer, 2)
    optimizer.state_dict()
    child = os.fork()
    if child == 0:
        try:
            train(model, optimizer, 1)
            optimizer.state_dict()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
