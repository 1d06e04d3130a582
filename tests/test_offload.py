"""Promise: ``Offload`` has the bits of the optimizer that it holds, whatever comes between steps, with copies that come
late; and it refuses what it can't do."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import pace_kernels
from pace_kernels import MADA, PACE, Offload, Pullback, ScheduleFreeAdamW, twins
from pace_kernels.integrations.callbacks import averaging
from pace_kernels.lanes import CudaLane, Lane

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
LEARN = {"learn": ("beta1", "beta2", "rho"), "use_ema_eval": True, "coefficients": "global"}


class Late(Lane):
    """A device whose copies are made when they are waited for. Until then their memory holds NaNs."""

    def __init__(self) -> None:
        self.down: list[tuple[Tensor, Tensor]] = []
        self.up: list[tuple[Tensor, Tensor]] = []
        self.leaving: dict[int, Tensor] = {}  # what is on its way back, and must not be written
        self.fetched = self.clashes = self.entered = 0
        self.waited: list[int] = []

    def event(self) -> Any:
        return "asked"

    def fetch(self, source: Tensor, to: Tensor) -> Any:
        self.clashes += id(to) in self.leaving
        to.fill_(float("nan"))
        self.down.append((source.clone(), to))
        return len(self.down)

    def block(self, event: Any) -> None:
        if event == "sent":
            self.leaving.clear()
            return
        self.waited.append(event)
        for source, to in self.down[self.fetched : event]:
            to.copy_(source)
            self.fetched += 1

    def send(self, source: Tensor, to: Tensor, after: Any) -> None:
        assert after == "asked"
        self.clashes += source.data_ptr() in self.leaving
        to.fill_(float("nan"))
        self.up.append((source, to))

    def follow(self) -> Any:
        for source, to in self.up:
            with torch.autograd._unsafe_preserve_version_counter(to):
                to.copy_(source)
            self.leaving[source.data_ptr()] = source
        self.up.clear()
        return "sent"

    def within(self) -> Any:
        lane, asking = self, threading.get_ident()

        class Context:
            def __enter__(self) -> None:
                lane.entered += threading.get_ident() != asking

            def __exit__(self, *args: Any) -> None:
                pass

        return Context()


@pytest.fixture(autouse=True)
def lane(monkeypatch: pytest.MonkeyPatch) -> Late:
    late = Late()
    monkeypatch.setattr(twins, "lane_of", lambda device: late)
    return late


# Kinds: a class or function, dtype, options; and in which way it is offloaded.
KINDS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "pace": (PACE, torch.float32, {}),
    "average": (PACE, torch.float32, {"lambda_pullback": 0.0, "ema_update_freq": 2}),
    "codes": (PACE, torch.float32, {"state_bits": 8}),
    "masters": (PACE, torch.bfloat16, {"master_weight_bits": 32, "betas": (0.0, 0.9)}),
    "stochastic": (PACE, torch.bfloat16, {"stochastic_rounding": True, "ema_bits": 24}),
    "watched": (PACE, torch.float32, {"skip_nonfinite": True}),
    "fused": (PACE, torch.float32, {"fused": True, "log_stats": True}),
    "double": (PACE, torch.float64, {"maximize": True}),
    "mada": (MADA, torch.float32, LEARN),
    "first": (MADA, torch.float32, {**LEARN, "hyper_order": "published"}),
    "lion": (lambda groups, **o: MADA.preset("lion", groups, **o), torch.float32, {"use_ema_eval": True}),
    "free": (ScheduleFreeAdamW, torch.float32, {"warmup_steps": 4, "ema_bits": 16}),
    "around": (lambda groups, **o: Pullback(torch.optim.AdamW(groups, **o), ema_bits=8), torch.float32, {}),
    "gain": (lambda groups, **o: Pullback(torch.optim.SGD(groups, **o), gain=0.1), torch.float32, {"momentum": 0.9}),
}
WAYS: list[dict[str, Any]] = [
    {},
    {"bucket_bytes": 1},
    {"fraction": 0.5, "bucket_bytes": 4000},
    {"overlap": False, "fraction": 0.7, "bucket_bytes": 4000},
]


class Run:
    """A model that is trained, with or without Offload."""

    def __init__(self, kind: str, way: dict[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.factory, self.dtype, self.options = KINDS[kind]
        self.way, self.kind = way, kind
        self.model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).to(self.dtype)
        self.model[3].weight = self.model[2].weight  # tied: one parameter
        self.optimizer = self.made(self.model)
        self.seen: list[Tensor] = []

    def made(self, model: Any) -> Any:
        groups: list[Any] = [{"params": model[:2].parameters()}]
        groups.append({"params": model[2:4].parameters(), "weight_decay": 0.1})
        groups += [{"params": [layer.weight]} for layer in model[4:]]
        options = {"lr": 1e-2, **self.options}
        return (
            self.factory(groups, **options)
            if self.way is None
            else Offload(groups, self.factory, **self.way, **options)
        )

    def backward(self, scale: float = 1.0) -> None:
        (self.model(X.to(self.dtype)).square().mean() * scale).backward()

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()

    def shown(self) -> list[Tensor]:
        """All that a run leaves."""
        state = copy.deepcopy(self.optimizer.state_dict())
        states = [v for key in state["state"] for _, v in sorted(state["state"][key].items())]
        options = [v for group in state["param_groups"] for k, v in sorted(group.items()) if k != "params"]
        values = [*self.model.parameters(), *states, *options, *self.optimizer.get_step_stats().values(), *self.seen]
        return [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def editing(run: Run) -> Any:
    return run.optimizer.editing_weights()


def clipped_in_place(run: Run) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda k: 0.9**k)
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
        run.optimizer.step()
        schedule.step()


def clipped_in_the_step(run: Run) -> None:
    if isinstance(getattr(run.optimizer, "_inner", run.optimizer), Pullback):
        return
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        run.optimizer.step(clip_coef=pace_kernels.clip_coefficient(run.model.parameters(), 0.01)[0])
    run.optimizer.clip_coef = 0.5
    run.steps()
    run.optimizer.clip_coef = None


def accumulated(run: Run) -> None:
    for count in (2, 3, 3, 1, 2):
        run.optimizer.zero_grad()
        for k in range(count):
            run.backward(1.0 + k)
        run.optimizer.step()


def gradients_by_hand(run: Run) -> None:
    params = list(run.model.parameters())
    run.optimizer.zero_grad()
    run.optimizer.step()  # without any
    for i, param in enumerate(params):
        param.grad = None if i == 1 else torch.full_like(param, 0.1 * i)
    run.optimizer.step()
    run.backward()  # onto those
    params[0].grad = params[0].grad.data.mul_(0.5)  # the same memory, and the same version by chance
    params[2].grad = torch.ones((), dtype=run.dtype).expand(params[2].shape)
    params[3].grad.data = torch.full_like(params[3], 0.3)
    if run.dtype == torch.bfloat16 and hasattr(params[1], "grad_dtype"):
        params[1].grad, params[1].grad_dtype = None, torch.float32
        params[1].grad = torch.full_like(params[1], 0.1, dtype=torch.float32)
    run.optimizer.step()
    run.optimizer.step()  # with the same once more
    params[2].grad = None
    if run.dtype == torch.bfloat16 and hasattr(params[1], "grad_dtype"):
        params[1].grad, params[1].grad_dtype = None, run.dtype
    run.optimizer.zero_grad(set_to_none=False)
    run.backward()
    with torch.no_grad():
        params[0].grad.add_(1)
    run.optimizer.step()


def closures_and_hooks(run: Run) -> None:
    handles = [
        run.optimizer.register_step_pre_hook(lambda *a: run.seen.append(torch.tensor(1))),
        run.optimizer.register_step_post_hook(lambda o, *a: run.seen.append(o.param_groups[0]["params"][0].clone())),
    ]

    def closure() -> Any:
        run.optimizer.zero_grad()
        loss = run.model(X.to(run.dtype)).square().mean()
        loss.backward()
        return loss

    run.seen.append(run.optimizer.step(closure).detach())
    handles.append(register_optimizer_step_pre_hook(halve))
    run.steps(2)
    for handle in handles:
        handle.remove()


def halve(optimizer: Any, *_: Any) -> None:
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if param.grad is not None:
            param.grad.mul_(0.5)


def scaled(run: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for i in range(7):
        run.optimizer.zero_grad()
        scaler.scale(run.model(X.to(run.dtype)).square().mean()).backward()
        if i in (2, 5):  # which are left undone
            run.model[0].weight.grad.fill_(float("inf"))
        if i > 3:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        scaler.step(run.optimizer)
        scaler.update()


def nonfinite(run: Run) -> None:
    if run.kind == "watched":
        run.optimizer.zero_grad()
        run.backward()
        run.model[0].weight.grad[0, 0] = float("nan")
        run.optimizer.step()
        run.seen.append(torch.tensor(run.optimizer.skipped_steps))
        assert run.optimizer.skipped_steps > 0


def weights_written(run: Run) -> None:
    with editing(run), torch.no_grad():
        run.model[0].weight.clamp_(-0.1, 0.1)
        run.model.load_state_dict({k: v * 1.01 for k, v in run.model.state_dict().items()})
    run.steps()
    with editing(run):
        for layer in run.model[:2]:
            layer.bias.data = layer.bias.data + 0.5  # other memory
        run.backward()  # written between a backward pass and the step
        run.model[2].bias.data = torch.ones(32, dtype=run.dtype)
    run.optimizer.step()


def averages(run: Run) -> None:
    before = [p.detach().clone() for p in run.model.parameters()]
    with run.optimizer.averaged(run.model):
        run.seen += [p.detach().clone() for p in run.model.parameters()]
        run.seen.append(run.model(X.to(run.dtype)).detach())
        with pytest.raises(RuntimeError, match="swapped in"):
            run.optimizer.step()
    assert all(map(torch.equal, before, run.model.parameters()))
    with pytest.raises(ZeroDivisionError), pace_kernels.averaged(run.model, run.optimizer):
        raise ZeroDivisionError
    exported = (*run.optimizer.ema_state_dict(run.model).values(),)
    run.seen += [*exported, *pace_kernels.ema_state_dict(run.model, run.optimizer, dtype=torch.float32).values()]
    assert all(map(torch.equal, before, run.model.parameters()))
    if run.kind == "masters":
        run.seen += run.optimizer.master_state_dict(run.model).values()


def loaded_while_swapped(run: Run) -> None:
    run.optimizer.eval(run.model)
    with torch.no_grad():
        run.model[1].weight.mul_(0.5)
    if run.kind != "free":
        with pytest.raises(RuntimeError, match="was changed between"):
            run.optimizer.train(run.model)
    run.optimizer.train(run.model, keep="loaded")
    run.steps()
    run.optimizer.eval()
    run.seen += [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.train()


def moved_to_and_fro(run: Run) -> None:
    """The checkpoint goes to an optimizer of the other sort, and what that makes of it comes back."""
    saved = copy.deepcopy(run.optimizer.state_dict())
    way, run.way = run.way, None if run.way is not None else WAYS[1]
    weights = copy.deepcopy(run.model.state_dict())
    other = copy.deepcopy(run.model)
    other[3].weight = other[2].weight
    optimizer = run.made(other)
    optimizer.load_state_dict(pickle.loads(pickle.dumps(saved)))
    for _ in range(2):
        optimizer.zero_grad()
        other(X.to(run.dtype)).square().mean().backward()
        optimizer.step()
    run.way = way
    run.model.load_state_dict(other.state_dict())
    run.optimizer.load_state_dict(optimizer.state_dict())
    assert not torch.equal(weights["0.weight"], run.model[0].weight)


def options_changed(run: Run) -> None:
    groups = run.optimizer.param_groups
    groups[0]["lr"], groups[1]["weight_decay"] = 5e-3, 0.0
    if run.kind in ("pace", "watched"):
        groups[0]["state_bits"] = 16
    run.steps(2)
    groups[0]["lr"] = torch.tensor(2e-3) if run.kind not in ("around", "gain") else 2e-3
    run.steps(2)
    groups[0]["lr"] = 1e-2


def frozen_and_added(run: Run) -> None:
    run.model[0].weight.requires_grad_(False)
    run.optimizer.zero_grad()
    run.steps(2)
    run.model[0].weight.requires_grad_(True)
    run.steps(2)
    if len(run.optimizer.param_groups) < 4:
        torch.manual_seed(1)
        run.model.append(nn.Linear(32, 32).to(run.dtype))
        run.optimizer.add_param_group({"params": [run.model[-1].weight]})
    run.steps(2)


def frozen_with_a_gradient(run: Run) -> None:
    run.model[0].weight.requires_grad_(False)
    for _ in range(2):
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.backward()
    run.model[0].weight.requires_grad_(True)


def other_threads(run: Run) -> None:
    thread = threading.Thread(target=run.steps)
    thread.start()
    thread.join()


EVENTS: list[Callable[[Run], Any]] = [
    clipped_in_place, clipped_in_the_step, accumulated, gradients_by_hand, closures_and_hooks, scaled, nonfinite,
    weights_written, averages, loaded_while_swapped, moved_to_and_fro, options_changed, frozen_and_added,
    frozen_with_a_gradient, other_threads,
]  # fmt: skip


def check(kind: str, way: dict[str, Any], events: list[Callable[[Run], Any]], lane: Late) -> None:
    plain, away = Run(kind, None), Run(kind, way)
    for event in [lambda run: None, *events]:
        for run in (plain, away):
            event(run)
            run.steps(2)
        for a, b in zip(plain.shown(), away.shown(), strict=True):
            same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
            assert same, getattr(event, "__name__", event)
    assert not lane.clashes and not lane.up
    kept = away.optimizer._twins
    assert all(twin.copied is None for twin in kept.order) and len(kept._lists) == len(away.optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:averaged", "ignore:get_step_stats", "ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind: str, way: int, lane: Late) -> None:
    if way in ((1,) if kind == "double" else (1, 2, 3) if KINDS[kind][0] is PACE else (0, 2)):
        check(kind, WAYS[way], EVENTS, lane)
        assert lane.entered > 0


@pytest.mark.filterwarnings("ignore:get_step_stats")
@pytest.mark.parametrize("kind", ("pace", "free"))
def test_bits_of_a_model_that_is_converted_in_mid_training(kind: str, lane: Late) -> None:
    def converted(run: Run) -> None:
        with editing(run):
            run.model.bfloat16()
        run.dtype = torch.bfloat16
        run.optimizer.zero_grad()

    check(kind, WAYS[2], [converted], lane)


@pytest.mark.filterwarnings("ignore:averaged", "ignore:get_step_stats", "ignore:.*lr_scheduler.step")
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(WAYS), st.lists(st.sampled_from(EVENTS), max_size=5))
@settings(max_examples=10, deadline=None)
def test_bits_in_any_order(kind: str, way: dict[str, Any], events: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        late = Late()
        patch.setattr(twins, "lane_of", lambda device: late)
        check(kind, way, events, late)


# ---- what waits for what ---------------------------------------------------------------------------------------------


def made(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    return model, Offload(model.parameters(), PACE, **{"lr": 1e-2, "bucket_bytes": 1, **options})


def train(model: Any, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def test_each_bucket_waits_for_its_own_gradient_in_the_order_in_which_they_came(lane: Late) -> None:
    model, optimizer = made(check_writes=False)
    train(model, optimizer)
    told: list[Any] = []
    step = optimizer._inner.step
    optimizer._inner.step = lambda **given: (told.append(len(lane.waited)), step(**given))
    optimizer.zero_grad()
    model[0](model[1](X)).square().mean().backward()  # in another order than that of registration
    first, lane.waited = len(lane.down) - 3, []
    optimizer.step()
    # A wait and a step for each weight and bias, in the order in which they came.
    assert lane.waited == [first, first + 1, first + 2, first + 3] and told == [1, 2, 3, 4]
    assert len(lane.down) == first + 3, "step() copied nothing more"


def test_gradients_are_copied_during_backward_and_of_several_only_the_last(
    lane: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(check_writes=False)
    train(model, optimizer)
    for passes, copies in ((3, 3), (3, 1), (1, 0), (1, 1)):  # as the step before tells; where it misleads, by step()
        optimizer.zero_grad()
        before = len(lane.down)
        for _ in range(passes):
            model(X).square().mean().backward()
        assert len(lane.down) - before == 4 * copies
        optimizer.step()
        assert len(lane.down) - before == 4 * max(copies, 1)
    optimizer.zero_grad()
    model(X).square().mean().backward()
    kept = weakref.ref(model[0].weight.grad)
    optimizer.zero_grad()  # a step that is left out
    assert kept() is None
    for patched in (lambda: setattr(optimizer._twins, "overlap", False), lambda: None):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        before = len(lane.down)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        assert len(lane.down) == before
        optimizer.step()
        assert len(lane.down) == before + 4
        monkeypatch.undo()
        patched()


def test_weights_are_copied_anew_only_where_others_wrote_them(lane: Late) -> None:
    model, optimizer = made(check_writes=False)
    train(model, optimizer, 2)
    before = len(lane.down)
    train(model, optimizer)
    with torch.no_grad():
        model[0].bias.add_(1)
    train(model, optimizer)
    optimizer.state_dict()
    assert len(lane.down) == before + 4 + 4 + 1


def test_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is one call of C: nothing is collected anew."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    optimizer = Offload(model.parameters(), PACE, fraction=0.9, bucket_bytes=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    train(model, optimizer, 3)
    gc.collect()
    monkeypatch.setattr(optimizer._inner, "_collect", None)
    for _ in range(3):
        train(model, optimizer)
        schedule.step()


def test_of_a_gpu_the_copies_are_beside_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Fake:
        """A stream, an event or a tensor, which tells what it is asked."""

        def __init__(self, name: Any = "event", **options: Any) -> None:
            self.name = str(name)

        def __getattr__(self, asked: str) -> Any:
            return lambda *args, **options: told.append((self.name, asked, *(getattr(a, "name", a) for a in args)))

        def __enter__(self) -> None:
            told.append(("within", self.name))

        def __exit__(self, *args: Any) -> None:
            told.append(("end",))

    streams = iter(("down", "up"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Fake(next(streams)))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Fake())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Fake("now"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    lane = CudaLane(torch.device("cuda", 0))
    assert lane.follow() is None and lane.block(None) is None
    for _ in range(2):
        event = lane.fetch(Fake("gradient"), Fake("host"))  # type: ignore[arg-type]
    copies = [
        ("down", "wait_stream", "now"),
        ("within", "down"),
        ("host", "copy_", "gradient"),
        ("end",),
        ("gradient", "record_stream", "down"),
        ("event", "record", "down"),
    ]
    assert told == 2 * copies
    told.clear()
    lane.block(event)
    after = lane.event()
    lane.send(Fake("host"), Fake("weight"), after)  # type: ignore[arg-type]
    lane.block(lane.follow())
    with lane.within():
        pass
    assert told == [
        ("event", "synchronize"),
        ("event", "record", "now"),
        ("up", "wait_event", "event"),
        ("within", "up"),
        ("weight", "copy_", "host"),
        ("end",),
        ("now", "wait_stream", "up"),
        ("event", "record", "up"),
        ("event", "synchronize"),
        ("within", "now"),
        ("end",),
    ]


# ---- what is refused, and what fails ---------------------------------------------------------------------------------

WEIGHT = nn.Parameter(torch.ones(4, 4))
MEMORY = torch.ones(8)
REFUSED: list[tuple[Callable[[], Any], type, str]] = [
    (lambda: Offload([WEIGHT], PACE, fraction=1.5), ValueError, r"fraction must be in \[0, 1\], got 1.5"),
    (lambda: Offload([{"params": [WEIGHT], "fraction": None}], PACE), TypeError, "fraction must be a number"),
    (lambda: Offload([WEIGHT], PACE, bucket_bytes=0), ValueError, "bucket_bytes must be >= 1, got 0"),
    (lambda: Offload([WEIGHT], PACE, overlap=1), ValueError, "overlap must be"),
    (lambda: Offload([WEIGHT], PACE([WEIGHT])), TypeError, "optimizer_class must be a class or a function, got PACE"),
    (lambda: Offload([WEIGHT], torch.optim.AdamW), TypeError, "must make a PACE, MADA, .*, got AdamW"),
    (lambda: Offload([WEIGHT], lambda groups: None), TypeError, "must make a PACE, MADA, .*, got NoneType"),
    (lambda: Offload([WEIGHT], lambda groups: PACE([WEIGHT])), TypeError, "must make the optimizer of the groups"),
    (lambda: Offload([WEIGHT], PACE, capturable=True), ValueError, "needs capturable=False"),
    (lambda: Offload([WEIGHT], PACE, lambda_pullback=0.0, ema_device="cpu"), ValueError, "ema_device must be None"),
    (lambda: Offload([WEIGHT, WEIGHT], PACE), ValueError, "same parameter more than once"),
    (lambda: Offload([nn.Parameter(MEMORY), nn.Parameter(MEMORY)], PACE), ValueError, "share memory"),
    (lambda: Offload(nn.LazyLinear(4).parameters(), PACE), ValueError, "is lazy: run the model once"),
    (lambda: Offload([nn.Parameter(torch.ones(2, device="meta"))], PACE), ValueError, "is on meta"),
    (lambda: Offload([WEIGHT * 2], PACE), ValueError, "is no leaf"),
    (lambda: Offload([1], PACE), TypeError, r"param_groups\[0\]\['params'\]\[0\] must be a tensor, got int"),
    (lambda: Offload([{"lr": 1}], PACE), TypeError, r"param_groups\[0\] must be a dict with 'params'"),
    (lambda: Offload([], PACE), ValueError, "params must be parameters or groups of them"),
    (lambda: copy.deepcopy(Offload([WEIGHT], PACE)), TypeError, "can't be copied or pickled"),
    (lambda: pickle.dumps(Offload([WEIGHT], PACE)), TypeError, "can't be copied or pickled"),
    (lambda: Offload([WEIGHT], PACE).eval(nn.Linear(2, 2)), ValueError, "model has no parameter that this optimizer"),
    (lambda: Offload([WEIGHT], PACE).nonsense, AttributeError, "object has no attribute 'nonsense'"),
]


@pytest.mark.parametrize("job, kind, sentence", REFUSED)
def test_refused(job: Any, kind: Any, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        job()
    assert not (WEIGHT._post_accumulate_grad_hooks or {}) or "made" not in sentence


def shard() -> Tensor:
    class Wrapped(Tensor):
        pass

    return nn.Parameter(torch.ones(2)).as_subclass(Wrapped).detach().requires_grad_()


def set_option(name: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda model, optimizer: optimizer.param_groups[0].update({name: value})


def sparse(model: Any, _: Any) -> None:
    model[0].weight.grad = torch.ones(32, 32).to_sparse()


def resized(model: Any, _: Any) -> None:
    model[0].weight.grad = torch.ones(32, 32)
    model[0].weight.grad.untyped_storage().resize_(0)


def emptied(model: Any, _: Any) -> None:
    model[1].bias.data = torch.ones(32)
    model[1].bias.untyped_storage().resize_(0)


def tied(model: Any, _: Any) -> None:
    model[1].bias.data = model[0].bias.data


BEFORE_A_STEP: list[tuple[Callable[[Any, Any], Any], str]] = [
    (set_option("capturable", True), "needs capturable=False"),
    (set_option("ema_device", "cpu"), "ema_device must be None"),
    (set_option("lr", -1.0), "lr must be"),
    (set_option("params", [nn.Parameter(torch.ones(2))]), r"use add_param_group\(\)"),
    (sparse, "gradients must be dense"),
    (resized, "more elements than memory"),
    (tied, "share memory"),
    (emptied, "more elements than memory"),
    (lambda m, o: o.add_param_group({"params": [shard()]}), "is a Wrapped: Offload is for plain tensors"),
    (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1}), "lr must be"),
    (lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))], "capturable": True}), "capturable=False"),
    (lambda m, o: o.load_state_dict({"state": {}}), "must have 'state' and 'param_groups'"),
]


@pytest.mark.parametrize("fault, sentence", BEFORE_A_STEP)
def test_what_is_refused_changes_nothing(fault: Any, sentence: str) -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    data, group = model[1].bias.data, dict(optimizer.param_groups[0])
    model(X).square().mean().backward()
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        fault(model, optimizer)
        optimizer.step()
    model[1].bias.data = data
    optimizer.param_groups[0].update(group)
    optimizer.param_groups[0].pop("ema_device", None)
    assert len(optimizer.param_groups) == 1 and all(map(torch.equal, weights.values(), model.state_dict().values()))
    again, other = optimizer.state_dict(), made()
    assert all(torch.equal(v, again["state"][k][n]) for k, s in saved["state"].items() for n, v in s.items())
    other[0].load_state_dict(weights)
    other[1].load_state_dict(saved)
    for run in ((model, optimizer), other):
        train(*run, 2)
    assert all(map(torch.equal, model.parameters(), other[0].parameters()))


@pytest.mark.parametrize("first", (True, False))
def test_writes_that_torch_does_not_count_are_refused(first: bool) -> None:
    for options, writes, sentence in (
        ({}, lambda m: m[1].weight.grad.data.clamp_(-1e-4, 1e-4), r"a gradient of .*\(32, 32\) was .*overlap=False"),
        ({}, lambda m: m[0].bias.data.mul_(0.9), r"a parameter of shape \(32,\) was .*under torch.no_grad"),
        ({"check_writes": False}, lambda m: m[0].bias.data.mul_(0.9), ""),
        ({"overlap": False}, lambda m: m[1].weight.grad.data.neg_(), ""),
    ):
        model, optimizer = made(**options)
        train(model, optimizer, 0 if first else 2)
        model(X).square().mean().backward()
        writes(model)
        if not sentence:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=sentence):
            optimizer.step()
        assert bool(optimizer._inner.state) is not first
        if first and "gradient" in sentence:
            optimizer.step()  # which copies it as it is
            continue
        with pytest.raises(RuntimeError, match=sentence if first else "in the middle of a step"):
            optimizer.step()
        if first:
            optimizer.state_dict()  # which copies the weight as it is
            optimizer.step()


def test_between_steps_writes_that_torch_does_not_count_are_taken() -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    model[0].bias.data.mul_(0.9)
    model[1].bias.requires_grad_(False).data.mul_(0.9)  # which steps no more
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged(model):
        assert not torch.equal(before[1], model[0].bias)
    assert all(map(torch.equal, before, model.parameters()))
    model[1].bias.data.mul_(0.9)
    optimizer.zero_grad()
    train(model, optimizer)


def test_a_model_may_go_to_another_device() -> None:
    """Which is a GPU's as a rule: its prints are there, and its copies in pinned memory."""
    model, optimizer = made()
    train(model, optimizer, 2)
    twin = optimizer._twins.order[0]
    twin.seen, twin.print = (*twin.seen[:2], torch.device("meta"), *twin.seen[3:]), twin.print.to("meta")
    before = twin.tensor.data_ptr()
    optimizer.state_dict()
    assert twin.tensor.data_ptr() != before and twin.gradient is None
    train(model, optimizer)


