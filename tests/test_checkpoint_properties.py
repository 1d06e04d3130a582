"""Promise: a training that is saved and loaded, at any moment and by any means, ends, bit for bit, where it would."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import mada_cases
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import through_a_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from pace_kernels import MADA, PACE
from pace_kernels.optimizer import KernelOptimizer
from pace_kernels.states import state_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SOON = {**mada_cases.INSIDE, "hyper_warmup": 1, "hyper_lr": 0.01}
SMALL_GAIN = {"eps": 1e-2}  # keeps the gain of an unclamped pullback below 1

# The scripts that a training is started by: the class, the options of all groups, and those of the second group.
SCRIPTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "PACE": (PACE, {}, {"lr": 0.1, "ema_update_freq": 2}),
    "PACE, everything": (
        PACE,
        {"weight_decay": 0.1, "pullback_from": "step", "ema_kappa": None, "log_stats": True, "maximize": True},
        {"betas": (0.0, 0.9), "use_ema_eval": False, "lambda_pullback": 3.0, "clamp_pullback": False, **SMALL_GAIN},
    ),
    "PACE, capturable, lr a tensor": (PACE, {"capturable": True, "skip_nonfinite": True}, {"lr": 0.02}),
    "AdamW": (PACE, {"lambda_pullback": 0.0, "use_ema_eval": False}, {}),
    "MADA": (MADA, SOON, {"weight_decay": 0.0}),
    "MADA, pulled": (MADA, {**SOON, "lambda_pullback": 2.0, "use_ema_eval": True, "hyper_momentum": 0.4}, {}),
    "MADA, by group": (
        MADA,
        {**SOON, "coefficients": "group", "second_moment": "max", "use_ema_eval": True},
        {"learn": ("beta1", "gamma"), "beta3": 0.0, "rho": 1.0},
    ),
    "MADA, capturable": (MADA, {**SOON, "capturable": True, "skip_nonfinite": True}, {}),
    "hyperadam": (
        lambda params, **options: MADA.preset("hyperadam", params, hyper_warmup=1, **options),
        {},
        {"lr": 0.02},
    ),
    "Adan": (lambda params, **options: MADA.preset("adan", params, **options), {"use_ema_eval": True}, {}),
    "Lion": (lambda params, **options: MADA.preset("lion", params, **options), {}, {"lr": 1e-2}),
}

# What changes in the middle of a training, for all groups or for one. Those of the wrong class are left out.
CHANGES: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": 0.05},
    {"weight_decay": 0.3},
    {"lambda_pullback": 0.0},
    {"lambda_pullback": 1.5},
    {"use_ema_eval": False},
    {"use_ema_eval": True},
    {"betas": (0.8, 0.9)},
    {"betas": (0.0, 0.99)},
    {"ema_update_freq": 3},
    {"eps": 1e-3},
    {"pullback_from": "step"},
    {"skip_nonfinite": True},
    {"capturable": True},
    {"rho": 0.5},
    {"gamma": 0.5},
    {"beta3": 0.2},
    {"lion_betas": (0.7, 0.8)},
    {"second_moment": "mean"},
    {"hyper_lr": {"rho": 0.3}},
    {"hyper_momentum": 0.2},
    {"bounds": {"c": (0.2, 0.9)}},
]


class Net(torch.nn.Module):
    """Weights that lie channels_last, tied ones, one without a dimension, one without an element, and a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.one = torch.nn.Linear(5, 2)
        self.tied = torch.nn.Linear(5, 2, bias=False)
        self.tied.weight = self.one.weight
        self.scalar = torch.nn.Parameter(torch.randn(()))
        self.empty = torch.nn.Parameter(torch.randn(0, 3))
        self.late = torch.nn.Linear(3, 2)  # trained from the moment on that its group is added
        self.to(dtype=dtype, memory_format=torch.channels_last)


