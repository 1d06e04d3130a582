"""Promise: what lies in memory where a step can't take it is refused before anything has changed, or stepped right:
parameters over one memory, at odd addresses, of other shapes; storage that was emptied or made smaller."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, backend, clip_coefficient
from pace_kernels.memory import aligned, as_bytes, is_askew, overlap_in_part

Optimizer = Callable[..., Any]
KINDS: dict[str, Optimizer] = {
    "PACE": lambda params, **k: PACE(params, lr=0.1, **k),
    "MADA": lambda params, **k: MADA(params, lr=0.1, hyper_warmup=0, use_ema_eval=True, **k),
    "lion": lambda params, **k: MADA.preset("lion", params, lr=0.1, **k),
    "schedule-free": lambda params, **k: ScheduleFreeAdamW(params, lr=0.1, **k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("name", [None, "torch"])


def askew(values: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The same values at an address that is no multiple of their size."""
    size = values.numel() * values.element_size()
    memory = torch.zeros(size + 16, dtype=torch.uint8)
    start = -memory.data_ptr() % 8 + by
    moved = torch.frombuffer(memory.numpy(), dtype=values.dtype, count=values.numel(), offset=start).view(values.shape)
    as_bytes(moved).copy_(as_bytes(values.contiguous()))
    return moved


