"""Promise: a step is whole or not at all, whatever Python runs in between; where it is not, the optimizer says so."""

from __future__ import annotations

import copy
import gc
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch

from pace_kernels import MADA, PACE, ScheduleFreeAdamW
from pace_kernels.whole import at_once


def stepped() -> tuple[torch.nn.Parameter, Any]:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PACE([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    return param, optimizer


def readers(param: torch.nn.Parameter, optimizer: Any) -> list[Any]:
    """What reads weights and states together."""
    model = torch.nn.Module()
    model.weight = param
    export = [lambda: optimizer.ema_state_dict(model), lambda: copy.deepcopy(optimizer)]
    return [optimizer.state_dict, *export, lambda: (optimizer.eval(), optimizer.train()), optimizer.step]


def test_a_step_under_way_is_said() -> None:
    param, optimizer = stepped()
    for call in readers(param, optimizer):
        with optimizer._under_way(), pytest.raises(RuntimeError, match="in the middle of a step"):
            call()
        call()
    assert optimizer.state[param]["step"] == 2


def test_what_an_exception_ended_half_done_needs_a_checkpoint() -> None:
    param, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError), optimizer._under_way([param]):
        param.detach().zero_()
        _ = 1 / 0
    for call in readers(param, optimizer):
        with pytest.raises(RuntimeError, match=r"half done.*load_state_dict"):
            call()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_an_exception_before_the_first_write_leaves_a_whole_state() -> None:
    param, optimizer = stepped()
    with pytest.raises(ZeroDivisionError), optimizer._under_way([param]):
        _ = 1 / 0
    optimizer.step()
    with pytest.raises(ZeroDivisionError), optimizer._under_way():  # it could write anything
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="in the middle"):
        optimizer.step()


@pytest.mark.parametrize(("number", "whole"), [(0, True), (1, False), (2, False)])
def test_of_calls_made_at_once_the_first_may_raise(number: int, whole: bool) -> None:
    _, optimizer = stepped()
    done: list[int] = []

    def call(i: int) -> Any:
        return lambda: done.append(i if i != number else 1 // 0)

    with pytest.raises(ZeroDivisionError):
        optimizer._at_once([call(0), call(1)], [call(2)])
    assert done == list(range(number)) and (not optimizer._unfinished) is whole


def test_at_once_makes_all_calls_in_order() -> None:
    done: list[int] = []
    at_once([lambda i=i: done.append(i) for i in range(5)])
    assert done == [0, 1, 2, 3, 4]


# ---- at every line of a step ----

KINDS: dict[str, Any] = {
    "PACE": lambda groups, **k: PACE(groups, lr=0.1, log_stats=True, **k),
    "PACE in codes": lambda groups, **k: PACE(groups, lr=0.1, state_bits=8, **k),
    "PACE that skips": lambda groups, **k: PACE(groups, lr=0.1, skip_nonfinite=True, **k),
    "MADA": lambda groups, **k: MADA(groups, lr=0.1, hyper_warmup=0, use_ema_eval=True, **k),
    "a set for each group": lambda groups, **k: MADA(groups, lr=0.1, hyper_warmup=0, coefficients="group", **k),
    "lion": lambda groups, **k: MADA.preset("lion", groups, **k),
    "adan": lambda groups, **k: MADA.preset("adan", groups, **k),
    "schedule-free": lambda groups, **k: ScheduleFreeAdamW(groups, warmup_steps=2, **k),
    "schedule-free in codes": lambda groups, **k: ScheduleFreeAdamW(groups, warmup_steps=2, state_bits=8, **k),
    "adan in codes": lambda groups, **k: MADA.preset("adan", groups, state_bits=8, use_ema_eval=True, **k),
}
DTYPES = {"one group": [[torch.float32]], "two groups, mixed": [[torch.float32, torch.bfloat16], [torch.float64]]}


def built(kind: str, layout: str, backend: str | None) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Module()
    groups = []
    for g, dtypes in enumerate(DTYPES[layout]):
        shape = (128, 32) if "codes" in kind else (3, 2)
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes]
        groups.append({"params": params})
        for i, param in enumerate(params):
            model.register_parameter(f"p{g}{i}", param)
    return model, KINDS[kind](groups, backend=backend)