class Training:
    """A script that builds a model and an optimizer, and what happens then. Gradients depend on the event alone."""

    def __init__(self, script: str, dtype: torch.dtype) -> None:
        self.script, self.dtype = script, dtype
        self.added: dict[str, Any] | None = None
        self.refused: list[str] = []
        self.model, self.optimizer = self.fresh()

    def fresh(self) -> tuple[Net, KernelOptimizer]:
        make, options, second = SCRIPTS[self.script]
        model = Net(self.dtype)
        lr = torch.tensor(0.01) if "lr a tensor" in self.script else 0.01
        first = [*model.conv.parameters(), model.scalar, model.norm.bias]
        rest = [*model.one.parameters(), model.empty, model.norm.weight]
        optimizer = make([{"params": first}, {"params": rest, **second}], **{"lr": lr, **options})
        if self.added is not None:
            optimizer.add_param_group({"params": list(model.late.parameters()), **self.added})
        return model, optimizer

    def step(self, index: int, resting: set[int], scale: float) -> None:
        generator = torch.Generator().manual_seed(index)
        for i, p in enumerate(self.model.parameters()):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
            p.grad = None if i in resting else grad.to(p.dtype)
        try:
            self.optimizer.step()
        except (RuntimeError, ValueError) as error:  # while swapped, say
            self.refused.append(str(error))

    def change(self, change: dict[str, Any], group: int | None) -> None:
        groups = self.optimizer.param_groups
        if {"hyper_lr", "hyper_momentum", "bounds"} & change.keys():
            group = None  # groups that share their coefficients learn them in one way
        for g in groups if group is None else [groups[group % len(groups)]]:
            for name, value in change.items():
                if name in g and name in self.optimizer.defaults:
                    hyper = name.startswith("hyper") or name == "bounds"
                    if hyper and not g["learn"]:
                        continue
                    g[name] = torch.tensor(value) if isinstance(g[name], torch.Tensor) else copy.copy(value)

    def add(self, options: dict[str, Any]) -> None:
        if self.added is None:
            try:
                self.optimizer.add_param_group({"params": list(self.model.late.parameters()), **options})
                self.added = options
            except ValueError as error:  # its coefficients would start elsewhere than those it shares
                self.refused.append(str(error))

    def move(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.model.to(dtype)

    def waits(self) -> bool:
        """Whether a state waits for the step that brings it to the dtype of its weights. To load is to cast it too, so
        that weights which become narrower and wide again, without a step, have states of fewer bits where it was saved
        in between."""
        states = self.optimizer.state.items()
        return any(s[k].dtype != state_dtype(p) for p, s in states for k in p_states(s))

    def freeze(self) -> None:
        if isinstance(self.optimizer, MADA):
            self.optimizer.freeze()

    def restore(self, how: str) -> None:
        model, optimizer = SAVES[how](self)
        for a, b in zip(self.model.parameters(), model.parameters(), strict=True):
            b.grad = a.grad
        self.model, self.optimizer = model, optimizer


def p_states(state: dict[str, Any]) -> set[str]:
    return set(state) - {"step", "live", "last_scalars"}


# ---- the ways to save ----


def with_model(training: Training) -> tuple[Net, KernelOptimizer]:
    model, optimizer = training.fresh()
    model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    return model, optimizer


def by_state_dict(through: Callable[[Any], Any]) -> Callable[[Training], tuple[Net, KernelOptimizer]]:
    def save(training: Training) -> tuple[Net, KernelOptimizer]:
        model, optimizer = training.fresh()
        kept, saved = through((training.model.state_dict(), training.optimizer.state_dict()))
        untouched = copy.deepcopy(model.state_dict())
        optimizer.load_state_dict(saved)
        assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
        model.load_state_dict(kept)
        return model, optimizer

    return save


def twice(training: Training) -> tuple[Net, KernelOptimizer]:
    """Loaded twice, over states of its own."""
    model, optimizer = with_model(training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.load_state_dict(training.model.state_dict())
    optimizer.load_state_dict(training.optimizer.state_dict())
    optimizer.load_state_dict(training.optimizer.state_dict())
    return model, optimizer


def into_itself(training: Training) -> tuple[Net, KernelOptimizer]:
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    return training.model, training.optimizer


def by_torchs_functions(flat: bool) -> Callable[[Training], tuple[Net, KernelOptimizer]]:
    def save(training: Training) -> tuple[Net, KernelOptimizer]:
        if training.optimizer._swapped and not training.optimizer.state:
            return whole(copy.deepcopy)(training)  # that creates states by a step
        # Where parameters have no state yet, torch wants not to be strict.
        options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
        model, optimizer = with_model(training)
        saved = copy.deepcopy(get_optimizer_state_dict(training.model, training.optimizer, options=options))
        set_optimizer_state_dict(model, optimizer, saved, options=options)
        return model, optimizer

    return save


def by_files(flat: bool, asynchronous: bool = False) -> Callable[[Training], tuple[Net, KernelOptimizer]]:
    def save(training: Training) -> tuple[Net, KernelOptimizer]:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        with tempfile.TemporaryDirectory() as folder:
            saved = {
                "model": training.model.state_dict(),
                "optimizer": get_optimizer_state_dict(training.model, training.optimizer, options=options),
            }
            if asynchronous:
                dcp.async_save(saved, checkpoint_id=folder, no_dist=True).result()
            else:
                dcp.save(saved, checkpoint_id=folder, no_dist=True)
            model, optimizer = with_model(training)
            held = {
                "model": model.state_dict(),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(held, checkpoint_id=folder, no_dist=True)
            model.load_state_dict(held["model"])
            set_optimizer_state_dict(model, optimizer, held["optimizer"], options=options)
        return model, optimizer

    return save


def whole(through: Callable[[Any], Any]) -> Callable[[Training], tuple[Net, KernelOptimizer]]:
    return lambda training: through((training.model, training.optimizer))


SAVES: dict[str, Callable[[Training], tuple[Net, KernelOptimizer]]] = {
    "pickle": whole(lambda pair: pickle.loads(pickle.dumps(pair))),
    "deepcopy": whole(copy.deepcopy),
    "torch.save": by_state_dict(through_a_file),
    "in memory": by_state_dict(lambda value: value),
    "twice": twice,
    "into itself": into_itself,
    "torch's functions": by_torchs_functions(flat=False),
}
# These need each parameter of the script to have its states, and those that a fresh optimizer has.
WHOLE_SAVES: dict[str, Callable[[Training], tuple[Net, KernelOptimizer]]] = {
    "torch's functions, flat": by_torchs_functions(flat=True),
    "dcp": by_files(flat=False),
    "flat dcp": by_files(flat=True),
    "async dcp": by_files(flat=False, asynchronous=True),
}


# ---- the comparison ----


def bits(value: Any) -> Any:
    """Comparable by ==, NaN too."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (
            str(value.dtype),
            str(value.device),
            tuple(value.shape),
            value.contiguous().numpy().tobytes()
            if (value.dtype != torch.bfloat16)
            else value.contiguous().view(torch.int16).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, (list, tuple)) else value


def summary(model: torch.nn.Module, optimizer: KernelOptimizer) -> dict[str, Any]:
    """All that a training is. States follow their weights' dtype at the next step, or when they are loaded; those of
    parameters that took no step yet are as good as none. "differentiable" is what torch adds to those of a pickle."""
    states = []
    for p in model.parameters():
        state = dict(optimizer.state.get(p, {}))
        if state and state["step"] > 0:
            cast = {k: v.to(state_dtype(p)) for k, v in state.items() if k in p_states(state)}
            states.append(state | cast)
        else:
            states.append({})
    skipped = {"skipped_steps": optimizer.skipped_steps}
    if isinstance(optimizer, MADA):
        for g in optimizer.param_groups:
            optimizer._by_name(g)  # the hyper options as the next step writes them
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "differentiable")} | skipped for g in optimizer.param_groups
    ]
    facts: dict[str, Any] = {
        "swapped": optimizer._swapped,
        "weights": model.state_dict(),
        "states": states,
        "groups": groups,
    }
    facts["averages"] = None
    if any(optimizer._keeps_average(g) for g in optimizer.param_groups):
        facts["averages"] = dict(optimizer.ema_state_dict(model))
    facts["defaults"] = {k: v for k, v in optimizer.defaults.items() if k != "differentiable"}
    return bits(facts)


def assert_same(a: Training, b: Training) -> None:
    one, other = summary(a.model, a.optimizer), summary(b.model, b.optimizer)
    assert one.keys() == other.keys() and a.refused == b.refused
    for key in one:
        assert one[key] == other[key], key


# ---- any sequence of events ----

ADDED: list[dict[str, Any]] = [{}, {"lr": 0.3}, {"lambda_pullback": 0.7, "use_ema_eval": True}, {"weight_decay": 0.2}]
N = len(list(Net(torch.float32).parameters()))

resting = st.one_of(st.just(set()), st.sets(st.integers(0, N - 1)))
steps = st.tuples(st.just("step"), resting, st.sampled_from([1.0, 1e-3, 1e-20, 1e4]))
changes = st.tuples(st.just("change"), st.sampled_from(CHANGES), st.one_of(st.none(), st.integers(0, 2)))
saves = st.tuples(st.just("restore"), st.sampled_from(list(SAVES)))
other = st.one_of(
    st.tuples(st.sampled_from(["eval", "train", "averaged", "zero_grad", "freeze", "nonfinite"])),
    st.tuples(st.just("add"), st.sampled_from(ADDED)),
    st.tuples(st.just("move"), st.sampled_from(DTYPES)),
)
events = st.one_of(steps, steps, changes, saves, saves, other)


def happen(training: Training, index: int, event: tuple[Any, ...]) -> None:
    name, *arguments = event
    if name == "step":
        training.step(index, *arguments)
    elif name == "nonfinite":
        training.step(index, set(), float("nan"))
    elif name == "averaged":
        with training.optimizer.averaged():
            training.step(index, set(), 1.0)
    elif hasattr(Training, name):
        getattr(training, name)(*arguments)
    else:
        getattr(training.optimizer, name)()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@given(dtype=st.sampled_from(DTYPES), happens=st.lists(events, min_size=3, max_size=14))
@settings(max_examples=80, deadline=None)
def test_any_training_ends_where_it_ends_without_saving(
    script: str, dtype: torch.dtype, happens: list[tuple[Any, ...]]
) -> None:
    saved, straight = Training(script, dtype), Training(script, dtype)
    for index, event in enumerate([("step", set(), 1.0), *happens, ("train",), ("step", set(), 1.0)]):
        if event[0] == "move" and straight.waits():
            continue
        happen(saved, index, event)
        if event[0] != "restore":
            happen(straight, index, event)
    assert_same(saved, straight)


def test_a_parameter_that_rests_while_its_differences_come_into_play() -> None:
    """Hypothesis found it: with the first β3 there is no difference of gradients, also where that step comes later."""
    saved, straight = Training("hyperadam", torch.float32), Training("hyperadam", torch.float32)
    for index, event in enumerate(
        [("step", set(), 1.0), ("change", {"beta3": 0.2}, None), ("step", {0}, 1.0), ("restore", "torch.save"),
         ("step", set(), 1.0)]
    ):  # fmt: skip
        happen(saved, index, event)
        if event[0] != "restore":
            happen(straight, index, event)
    assert_same(saved, straight)


# ---- distributed checkpoints in files ----


@pytest.mark.parametrize("how", WHOLE_SAVES)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.slow
def test_distributed_checkpoints_in_files(script: str, how: str) -> None:
    """Of a fresh optimizer they fill what it has, so that here no parameter is without states."""
    dtype = DTYPES[list(SCRIPTS).index(script) % len(DTYPES)]
    saved, straight = Training(script, dtype), Training(script, dtype)
    events: list[tuple[Any, ...]] = [
        ("add", {}), ("step", set(), 1.0), ("nonfinite",), ("step", set(), 0.1), ("change", {"weight_decay": 0.3}, 0),
    ]  # fmt: skip
    # Not the lr: where it is a tensor and the default, it is one for all groups, and dcp.load loads into it, in place,
    # that of each. So it is with torch.optim.AdamW.
    for index, event in enumerate(events):
        happen(saved, index, event)
        happen(straight, index, event)
    saved.model, saved.optimizer = WHOLE_SAVES[how](saved)
    assert_same(saved, straight)
    for index in range(10, 13):
        happen(saved, index, ("step", {1}, 1.0))
        happen(straight, index, ("step", {1}, 1.0))
    assert_same(saved, straight)


# ---- what a checkpoint shares ----


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize("script", ["PACE, capturable, lr a tensor", "MADA, capturable", "MADA, by group", "Adan"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_state_dict_is_live_and_what_is_loaded_is_a_copy(script: str, swapped: bool) -> None:
    """As in torch.optim: the tensors of state_dict() are the optimizer's, those after load_state_dict() are not."""
    training = Training(script, torch.float32)
    training.step(0, set(), 1.0)
    if swapped:
        training.optimizer.eval()
    saved = training.optimizer.state_dict()
    kept = copy.deepcopy(saved)
    pairs = [training.fresh() for _ in range(2)]
    for _, optimizer in pairs:
        optimizer.load_state_dict(saved)
    places = [
        {t.data_ptr() for t in tensors([list(o.state.values()), o.param_groups]) if t.numel()}
        for o in (training.optimizer, pairs[0][1], pairs[1][1])
    ]
    assert not places[0] & places[1] and not places[0] & places[2] and not places[1] & places[2]
    assert bits(saved) == bits(kept)
    # A step changes what was not copied, all of it: states and what the groups have learned are of the same moment.
    training.optimizer.train()
    training.step(1, set(), 1.0)
    live = training.optimizer.state_dict()
    assert bits(live["state"]) == bits(saved["state"])
    for group, before in zip(live["param_groups"], saved["param_groups"], strict=True):
        for name, value in group.items():
            if name not in ("swapped", "state_names"):
                assert bits(value) == bits(before[name]), name
    # The copies stayed what they were.
    for model, optimizer in pairs:
        optimizer.train()
        assert bits(optimizer.state_dict()["state"]) == bits(kept_live(kept["state"]))
        assert model is not training.model


def kept_live(states: dict[int, Any]) -> dict[int, Any]:
    return {k: {name: value for name, value in state.items() if name != "live"} for k, state in states.items()}


# ---- safetensors ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("script", ["PACE", "MADA, pulled"])
@pytest.mark.parametrize("swapped", [False, True])
def test_averaged_weights_through_safetensors(script: str, dtype: torch.dtype, swapped: bool, tmp_path: Any) -> None:
    """It refuses tensors that share memory, as tied weights do, and those that are not contiguous."""
    safetensors = pytest.importorskip("safetensors.torch")
    training = Training(script, dtype)
    for index in range(3):
        training.step(index, set(), 1.0)
    if swapped:
        training.optimizer.eval()
    averages = training.optimizer.ema_state_dict(training.model)
    safetensors.save_file(averages, tmp_path / "averaged.safetensors")
    other = Net(dtype)
    other.load_state_dict(safetensors.load_file(tmp_path / "averaged.safetensors"))
    with training.optimizer.averaged():
        assert bits(dict(other.state_dict())) == bits(dict(training.model.state_dict()))
    assert other.tied.weight is other.one.weight
