"""The swap of weights and average, and the export: whole or not at all, whoever looks, fails or writes in between."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schedule_free import average_of
from torch import Tensor

import pace_kernels
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, averaging, backend

PACKAGE = str(Path(pace_kernels.__file__).parent)
KINDS: dict[str, Callable[[Any], Any]] = {
    "PACE": lambda p: PACE(p, lr=0.1),
    "PACE on torch": lambda p: PACE(p, lr=0.1, backend="torch"),
    "MADA": lambda p: MADA(p, lr=0.1, use_ema_eval=True),
    "Pullback": lambda p: Pullback(torch.optim.AdamW(p, lr=0.1)),
    "schedule-free": lambda p: ScheduleFreeAdamW(p, lr=0.1),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Mixed(torch.nn.Module):
    """Parameters of three dtypes, in two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single, self.brain, self.double_ = (
            torch.nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in DTYPES.values()
        )

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.single, self.brain]}, {"params": [self.double_], "weight_decay": 0.0}]


def trained(kind: str, model: torch.nn.Module, groups: Any = None, steps: int = 4) -> Any:
    optimizer = KINDS[kind](list(model.parameters()) if groups is None else groups)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
    return optimizer


def contents(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], names: Any = None) -> None:
    assert one.keys() == other.keys()
    for name in one if names is None else names:
        assert torch.equal(one[name], other[name]), name


@contextmanager
def at_each_line(act: Callable[[int], None]) -> Iterator[None]:
    """Calls ``act`` with a running number at every line of the package, where a handler of a signal may run."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            sys.settrace(None)
            count += 1
            act(count)
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def evaluated(optimizer: Any, model: torch.nn.Module) -> None:
    with optimizer.averaged(model):
        pass


CALLS: dict[str, Callable[[Any, torch.nn.Module], None]] = {
    "eval": lambda optimizer, model: optimizer.eval(model),
    "train": lambda optimizer, model: optimizer.train(model),
    "averaged": evaluated,
    "ema_state_dict": lambda optimizer, model: optimizer.ema_state_dict(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_what_a_handler_saves_is_right_at_each_line(kind: str, call: str) -> None:
    """Model and optimizer are saved at every line, loaded elsewhere, and train() is called there."""
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    live, average = contents(model), optimizer.ema_state_dict(model)
    if call == "train":
        optimizer.eval()
    saved: list[tuple[dict[str, Tensor], Any]] = []
    with at_each_line(lambda _: saved.append((contents(model), copy.deepcopy(optimizer.state_dict())))):
        CALLS[call](optimizer, model)
    assert len(saved) > 20
    for weights, state in saved:
        other = Mixed()
        other.load_state_dict(weights)
        loaded = KINDS[kind](other.groups())
        loaded.load_state_dict(state)
        loaded.train()
        assert_same(contents(other), live)
        assert_same(loaded.ema_state_dict(other), average)


class Stop(BaseException):
    """What a handler raises."""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["PACE", "Pullback"])
@pytest.mark.slow
def test_a_handler_that_raises_at_any_line_loses_nothing(kind: str, call: str) -> None:
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    live, average = contents(model), optimizer.ema_state_dict(model)
    last = 0
    for k in range(1, 2000):

        def act(number: int, k: int = k) -> None:
            if number == k:
                raise Stop

        if call == "train":
            optimizer.eval()
        try:
            with at_each_line(act):
                CALLS[call](optimizer, model)
        except Stop:
            last = k
        else:
            break
        optimizer.train()
        assert_same(contents(model), live)
        assert_same(optimizer.ema_state_dict(model), average)
        optimizer.train()
    assert last > 20


@pytest.mark.parametrize("kind", KINDS)
def test_running_out_of_memory_is_as_if_it_had_not_been_called(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the swap memory ends: at each copy of live weights, and at each write of an average."""
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    live, average = contents(model), optimizer.ema_state_dict(model)
    copies, write = averaging._live_copies, averaging._write
    for fail_at in range(4):

        def failing(entries: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        def failing_write(param: Tensor, value: Tensor, left: list[int] = [fail_at]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] == 0:
                param.detach().fill_(7.0)  # half written
                raise torch.OutOfMemoryError("no memory")
            write(param, value)

        monkeypatch.setattr(averaging, "_live_copies", failing if fail_at == 0 else copies)
        monkeypatch.setattr(averaging, "_write", failing_write)
        with pytest.raises(torch.OutOfMemoryError), optimizer.averaged():
            pass
        monkeypatch.setattr(averaging, "_live_copies", copies)
        monkeypatch.setattr(averaging, "_write", write)
        assert not optimizer._swapped
        assert_same(contents(model), live)
        assert_same(optimizer.ema_state_dict(model), average)
    optimizer.step()


# ---- parameters over one memory ----


def _as_parameter(weight: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight)


def _by_data(weight: Tensor) -> torch.nn.Parameter:
    other = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype))
    other.data = weight.data
    return other


