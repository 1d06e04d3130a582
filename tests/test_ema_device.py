"""Promise: ``PACE(ema_device="cpu")`` has the weights and averages of PACE, and refuses what it can't do."""

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
from torch import Tensor, nn

import pace_kernels
from pace_kernels import PACE, host_average
from pace_kernels.lanes import Lane, lane_of
from pace_kernels.worker import Worker

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def made(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, PACE]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "eps": 1e-7}]
    return model, PACE(groups, **{"lr": 1e-2, "lambda_pullback": 0.0, "ema_device": "cpu", **options})


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name]), (key, name)


def check_both(job: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """The job leaves the same with and without the option."""
    found = []
    for place in (None, "cpu"):
        model, optimizer = made(dtype, ema_device=place, **options)
        shown = job(model, optimizer) or []
        found.append((optimizer.state_dict(), [*model.parameters(), *shown]))
    assert_same(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


class Delayed(Lane):
    """A device whose copies are made when an event behind them is waited for. Until then their memory holds NaNs."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.made = self.clashes = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def copy(self, source: Tensor, to: Tensor) -> None:
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
def test_it_has_the_bits_of_pace(dtype: torch.dtype, options: dict[str, Any], delayed: Delayed) -> None:
    def job(model: Any, optimizer: PACE) -> list[Tensor]:
        for _ in range(3):
            train(model, optimizer, 3)
            optimizer.state_dict()
        with pace_kernels.averaged(model, optimizer):
            shown = [p.detach().clone() for p in model.parameters()]
        assert not torch.equal(shown[0], model[0].weight)
        return [*shown, *optimizer.ema_state_dict(model, dtype=torch.float32).values()]

    check_both(job, dtype, **options)
    moves = 9 // options.get("ema_update_freq", 1)
    assert delayed.made == len(delayed.asked) == 4 * moves and not delayed.clashes


def test_of_bfloat16_without_master_weights_the_stored_weights_are_averaged() -> None:
    model, optimizer = made(torch.bfloat16, ema_kappa=None, beta_ema=0.5)
    average = model[0].weight.detach().float()
    for _ in range(3):
        train(model, optimizer)
        average = average + 0.5 * (model[0].weight.detach().float() - average)
    assert torch.equal(optimizer.state_dict()["state"][0]["ema"], average)


@pytest.mark.parametrize("fused", (False, True))
def test_schedulers_hooks_closures_clipping_and_scalers(fused: bool) -> None:
    def job(model: Any, optimizer: PACE) -> None:
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
                optimizer.register_step_post_hook(lambda *args: hooked.append(args))
        optimizer.step(lambda: model(X).sum())
        assert hooked and optimizer.state[model[0].weight]["step"] == 11

    check_both(job, fused=fused, ema_update_freq=2)


def test_a_step_that_is_left_undone_moves_no_average() -> None:
    def job(model: Any, optimizer: PACE) -> None:
        train(model, optimizer, 2)
        before = copy.deepcopy(optimizer.state_dict())
        model[0].weight.grad.fill_(float("inf"))
        with torch.no_grad():
            model[1].bias.add_(1)  # which an average would see
        optimizer.step()
        assert_same(before, optimizer.state_dict())
        train(model, optimizer, 2)

    check_both(job, skip_nonfinite=True, ema_update_freq=2)


def test_steps_within_backward() -> None:
    def job(model: Any, optimizer: PACE) -> None:
        if "ema_device" in optimizer.param_groups[0]:
            optimizer = pace_kernels.step_in_backward(model, lambda params: optimizer, bucket_bytes=1)
        train(model, optimizer, 3)

    check_both(job)


def test_the_option_may_change_between_steps(delayed: Delayed) -> None:
    def job(model: Any, optimizer: PACE) -> None:
        away = "ema_device" in optimizer.param_groups[0]
        for place in ("cpu", None, "cpu"):
            if away:
                optimizer.param_groups[0]["ema_device"] = place
            train(model, optimizer, 3)

    check_both(job)


def test_checkpoints_go_both_ways_and_copies_are_whole() -> None:
    def job(model: Any, optimizer: PACE) -> None:
        train(model, optimizer, 3)
        before = optimizer.param_groups[0].get("ema_device")
        other = made(ema_device=None if before else "cpu")[1]
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        assert other.param_groups[0].get("ema_device") != before
        for copied in (other, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert_same(copied.state_dict(), optimizer.state_dict())
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0].get("ema_device") == before
        train(model, optimizer, 3)

    check_both(job)


REFUSED = [
    ({"ema_device": "cuda"}, 'ema_device must be None or "cpu"'),
    ({"lambda_pullback": 0.1}, "needs lambda_pullback=0, got 0.1"),
    ({"use_ema_eval": False}, "needs use_ema_eval=True"),
    ({"state_bits": 8}, "needs ema_bits=32, got 8"),
    ({"ema_bits": 16}, "needs ema_bits=32, got 16"),
    ({"capturable": True}, "needs capturable=False"),
]


@pytest.mark.parametrize("options, sentence", REFUSED)
def test_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        made(**options)


def test_two_parameters_over_one_memory_are_refused() -> None:
    model, optimizer = made()
    model[1].bias.data = model[0].bias.data
    with pytest.raises(RuntimeError, match="two parameters are one memory"):
        train(model, optimizer)
    assert not optimizer.state


def test_training_goes_on_while_the_average_is_moved_and_readers_wait(delayed: Delayed) -> None:
    model, optimizer = made(ema_update_freq=2)
    wrapper = object.__new__(PACE)  # as Lightning's, which copies attributes before the first step
    wrapper.__dict__ = dict(optimizer.__dict__)
    delayed.may_go.clear()
    train(model, optimizer, 3)  # the second step's move is held up, and the third step does not wait
    assert delayed.made == 0 and len(delayed.asked) == 4
    threading.Timer(0.2, delayed.may_go.set).start()
    wrapper.state_dict()
    assert delayed.made == 4


def fail(*args: Any) -> None:
    raise MemoryError("no memory")


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("reader", ("state_dict", "eval", "step", "__getstate__"))
@pytest.mark.parametrize("how", (fail, interrupt))
def test_a_move_that_failed_or_was_not_asked_for_is_told_until_a_checkpoint_is_loaded(
    reader: str, how: Any, delayed: Delayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(delayed, "block" if how is fail else "copy", how)
        try:
            train(model, optimizer)
        except KeyboardInterrupt:
            assert how is interrupt
        optimizer._host.join()
    weight = model[0].weight.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the average in host memory is not that of the weights"):
            getattr(optimizer, reader)()
    assert torch.equal(weight, model[0].weight)
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 3


def test_a_step_that_was_refused_or_interrupted_before_it_wrote_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    for _ in range(2):
        train(model, optimizer)
        model[0].weight.grad = torch.ones(64, 64)
        model[0].weight.grad.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="resized"):
            optimizer.step()
    train(model, optimizer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optimizer, "_takes_options", interrupt)
        optimizer.step()
    train(model, optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 4


def in_child(job: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            job()
            os._exit(0)
        except BaseException as error:
            os._exit(2 if "was forked" in str(error) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(delayed: Delayed) -> None:
    model, optimizer = made(backend="torch")

    def more() -> None:
        train(model, optimizer)
        optimizer.state_dict()

    more()
    assert in_child(more) == 0
    delayed.may_go.clear()
    train(model, optimizer)
    assert in_child(optimizer.state_dict) == 2
    delayed.may_go.set()
    more()


def test_a_handler_within_a_move_of_its_own_thread_is_refused() -> None:
    """It would wait for itself. Where there is nothing to wait for, as without ema_device, nothing waits."""
    worker, refused = Worker(), []

    def job() -> None:
        with pytest.raises(RuntimeError, match="in the middle of work"):
            worker.join()
        refused.append(True)

    worker._jobs.append(job)  # as where a signal came before its thread was started
    worker.join()
    worker.join()
    assert refused == [True] and worker.failed is None


def test_without_the_option_nothing_asks_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps would trace it, and warn that the number of the process can't be."""

    def asked(_: Worker) -> None:
        raise AssertionError

    monkeypatch.setattr(Worker, "look", asked)
    model = nn.Linear(4, 1)
    optimizer = PACE(model.parameters())
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    with optimizer.averaged():
        pass
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("late", ("", "import atexit; atexit.register(optimizer.step)"))
def test_a_process_ends_when_the_average_is_moved(late: str) -> None:
    code = f"""
import time, torch
from pace_kernels import PACE, lanes
lanes.Lane.block = lambda self, event: time.sleep(0.5)
weight = torch.nn.Parameter(torch.ones(8))
optimizer = PACE([weight], lambda_pullback=0.0, ema_device="cpu")
weight.grad = torch.ones(8)
worker = optimizer._host._worker
move, worker._next = worker._next, lambda: move() or print("moved", flush=True)
{late}
optimizer.step()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    # What atexit's functions begin ends with the process: nobody can read it.
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("moved\n")


def test_memory_tells_what_is_in_host_memory() -> None:
    model, optimizer = made(torch.bfloat16, master_weight_bits=32)
    for gradients in (0, 2):  # before and after the first step
        memory = optimizer.memory()
        assert memory.host == 8 * memory.elements and memory.states == 14 * memory.elements + 4 * 4
        assert f": {12 + gradients}.00 bytes per element beside host memory" in str(memory)
        assert "in host memory: averages 32.50 KiB, copies 32.50 KiB" in str(memory)
        train(model, optimizer)


@pytest.mark.filterwarnings("ignore:a parameter has another shape")
def test_an_average_of_another_shape_starts_anew() -> None:
    model, optimizer = made()
    train(model, optimizer)
    weight = model[0].bias
    state = optimizer.state[weight]
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros(2, 5)
    weight.grad, weight.data = None, torch.ones(5)
    weight.grad = torch.ones(5)
    optimizer.step()
    optimizer.state_dict()
    assert state["ema"].shape == (5,) and not torch.equal(state["ema"], torch.ones(5))


def test_of_a_gpu_the_event_stands_behind_the_copies_of_its_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Fake:
        def __init__(self, *args: Any, **options: Any) -> None:
            told.append((args, options))

        record = synchronize = copy_ = __init__

    monkeypatch.setattr(torch.cuda, "Event", Fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    lane = lane_of(torch.device("cuda", 1))
    lane.copy("weights", Fake())  # type: ignore[arg-type]
    lane.block(lane.event())
    assert told[1:] == [
        (("weights",), {"non_blocking": True}),
        ((), {"blocking": True}),
        (("stream of cuda:1",), {}),
        ((), {}),
    ]