def test_an_error_half_way_is_told_until_a_checkpoint_is_loaded(lane: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    for waits in (0, 2):  # before the first bucket, and in the third
        left, block = [waits], lane.block

        def fail(event: Any, left: Any = left, block: Any = block) -> None:
            if event != "sent":
                left[0] -= 1
                if left[0] < 0:
                    raise MemoryError("no memory")
            block(event)

        optimizer.zero_grad()
        model(X).square().mean().backward()
        with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no memory"):
            patch.setattr(lane, "block", fail)
            optimizer.step()
        if waits:
            for call in (optimizer.step, optimizer.state_dict, optimizer.eval):
                with pytest.raises(RuntimeError, match=r"in the middle of a step.*load the last checkpoint"):
                    call()
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved)
        train(model, optimizer)
        assert optimizer.state_dict()["state"][0]["step"] == 3
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)


def test_an_interrupt_waits_for_the_step_and_handlers_within_it_are_refused(
    lane: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, optimizer), (other, plain) = made(), made()
    train(model, optimizer, 2)
    train(other, plain, 3)
    refused: list[str] = []

    def handler(*_: Any) -> None:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            refused.append(str(error))
        raise KeyboardInterrupt

    main, block = threading.get_ident(), lane.block

    def interrupt(event: Any) -> None:
        if threading.get_ident() != main and event != "sent":
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
        block(event)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lane, "block", interrupt)
            train(model, optimizer)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused and "in the middle of a step or of another call" in refused[0]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for run in ((model, optimizer), (other, plain)):
        train(*run)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_an_interrupt_right_behind_another_waits_too(lane: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, optimizer), (other, plain) = made(), made()
    train(model, optimizer, 2)
    train(other, plain, 4)

    def do(job: Any) -> None:
        optimizer._twins.worker.submit(lambda: (time.sleep(0.1), job()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optimizer._twins, "do", do)
        train(model, optimizer)
    train(model, optimizer)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_an_interrupt_at_the_end_of_a_context_leaves_the_average_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), optimizer.averaged(model):
        patch.setattr(twins, "looks", interrupt)
    gc.collect()
    with pytest.raises(RuntimeError, match="swapped in"):
        optimizer.step()
    optimizer.train(model)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_forked_process_goes_on() -> None:
    model, optimizer = made()
    train(model, optimizer, 2)
    child = os.fork()
    if child == 0:
        train(model, optimizer)
        os._exit(int(optimizer.state_dict()["state"][0]["step"]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


# ---- what it is to others --------------------------------------------------------------------------------------------


def test_a_model_and_its_optimizer_are_freed() -> None:
    model, optimizer = made()
    train(model, optimizer, 3)
    optimizer.param_groups[0]["params"].pop()
    dropped = weakref.ref(model[1].bias)
    model[1].bias = None
    train(model, optimizer)
    gone = [dropped, weakref.ref(model[0].weight)]
    optimizer._inner.state.clear()
    del model
    optimizer = weakref.ref(optimizer)
    gc.collect()
    assert optimizer() is None and all(ref() is None for ref in gone[1:])


def test_memory_state_and_name() -> None:
    model, optimizer = made(fraction=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.defaults["lr"] == 1e-2
    assert "2 of 4 parameters in host memory" in repr(optimizer) and "PACE" in repr(optimizer)
    assert not optimizer.state and optimizer.get_step_stats() == {}
    model(X).sum().backward()
    optimizer.step()
    assert [twin.away for twin in optimizer._twins.order] == [False, False, True, True], "whose gradients come first"
    half = sum(p.numel() for p in model[1].parameters())
    memory = optimizer.memory()
    assert memory.host == half * 20 + 2 * 4 and memory.weights == memory.gradients == half * 8
    assert "Offload(PACE)" in str(memory) and "in host memory: states" in str(memory)
    assert f": {8 + 12 / 2:.2f} bytes per element beside host memory" in str(memory)
    assert list(optimizer.state) == list(model.parameters()) and model[0].bias in optimizer.state
    groups = optimizer.param_groups
    for param in model.parameters():  # as trainers move states
        optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}
    train(model, optimizer)
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters()) and len(optimizer.state) == 4
    with pytest.raises(KeyError):
        del optimizer.state[WEIGHT]
    with pytest.raises(KeyError):
        optimizer.state.pop(WEIGHT)
    assert optimizer.state.get(WEIGHT) is optimizer.state.pop(WEIGHT, None) is None and len(optimizer.state) == 4
    kept, bias = dict(optimizer.state), model[0].bias
    optimizer.state = optimizer.param_groups = []  # as code that starts anew does
    assert not optimizer.state and not optimizer._inner.state and optimizer.state.setdefault(bias, {"a": 1}) == {"a": 1}
    optimizer.state, optimizer.param_groups = kept, groups
    train(model, optimizer)
    assert averaging(optimizer, model) is optimizer and len(optimizer._entries(optimizer.param_groups)) == 4
    assert optimizer._option(groups[0], "use_ema_eval") and not optimizer._swapped
    del optimizer.state[model[0].bias]
    assert model[0].bias not in optimizer.state


def test_it_may_be_made_in_inference_mode() -> None:
    model, _ = made()
    with torch.inference_mode():
        optimizer = Offload(model.parameters(), PACE)
    train(model, optimizer)


def test_a_frozen_parameter_may_be_sparse() -> None:
    model, frozen = nn.Linear(32, 32), nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    optimizer = Offload([*model.parameters(), frozen], PACE)
    train(model, optimizer, 2)
    assert len(optimizer.state_dict()["state"]) == 2


def test_it_falls_back_to_no_thread_and_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, optimizer), (other, plain) = made(), made()
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        for one, step in ((model, compiled), (other, plain.step)):
            one.zero_grad()
            one(X).square().mean().backward()
            step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_checkpoint_of_a_captured_run_is_loaded_without_capturable() -> None:
    model, optimizer = made()
    plain = PACE(model.parameters(), capturable=True)
    train(model, plain, 2)
    saved = plain.state_dict()
    optimizer.load_state_dict(saved)
    train(model, optimizer)
    assert not optimizer.param_groups[0]["capturable"] and saved["param_groups"][0]["capturable"]


def test_distributed_checkpoints_go_to_a_run_without_it(tmp_path: Any) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model, optimizer = made()
    train(model, optimizer, 2)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    other = copy.deepcopy(model)
    plain = PACE(other.parameters())
    dcp.set_optimizer_state_dict(other, plain, saved)
    train(other, plain)
    twice, again = made()
    twice.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(twice, again, saved)
    train(twice, again)
    train(model, optimizer)
    for one in (other, twice):
        assert all(map(torch.equal, model.parameters(), one.parameters()))