TIED = {
    "a second Parameter": _as_parameter,
    ".data": _by_data,
    "transposed": lambda w: torch.nn.Parameter(w.detach().t()),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", TIED)
@pytest.mark.parametrize("kind", KINDS)
def test_one_memory_is_swapped_once_with_the_last_average(kind: str, how: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.first = torch.nn.Parameter(torch.randn(5, 3).to(DTYPES[dtype]))
    model.last = TIED[how](model.first)
    optimizer = trained(kind, model)
    live = contents(model)
    average = average_of(optimizer, model.last).to(DTYPES[dtype])
    with optimizer.averaged(model):
        assert torch.equal(model.last, average)
        assert model.first.data_ptr() == model.last.data_ptr()
    assert_same(contents(model), live)
    exported = optimizer.ema_state_dict(model)
    assert torch.equal(exported["last"], average)
    assert torch.equal(
        exported["first"].reshape(model.last.shape) if how != "transposed" else exported["first"].t(), average
    )
    assert exported["first"].data_ptr() != exported["last"].data_ptr()
    assert_same(contents(model), live)


def test_columns_of_one_tensor_are_each_swapped() -> None:
    """Their addresses interleave, their elements do not."""
    whole = torch.randn(6, 4)
    model = torch.nn.Module()
    model.even, model.odd = (torch.nn.Parameter(whole[:, k::2]) for k in (0, 1))
    optimizer = trained("PACE", model)
    live, averages = contents(model), {n: optimizer.state[p]["ema"].clone() for n, p in model.named_parameters()}
    with optimizer.averaged(model):
        assert_same(contents(model), averages)
    assert_same(contents(model), live)


# ---- weights written by others while swapped ----


def _load(model: torch.nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values)


def _copy(model: torch.nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])


@pytest.mark.parametrize("write", [_load, _copy])
@pytest.mark.parametrize("keep", ["loaded", "live"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_written_while_swapped_are_not_lost(kind: str, keep: str, write: Any) -> None:
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    live, average = contents(model), optimizer.ema_state_dict(model)
    best = {name: torch.randn_like(value) for name, value in live.items()}
    optimizer.eval()
    write(model, best)
    with pytest.raises(RuntimeError, match=r"'params'\]\[0\] was changed .*keep=\"loaded\".*keep=\"live\""):
        optimizer.train()
    optimizer.state_dict()
    assert_same(contents(model), best)
    optimizer.train(keep=keep)
    if kind == "schedule-free" and keep == "loaded":  # taken for the average, as the package does
        for name, value in optimizer.ema_state_dict(model).items():
            unit = torch.finfo(value.dtype).eps
            torch.testing.assert_close(value, best[name], rtol=2 * unit, atol=4 * unit)
    else:
        assert_same(contents(model), best if keep == "loaded" else live)
        assert_same(optimizer.ema_state_dict(model), average)
    optimizer.step()


def test_only_some_weights_are_loaded() -> None:
    model = Mixed()
    optimizer = trained("PACE", model, model.groups())
    live = contents(model)
    optimizer.eval()
    best = {"brain": torch.ones(5, 3, dtype=torch.bfloat16)}
    model.load_state_dict(best, strict=False)
    with pytest.raises(RuntimeError, match=r"'params'\]\[1\] was changed"):
        optimizer.train()
    optimizer.train(keep="loaded")
    assert_same(contents(model), live | best)


def test_keep_is_one_of_three() -> None:
    with pytest.raises(ValueError, match='keep must be "loaded", "live" or None, got \'both\''):
        trained("PACE", Mixed()).train(keep="both")


@pytest.mark.parametrize("saved", ["live", "swapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_optimizer_loaded_while_swapped(kind: str, saved: str) -> None:
    """Without the model's: weights that hold averages are not taken for live ones, but those that others wrote stay."""
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    live, average = contents(model), optimizer.ema_state_dict(model)
    states = copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    if saved == "swapped":
        states = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(states)
    assert_same(contents(model), average if saved == "swapped" else live)
    optimizer.train()
    assert_same(contents(model), live)
    assert_same(optimizer.ema_state_dict(model), average)
    optimizer.eval()
    best = {name: torch.randn_like(value) for name, value in live.items()}
    model.load_state_dict(best)
    optimizer.load_state_dict(states)
    assert_same(contents(model), best)


def test_averaged_where_no_group_evaluates_its_average_says_so() -> None:
    model = Mixed()
    optimizer = PACE(model.parameters(), use_ema_eval=False)
    backend.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no group has use_ema_eval=True"), optimizer.averaged(model):
        pass


# ---- the model ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_stepped_is_refused(kind: str) -> None:
    model = Mixed()
    optimizer = trained(kind, model, model.groups())
    stranger = copy.deepcopy(model)
    live = contents(model)
    for call in CALLS.values():
        with pytest.raises(ValueError, match="model has no parameter that this optimizer steps"):
            optimizer.train()
            call(optimizer, stranger)
            optimizer.eval()
            call(optimizer, stranger)
        optimizer.train()
    assert_same(contents(model), live)
    for p in stranger.parameters():
        p.requires_grad_(False)
    with optimizer.averaged(stranger):  # nothing of it is trained: it may be evaluated beside
        pass


def test_a_part_of_the_model_will_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = PACE(model.parameters())
    with optimizer.averaged(model[0]):
        pass


def test_freezing_of_inductor_is_refused() -> None:
    import torch._inductor.config

    model = Mixed()
    optimizer = trained("PACE", model)
    with torch._inductor.config.patch(freezing=True):
        with pytest.raises(RuntimeError, match="freezing"), optimizer.averaged(model):
            pass
        optimizer.ema_state_dict(model)


def test_a_graph_of_before_an_export_runs_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = trained("PACE", model)
    optimizer.zero_grad()
    x = torch.randn(2, 3)
    loss = model(x).square().sum()
    optimizer.ema_state_dict(model)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


def test_several_optimizers_of_one_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    optimizers = [
        PACE(model[0].parameters(), lr=0.1),
        Pullback(torch.optim.SGD(model[1].parameters(), lr=0.1), gain=0.1),
    ]
    other = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in (*optimizers, other):
            optimizer.step()
    live = contents(model)
    wanted = {n: optimizers[0].state[p]["ema"] if n[0] == "0" else live[n] for n, p in model.named_parameters()}
    wanted |= {n: v for n, v in optimizers[1].ema_state_dict(model).items() if n[0] == "1"}
    assert any(not torch.equal(wanted[n], live[n]) for n in wanted if n[0] == "1")
    assert_same(pace_kernels.ema_state_dict(model, *optimizers), wanted)
    with pace_kernels.averaged(model, *optimizers):
        assert_same(contents(model), wanted)
    assert_same(contents(model), live)
    kinds = "PACE, MADA, Pullback, ScheduleFreeAdamW or an Offload of one"
    with pytest.raises(TypeError, match=rf"optimizers\[1\] must be {kinds}, got AdamW"):
        pace_kernels.ema_state_dict(model, optimizers[0], other)
    with pytest.raises(TypeError, match="at least one optimizer"), pace_kernels.averaged(model):
        pass
    for call in (optimizers[0].eval, optimizers[0].ema_state_dict, lambda it: optimizers[1].averaged(it).__enter__()):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got AdamW"):
            call(other)
    assert_same(contents(model), live)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "schedule-free"])
def test_optimizers_that_step_the_same_parameters(kind: str) -> None:
    model = Mixed()
    optimizers = [trained(kind, model, model.groups()), trained("PACE", model), trained(kind, model)]
    live, last = contents(model), optimizers[-1].ema_state_dict(model)
    for _ in range(2):
        with pace_kernels.averaged(model, *optimizers):
            assert_same(contents(model), last)
        assert_same(contents(model), live)
    assert_same(pace_kernels.ema_state_dict(model, *optimizers), last)
    with pytest.raises(RuntimeError, match="was changed between"), pace_kernels.averaged(model, *optimizers):
        model.single.detach().zero_()
    for optimizer in reversed(optimizers):
        optimizer.train(keep="live")
    assert_same(contents(model), live)
