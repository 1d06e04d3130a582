"""Promise: ``PACE(ema_device="cpu")`` has the weights and averages of PACE, which a worker moves in host memory, and
refuses what it can't do."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import pace_kernels
from pace_kernels import PACE, host_average
from pace_kernels.lanes import Lane

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


class Delayed(Lane):
    """A device whose copies are made when an event behind them is waited for. Until then their memory holds NaNs."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.made = self.clashes = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def copy(self, source: torch.Tensor, to: torch.Tensor) -> None:
        self.clashes += any(to is other for _, other in self.asked[self.made :])
        to.fill_(float("nan"))
        self.asked.append((source.clone(), to))

    def event(self) -> int:
        return len(self.asked)

    def block(self, event: int) -> None:
        assert self.may_go.wait(60)
        time.sleep(0.01)
        for source, to in self.asked[self.made : event]:
            to.copy_(source)
            self.made += 1


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Delayed:
    lane = Delayed()
    monkeypatch.setattr(host_average, "lane_of", lambda device: lane)
    return lane


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


@pytest.mark.parametrize("fused", (False, True))
def test_schedulers_hooks_closures_clipping_and_scalers(fused: bool) -> None:
    found = []
    for more in ({}, {"ema_device": "cpu"}):
        model = net()
        optimizer = PACE(model.parameters(), **PLAIN, ema_update_freq=2, fused=fused, **more)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        hooked: list[Any] = []
        for i in range(12):
            optimizer.zero_grad()
            scaler.scale(model(X).square().mean()).backward()
            if i in (4, 7):  # which are left undone
                model[0].weight.grad.fill_(float("inf"))
            if not fused:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if i == 6:
                optimizer.register_step_post_hook(lambda *args, hooked=hooked: hooked.append(args))
        optimizer.step(lambda m=model: m(X).sum())
        assert hooked
        found.append(optimizer.state_dict())
        assert found[-1]["state"][0]["step"] == 11
    assert_same(*found)


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


def test_the_option_may_change_between_steps(delayed: Delayed) -> None:
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


def parts_of(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[1].parameters(), "ema_kappa": 0.5}]


def test_copies_are_waited_for(delayed: Delayed) -> None:
    models = net(), net()
    one = PACE(parts_of(models[0]), **PLAIN)
    other = PACE(parts_of(models[1]), **PLAIN, ema_device="cpu")
    for _ in range(3):
        train(models[0], one, 3)
        train(models[1], other, 3)
        assert_same(one.state_dict(), other.state_dict())
    assert delayed.made == len(delayed.asked) == 9 * 4 and not delayed.clashes


def test_training_goes_on_while_the_average_is_moved_and_readers_wait(delayed: Delayed) -> None:
    model = net()
    optimizer = PACE(parts_of(model), **PLAIN, ema_device="cpu", ema_update_freq=2)
    delayed.may_go.clear()
    train(model, optimizer, 3)  # the second step's move is held up, and the third step does not wait
    assert delayed.made == 0 and len(delayed.asked) == 4
    threading.Timer(0.2, delayed.may_go.set).start()
    wrapper = object.__new__(PACE)  # as Lightning's, which copies attributes before the first step
    wrapper.__dict__ = dict(optimizer.__dict__)
    wrapper.state_dict()
    assert delayed.made == 4


def fail(event: Any) -> None:
    raise MemoryError("no memory")


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("reader", ("state_dict", "eval", "step", "__getstate__"))
@pytest.mark.parametrize("how", (fail, interrupt))
def test_a_move_that_failed_or_was_not_asked_for_is_told_until_a_checkpoint_is_loaded(
    reader: str, how: Any, delayed: Delayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu")
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(delayed, "block" if how is fail else "copy", how)
        if how is fail:
            train(model, optimizer, 1)
            optimizer._host._worker.join()
        else:
            with pytest.raises(KeyboardInterrupt):
                train(model, optimizer, 1)
    weight = model[0].weight.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the average in host memory is not that of the weights"):
            getattr(optimizer, reader)()
    assert torch.equal(weight, model[0].weight)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    assert optimizer.state_dict()["state"][0]["step"] == 3


def test_a_refused_step_breaks_nothing() -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu")
    for _ in range(2):
        train(model, optimizer, 1)
        model[0].weight.grad = torch.ones(64, 64)
        model[0].weight.grad.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="resized"):
            optimizer.step()
    train(model, optimizer, 1)
    assert optimizer.state_dict()["state"][0]["step"] == 3


def test_an_interrupt_before_anything_was_written_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu")
    train(model, optimizer, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optimizer, "_changes_since", interrupt)
        optimizer.step()
    train(model, optimizer, 1)
    assert optimizer.state_dict()["state"][0]["step"] == 3


def in_child(job: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            job()
            os._exit(0)
        except RuntimeError as error:
            os._exit(2 if "was forked" in str(error) else 1)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_steps_and_does_not_wait_for_threads_that_it_does_not_have(delayed: Delayed) -> None:
    model = net()
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu", backend="torch")
    train(model, optimizer, 2)
    optimizer.state_dict()

    def more() -> None:
        train(model, optimizer, 1)
        optimizer.state_dict()

    assert in_child(more) == 0
    delayed.may_go.clear()
    train(model, optimizer, 1)
    assert in_child(optimizer.state_dict) == 2
    delayed.may_go.set()
    more()


@pytest.mark.parametrize("when", ("", "import atexit; atexit.register(optimizer.step)"))
def test_a_process_ends_when_the_average_is_moved(when: str) -> None:
    code = f"""
import time, torch
from pace_kernels import PACE, host_average, lanes
lanes.Lane.block = lambda self, event: time.sleep(0.5)
weight = torch.nn.Parameter(torch.ones(8))
optimizer = PACE([weight], lambda_pullback=0.0, ema_device="cpu")
weight.grad = torch.ones(8)
{when}
optimizer.step()
move = optimizer._host._worker._next
optimizer._host._worker._next = lambda: move() or print("moved", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "moved\n" * (2 if when else 1)


def test_memory_tells_what_is_in_host_memory() -> None:
    model = net(torch.bfloat16)
    optimizer = PACE(model.parameters(), **PLAIN, ema_device="cpu", master_weight_bits=32)
    elements = 2 * 64 * 65
    for _ in range(2):
        memory = optimizer.memory()
        assert memory.host == 8 * elements and memory.states == (4 * 3 + 2) * elements + 4 * 4
        line = "in host memory: averages 32.50 KiB, copies 32.50 KiB"
        assert line in str(memory) and f": {14 if memory.gradients else 12:.2f} bytes an element" in str(memory)
        train(model, optimizer, 1)


@pytest.mark.filterwarnings("ignore:a parameter has another shape")
def test_an_average_of_another_shape_starts_anew() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = PACE([weight], **PLAIN, ema_device="cpu")
    for rows in (3, 5):
        weight.grad = torch.ones(rows, 4)
        optimizer.step()
        state = optimizer.state.pop(weight)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(5, 4)
        weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(5, 4))
        optimizer.state[weight] = state
    optimizer.state_dict()
    assert state["ema"].shape == (5, 4)


def test_steps_within_backward() -> None:
    models = net(), net()
    one = PACE(models[0].parameters(), **PLAIN)
    other = pace_kernels.step_in_backward(
        models[1], lambda params: PACE(params, **PLAIN, ema_device="cpu"), bucket_bytes=1
    )
    for _ in range(3):
        train(models[0], one, 1)
        train(models[1], other, 1)
    assert_same(one.state_dict(), other.state_dict())