def grads_for(params: list[torch.Tensor], t: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


# ---- one memory ----


@every_backend
@every_kind
@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_over_one_memory_step_one_after_the_other(kind: str, name: str | None, groups: int) -> None:
    """As optimizers that have one parameter each, called in turn."""
    weight = torch.randn(40_000)
    twins = [torch.nn.Parameter(weight.clone()), torch.nn.Parameter(torch.randn(3))]
    twins.append(torch.nn.Parameter(twins[0].detach()))
    make = KINDS[kind] if kind != "MADA" else lambda some, **k: MADA(some, lr=0.1, learn=(), use_ema_eval=True, **k)
    optimizer = make([{"params": twins}] if groups == 1 else [{"params": [p]} for p in twins], backend=name)
    alone = torch.nn.Parameter(weight.clone())
    first, second = (make([alone], backend=name) for _ in range(2))
    if kind != "lion":
        name_of = "z" if kind == "schedule-free" else "ema"
        second.state[alone][name_of] = (
            weight.clone()
        )  # averages start at the weights before the step, of all parameters
    for t in range(3):
        grads = grads_for(twins, t)
        for param, grad in zip(twins, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for each, grad in ((first, grads[0]), (second, grads[2])):
            alone.grad = grad
            each.step()
        assert torch.equal(alone, twins[0]) and torch.equal(alone, twins[2])
    for twin, each in ((twins[0], first), (twins[2], second)):
        for key, value in each.state[alone].items():
            assert torch.equal(value, optimizer.state[twin][key])


OVERLAPS = {
    "the same": (lambda w: w.view(24), None),
    "transposed": (lambda w: w.view(4, 6).t(), None),
    "a slice": (lambda w: w[3:9], (0, 1)),
    "at the start": (lambda w: w[:9], (0, 1)),
    "every second": (lambda w: w[::2], (0, 1)),
    "as another dtype": (lambda w: w.view(torch.bfloat16), (0, 1)),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_an_overlap_in_part_is_refused_by_name(case: str) -> None:
    view, pair = OVERLAPS[case]
    weight = torch.randn(24)
    one, other = torch.nn.Parameter(weight), torch.nn.Parameter(view(weight))
    assert overlap_in_part([one, other]) == pair
    if pair is None:
        PACE([one, other])
        return
    with pytest.raises(ValueError, match=r"'a' and parameter 'b' share a part of their memory"):
        PACE([("a", one), ("b", other)])
    optimizer = PACE([one])
    with pytest.raises(ValueError, match=r"params'\]\[0\] and param_groups\[1\]\['params'\]\[0\] share a part"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1
    # and where they come to overlap later
    apart = torch.nn.Parameter(torch.randn(24))
    optimizer.add_param_group({"params": [apart]})
    one.grad, before = torch.ones(24), one.detach().clone()
    apart.data = other.detach()
    apart.grad = torch.ones_like(apart)
    with pytest.raises(ValueError, match="share a part"):
        optimizer.step()
    assert torch.equal(one, before) and not optimizer.state.get(one)


def test_slices_in_between_each_other_are_apart() -> None:
    weight = torch.randn(4, 6)
    columns = [torch.nn.Parameter(weight[:, :2]), torch.nn.Parameter(weight[:, 2:5]), torch.nn.Parameter(weight[:, 5])]
    assert overlap_in_part(columns) is None
    assert overlap_in_part([*columns, weight[1:3, 4]]) == (1, 3)
    optimizer = PACE(columns)
    for param in columns:
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_frozen_parameters_may_overlap() -> None:
    weight = torch.randn(24)
    PACE([torch.nn.Parameter(weight), torch.nn.Parameter(weight[:3], requires_grad=False)])


# ---- odd addresses ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_backend
@every_kind
@pytest.mark.parametrize("what", ["params", "grads", "state", "twins"])
def test_odd_addresses_step_to_the_same_bits(kind: str, name: str | None, dtype: torch.dtype, what: str) -> None:
    backend.say_once.cache_clear()
    values = [torch.randn(5, 3).to(dtype), torch.randn(7).to(dtype)]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    moved = [torch.nn.Parameter(askew(v) if what in ("params", "twins") else v.clone()) for v in values]
    if what == "twins":
        params.append(torch.nn.Parameter(params[0].detach()))
        moved.append(torch.nn.Parameter(moved[0].detach()))
    one, other = KINDS[kind](params, backend=name), KINDS[kind](moved, backend=name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(3):
            for some, optimizer in ((params, one), (moved, other)):
                for param, grad in zip(some, grads_for(some, t), strict=True):
                    param.grad = askew(grad) if what == "grads" and some is moved else grad
                if what == "state" and some is moved and t == 1:
                    state = other.state[moved[0]]
                    key = {"lion": "exp_avg_lion", "schedule-free": "z"}.get(kind, "exp_avg")
                    state[key] = askew(state[key])
                versions = [p._version for p in some]
                optimizer.step()
                assert all(p._version > v for p, v in zip(some, versions, strict=True))
    assert len([w for w in caught if "addresses" in str(w.message)]) == 1
    for a, b in zip(params, moved, strict=True):
        assert torch.equal(a, aligned(b))
        for key, value in one.state[a].items():
            assert torch.equal(value, other.state[b][key]), key
    assert all(is_askew(p) for p in moved) is (what in ("params", "twins"))


# ---- what is refused, whole ----


def shrink(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


def empty(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    def do(optimizer: Any, param: Any) -> None:
        optimizer.state[param][key] = change(optimizer.state[param][key])

    return do


def option(name: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda optimizer, _: optimizer.param_groups[1].__setitem__(name, value)


REFUSED: dict[str, Callable[[Any, Any], None]] = {
    "gradient shrunk": lambda _, p: shrink(p.grad),
    "gradient emptied": lambda _, p: empty(p.grad),
    "parameter shrunk": lambda _, p: shrink(p.data),
    "parameter emptied": lambda _, p: empty(p.data),
    "state shrunk": lambda o, p: shrink(o.state[p]["exp_avg_sq"]),
    "state emptied": lambda o, p: empty(o.state[p]["ema"]),
    "step count of int64": replaced("step", lambda t: t.long()),
    "step count of two elements": replaced("step", lambda t: torch.ones(2)),
    "step count emptied": lambda o, p: empty(o.state[p]["step"]),
    "state of float16": replaced("ema", lambda t: t.half()),
    "state on meta": replaced("exp_avg_sq", lambda t: t.to("meta")),
    "state expanded": replaced("exp_avg_sq", lambda t: torch.zeros(()).to(t.dtype).expand(t.shape)),
    "moment of another shape": replaced("exp_avg_sq", lambda t: torch.zeros(3, dtype=t.dtype)),
    "lr on meta": option("lr", torch.tensor(1e-2, device="meta")),
    "lr beyond": option("lr", float("inf")),
    "ema_update_freq of 71 bits": option("ema_update_freq", 2**70),
}


@pytest.mark.parametrize("second", [torch.float32, torch.float64], ids=["native", "another dtype"])
@every_backend
@pytest.mark.parametrize("kind", ["PACE", "MADA"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_in_the_second_group_leaves_the_first(
    kind: str, case: str, name: str | None, second: torch.dtype
) -> None:
    a, b = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(8).to(second))
    optimizer = KINDS[kind]([{"params": [a]}, {"params": [b]}], backend=name)
    for t in range(3):
        for param, grad in zip((a, b), grads_for([a, b], t), strict=True):
            param.grad = grad
        if t < 2:
            optimizer.step()
    before = a.detach().clone(), copy.deepcopy(optimizer.state[a])
    learned = optimizer.coefficients if kind == "MADA" else None
    REFUSED[case](optimizer, b)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert torch.equal(a, before[0])
    assert all(torch.equal(value, optimizer.state[a][key]) for key, value in before[1].items())
    assert not optimizer._unfinished and (learned is None or optimizer.coefficients == learned)


PATHS: dict[str, Callable[[torch.nn.Parameter], Any]] = {
    "first step": lambda p: PACE([p]).step(),
    "first step of MADA": lambda p: MADA([p], use_ema_eval=True).step(),
    "first step that skips": lambda p: PACE([p], skip_nonfinite=True).step(),
    "dry run": lambda p: PACE([p], lr=0.0).step(),
    "torch backend": lambda p: PACE([p], backend="torch").step(),
    "clip_coefficient": lambda p: clip_coefficient([p], 1.0),
    "clip_coef": lambda p: PACE([p]).step(clip_coef=_emptied()),
}


def _emptied() -> torch.Tensor:
    tensor = torch.ones(1)
    empty(tensor)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", [empty, shrink])
@pytest.mark.parametrize("path", PATHS)
def test_memory_that_is_gone_ends_in_a_sentence(
    path: str, how: Callable[[torch.Tensor], None], dtype: torch.dtype
) -> None:
    param = torch.nn.Parameter(torch.ones(300_000, dtype=dtype))
    param.grad = torch.ones_like(param)
    how(param.grad)
    with pytest.raises(RuntimeError, match="more elements than memory"):
        PATHS[path](param)


def gone(key: str) -> Callable[[Any, Any], None]:
    """Loads a checkpoint in which a state of the last parameter lost its memory."""

    def load(optimizer: Any, _: torch.nn.Module) -> None:
        saved = copy.deepcopy(optimizer.state_dict())
        empty(saved["state"][1][key])
        optimizer.load_state_dict(saved)

    return load


def export_a_buffer(optimizer: Any, model: torch.nn.Module) -> None:
    model.register_buffer("buffer", torch.ones(300_000))
    empty(model.buffer)
    optimizer.ema_state_dict(model)


def freeze(optimizer: Any, _: torch.nn.Module) -> None:
    empty(optimizer.state[optimizer.param_groups[0]["params"][1]]["last_grad"])
    optimizer.freeze()


def change_eps(optimizer: Any, _: torch.nn.Module) -> None:
    empty(optimizer.state[optimizer.param_groups[0]["params"][1]]["last_grad"])
    optimizer.param_groups[0]["eps"] = 1e-3
    optimizer.step()


def count_a_skipped_step(optimizer: Any, _: torch.nn.Module) -> None:
    optimizer.param_groups[0]["skipped_steps"] = torch.zeros((), dtype=torch.int64)
    empty(optimizer.param_groups[0]["skipped_steps"])
    optimizer.step()


AFTERWARDS: dict[str, tuple[Optimizer, Callable[[Any, torch.nn.Module], None]]] = {
    "export": (lambda p: PACE(p), export_a_buffer),
    "freeze": (lambda p: MADA(p), freeze),
    "changed options": (lambda p: MADA(p), change_eps),
    "count of skipped steps": (lambda p: PACE(p, skip_nonfinite=True), count_a_skipped_step),
    "average loaded": (lambda p: Pullback(torch.optim.SGD(p, lr=0.1), gain=0.1), gone("ema")),
    "moment loaded": (lambda p: Pullback(torch.optim.AdamW(p, lr=0.1)), gone("exp_avg_sq")),
}


@pytest.mark.parametrize("path", AFTERWARDS)
def test_memory_that_is_gone_after_a_step(path: str) -> None:
    make, call = AFTERWARDS[path]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(300_000)) for _ in range(2)])
    optimizer = make(list(model))
    for param in model:
        param.grad = torch.ones_like(param)
    optimizer.step()
    live = [param.detach().clone() for param in model]
    with pytest.raises((RuntimeError, ValueError), match="more elements than memory"):
        call(optimizer, model)
    assert all(map(torch.equal, live, model))


def test_an_option_without_memory_is_named() -> None:
    lr = torch.ones(300_000)
    empty(lr)
    with pytest.raises(ValueError, match=r"lr must be .*, got a tensor of shape \(300000,\) with less memory"):
        PACE([torch.nn.Parameter(torch.ones(1))], lr=lr)


# ---- other shapes ----


@every_backend
def test_an_average_of_another_shape_starts_anew(name: str | None) -> None:
    """Gaussian splatting grows its tensors, and moves Adam's states along."""
    backend.say_once.cache_clear()
    optimizer = PACE([torch.nn.Parameter(torch.randn(10, 3))], backend=name)
    group = optimizer.param_groups[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(4):
            param = group["params"][0]
            param.grad = torch.randn_like(param)
            optimizer.step()
            state = optimizer.state.pop(param)
            assert state["ema"].shape == param.shape and state["step"] == t + 1
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.cat([state[key], torch.zeros(2, 3)])
            group["params"][0] = torch.nn.Parameter(torch.cat([param.detach(), torch.randn(2, 3)]))
            optimizer.state[group["params"][0]] = state
    assert len([w for w in caught if "another shape" in str(w.message)]) == 1


# ---- what a step that was refused leaves ----


def test_statistics_stay_those_of_the_last_step_that_was_taken() -> None:
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = PACE([param], log_stats=True)
    param.grad = torch.randn(8)
    optimizer.step()
    stats = optimizer.get_step_stats()
    empty(param.grad)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.get_step_stats() == stats and stats["lambda_max"] > 0


@every_backend
@every_kind
def test_a_first_step_that_was_refused_leaves_no_state(kind: str, name: str | None) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = KINDS[kind]([param], backend=name)
    param.grad = torch.ones(4)
    empty(param.grad)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not optimizer.state.get(param)


def test_a_step_that_raises_is_not_counted_as_skipped() -> None:
    a, b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = PACE([{"params": [a]}, {"params": [b]}], skip_nonfinite=True)
    a.grad, b.grad = torch.full((4,), float("nan")), torch.ones(4)
    optimizer.step()
    optimizer.state[b] = {"step": torch.zeros((), dtype=torch.int64)}
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.skipped_steps == 1


LEARNED = ("coefficient_values", "coefficient_momenta", "hypergradients")


@pytest.mark.parametrize(
    "change", [lambda t: t[:2], lambda t: t.float(), lambda t: t.expand(2, 6)], ids=["short", "float32", "two rows"]
)
@pytest.mark.parametrize("name", LEARNED)
def test_learned_tensors_that_do_not_fit_are_refused_before_a_step(name: str, change: Any) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = MADA([p])
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.step()
    group = optimizer.param_groups[0]
    kept, before = group[name], p.detach().clone()
    group[name] = change(kept)
    with pytest.raises(ValueError, match=f"{name} must be a contiguous float64 tensor"):
        optimizer.step()
    assert torch.equal(p, before)
    group[name] = kept
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "change"),
    [("ema", lambda t: t.to("meta")), ("ema", lambda t: t[:1].expand(4)), ("pullback_step", lambda t: t.to("meta"))],
    ids=["ema on meta", "ema expanded", "step on meta"],
)
def test_a_pull_on_torch_is_refused_before_the_base_steps(name: str, change: Any) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = Pullback(torch.optim.AdamW([p], lr=0.1), backend="torch")
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.step()
    kept, before = optimizer.state[p][name], p.detach().clone()
    optimizer.state[p][name] = change(kept)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.state[p][name] = kept
    optimizer.step()


def test_a_rate_on_meta_is_refused_before_the_base_steps() -> None:
    one, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Pullback(torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=0.1), gain=0.1)
    one.grad, other.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    before = one.detach().clone()
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(RuntimeError, match="lr is a tensor on meta"):
        optimizer.step()
    assert torch.equal(one, before)


@pytest.mark.parametrize("shape", [(), (6,), (3, 3)], ids=str)
@pytest.mark.parametrize("name", ["hyper_clip", "hyper_warmup", "hyper_lr", "betas", "eps", "beta3", "ema_rho"])
def test_options_of_a_checkpoint_that_are_tensors_without_memory_are_refused(name: str, shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MADA([p])
    p.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = torch.ones(shape)
    saved["param_groups"][0][name].untyped_storage().resize_(0)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(saved)
    optimizer.step()