def set_grads(model: torch.nn.Module, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def kept(model: torch.nn.Module, optimizer: Any) -> tuple[Any, Any]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Stop(BaseException):
    pass


def traced(call: Any, at_line: Any) -> None:
    """``call()``, with ``at_line(n)`` before lines n of the package's code, as a signal handler could run there: each
    line of it at the first two times that it is run."""
    count = 0
    seen: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if "pace_kernels" not in frame.f_code.co_filename:
            return None
        place = (frame.f_code.co_filename, frame.f_lineno)
        seen[place] += event == "line"
        if event == "line" and seen[place] <= 2:
            sys.settrace(None)
            count += 1
            at_line(count)
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    gc.disable()  # whose callbacks are lines of the package too, and end exceptions
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()


def saved_at_every_line(call: Any, saves: list[Any]) -> tuple[list[Any], int]:
    """What each of ``saves`` gave before each line of ``call()``, and how many were refused."""
    found, refused = [], 0

    def save(one: Any) -> None:
        nonlocal refused
        try:
            found.append(copy.deepcopy(one()))
        except RuntimeError as error:
            assert "in the middle of a step" in str(error)
            refused += 1

    traced(call, lambda _: list(map(save, saves)))
    return found, refused


def stopped_at_every_line(
    model: torch.nn.Module, optimizer: Any, before: Any, after: Any, calls: list[Any]
) -> dict[str, int]:
    """Steps again and again from ``before``, with an exception one line later each time: how often all was as before
    the step, or as after it, or all ``calls`` refused."""
    ends = {"before": 0, "after": 0, "refused": 0}
    line = 0
    while True:
        line += 1
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
        set_grads(model, 1)

        def stop(n: int, line: int = line) -> None:
            if n == line:
                raise Stop

        try:
            traced(optimizer.step, stop)
            return ends  # there are no more lines
        except Stop:
            pass
        try:
            state = kept(model, optimizer)
        except RuntimeError:
            for call in calls:
                with pytest.raises(RuntimeError, match="in the middle of a step"):
                    call()
            ends["refused"] += 1
            continue
        assert same(state, before) or same(state, after), f"line {line}"
        ends["before" if same(state, before) else "after"] += 1


@pytest.mark.parametrize("t", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("layout", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_who_saves_at_any_line_of_a_step_has_a_whole_state(kind: str, layout: str, backend: str | None, t: int) -> None:
    model, optimizer = built(kind, layout, backend)
    for earlier in range(t):
        set_grads(model, earlier)
        optimizer.step()
    set_grads(model, t)
    before = kept(model, optimizer)
    found, refused = saved_at_every_line(optimizer.step, [lambda: kept(model, optimizer)])
    after = kept(model, optimizer)
    assert not same(before, after) and len(found) > 20
    for n, state in enumerate(found):
        assert same(state, before) or same(state, after), f"at line {n}"
    # Native kernels of one device take the step at once, with nothing to refuse.
    if backend is None and layout == "one group":
        assert refused == 0
    elif backend == "torch":
        assert refused > 0


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("kind", ["PACE", "PACE in codes", "MADA", "schedule-free", "schedule-free in codes"])
@pytest.mark.slow
def test_an_exception_at_any_line_of_a_step_leaves_a_whole_state_or_says_so(kind: str, backend: str | None) -> None:
    layout = "two groups, mixed" if backend is None else "one group"
    model, optimizer = built(kind, layout, backend)
    set_grads(model, 0)
    optimizer.step()
    set_grads(model, 1)
    before = kept(model, optimizer)
    reference, other = built(kind, layout, backend)
    reference.load_state_dict(before[0])
    other.load_state_dict(before[1])
    set_grads(reference, 1)
    other.step()
    after = kept(reference, other)
    ends = stopped_at_every_line(model, optimizer, before, after, [optimizer.step])
    assert ends["before"] > 20, ends
    if backend == "torch":
        assert ends["refused"] > 0, ends
