"""Promise: in a loop by hand PACE and MADA take what torch's optimizers take: gradient scalers, clipping, schedulers,
hooks, steps within the backward pass, accumulated gradients, tied weights, groups that come later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from trainer_cases import OPTIMIZERS, SOON, same, state_of, weights_of

from pace_kernels import MADA, PACE, clip_coefficient

pytestmark = pytest.mark.usefixtures("many_small_steps")
STEPS = 10
BATCHES = torch.randn(STEPS, 4, 6, generator=torch.Generator().manual_seed(1))
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def tiny(seed: int = 0) -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    return model


def made(name: str, params: Any, **options: Any) -> Any:
    cls, defaults = OPTIMIZERS[name]
    return cls(params, **{**defaults, **options})


def start(name: str, **options: Any) -> tuple[torch.nn.Sequential, Any]:
    model = tiny()
    return model, made(name, model.parameters(), **options)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch.sum(-1, keepdim=True).sin()).square().mean()


def assert_same(one: tuple[torch.nn.Module, Any], other: tuple[torch.nn.Module, Any]) -> None:
    assert same(weights_of(one[0]), weights_of(other[0]))
    assert same(state_of(one[1]), state_of(other[1]))


# ---- gradient scaler and clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@every_optimizer
def test_a_step_that_overflows_is_no_step(name: str, clipped: bool) -> None:
    """The scale doubles and halves; a power of two changes no bit of these gradients."""
    OVERFLOWS = (0, 4, 5)
    scaled, reference = start(name), start(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for i, batch in enumerate(BATCHES):
        for model, optimizer in (scaled, reference):
            optimizer.zero_grad()
            ours = optimizer is scaled[1]
            if not ours and i in OVERFLOWS:
                continue
            loss = loss_of(model, batch)
            (scaler.scale(loss) if ours else loss).backward()
            if ours and i in OVERFLOWS:
                model[0].weight.grad[2, 3] = math.inf
            if ours and clipped:
                scaler.unscale_(optimizer)
            if clipped:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if ours:
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())
            else:
                optimizer.step()
        assert_same_but_skipped(scaled, reference)
    assert min(scales) < 1024.0
    assert all((b < a) == (i in OVERFLOWS) for i, (a, b) in enumerate(zip([1024.0, *scales], scales, strict=False)))


def assert_same_but_skipped(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """A first step that is left undone has created states, of step 0."""
    assert same(weights_of(one[0]), weights_of(other[0]))
    states, expected = state_of(one[1]), state_of(other[1])
    if expected["state"]:
        assert same(states["state"], expected["state"])
    else:
        assert all(state["step"] == 0 for state in states["state"].values())
    assert same(getattr(one[1], "coefficients", None), getattr(other[1], "coefficients", None))


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e3])
@every_optimizer
def test_a_coefficient_clips_as_clip_grad_norm(name: str, max_norm: float) -> None:
    before, within = start(name), start(name)
    for batch in BATCHES:
        for model, optimizer in (before, within):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(before[0].parameters(), max_norm)
        before[1].step()
        coefficient, ours = clip_coefficient(within[0].parameters(), max_norm)
        assert torch.equal(ours, norm)
        within[1].step(clip_coef=coefficient)
        assert_same(before, within)


# ---- schedulers ------------------------------------------------------------------------------------------------------


def warmup_stable_decay(i: int) -> float:
    """Three steps up, four on the plateau, three down."""
    return min((i + 1) / 3, 1.0, max(STEPS - i, 0) / 3)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: schedulers.ConstantLR(o, factor=1.0),
    "warmup, stable, decay": lambda o: schedulers.LambdaLR(o, warmup_stable_decay),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS, eta_min=1e-4),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.02, total_steps=STEPS + 1, cycle_momentum=True),
    "on a plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=1),
    "one after the other": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.8)], milestones=[3]
    ),
}
SCHEDULED: dict[str, Callable[[Any, Any], Any]] = {
    "PACE": lambda params, lr: PACE(params, lr=lr, lambda_pullback=1.0),
    "MADA": lambda params, lr: MADA(params, lr=lr, **SOON),
    "MADA, adamw": lambda params, lr: MADA.preset("adamw", params, lr=lr),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_is_options_set_by_hand(name: str, schedule: str, tensor: bool) -> None:
    """By hand: numbers, in a group of an optimizer that no scheduler has seen."""
    model, reference = tiny(), tiny()
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
    optimizer = SCHEDULED[name](model.parameters(), lr)
    by_hand = SCHEDULED[name](reference.parameters(), 0.01)
    scheduler = SCHEDULES[schedule](optimizer)
    seen = set()
    for i, batch in enumerate(BATCHES):
        group = optimizer.param_groups[0]
        for key in ("lr", "betas"):
            by_hand.param_groups[0][key] = float(group[key]) if key == "lr" else tuple(map(float, group[key]))
        seen.add((by_hand.param_groups[0]["lr"], by_hand.param_groups[0]["betas"]))
        for m, o in ((model, optimizer), (reference, by_hand)):
            o.zero_grad()
            loss_of(m, batch).backward()
            o.step()
        assert same(weights_of(model), weights_of(reference)), i
        assert same(state_of(optimizer)["state"], state_of(by_hand)["state"]), i
        scheduler.step(*([1.0] if schedule == "on a plateau" else []))
    assert (len(seen) == 1) == (schedule == "constant")
    if schedule == "one cycle":
        assert len({betas for _, betas in seen}) == STEPS
    assert torch.is_tensor(optimizer.param_groups[0]["lr"]) == tensor


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_scheduler_cycles_betas_but_not_those_that_mada_learns(name: str) -> None:
    """What MADA learns begins at its ``betas`` and is its own from then on."""
    ended = []
    for cycled in (True, False):
        model = tiny()
        optimizer = SCHEDULED[name](model.parameters(), 0.01)
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.02, total_steps=STEPS, cycle_momentum=cycled)
        for i, batch in enumerate(BATCHES):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            if i + 1 < STEPS:
                scheduler.step()
        ended.append(weights_of(model))
    assert same(*ended) == (name == "MADA")


# ---- hooks and steps within the backward pass ------------------------------------------------------------------------


@every_optimizer
def test_hooks_run_around_each_step(name: str) -> None:
    hooked, reference = start(name), start(name)
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []
    handles = [
        hooked[1].register_step_pre_hook(lambda *_: seen.append(("pre", weights_of(hooked[0])))),
        hooked[1].register_step_post_hook(lambda *_: seen.append(("post", weights_of(hooked[0])))),
    ]
    expected = []
    for i, batch in enumerate(BATCHES):
        if i == 6:
            for handle in handles:
                handle.remove()
        before = weights_of(reference[0])
        for model, optimizer in (hooked, reference):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if i < 6:
            expected += [("pre", before), ("post", weights_of(reference[0]))]
        assert_same(hooked, reference)
    assert same(seen, expected)


def test_a_pre_hook_may_replace_the_arguments() -> None:
    clipped, reference = start("PACE"), start("PACE")
    clipped[1].register_step_pre_hook(lambda o, args, kwargs: (args, {"clip_coef": 0.25}))
    for batch in BATCHES:
        for model, optimizer in (clipped, reference):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
        clipped[1].step()
        reference[1].step(clip_coef=0.25)
    assert_same(clipped, reference)


@pytest.mark.parametrize("name", ["PACE", "MADA, adamw"])
def test_steps_within_the_backward_pass_are_steps_after_it(name: str) -> None:
    """An optimizer a parameter: each gradient is used and freed as soon as it is there. Of MADA a preset: one that
    learns sums its hypergradients over all parameters."""
    inside, after = tiny(), tiny()
    whole = SCHEDULED[name](after.parameters(), 0.01)
    each = {p: SCHEDULED[name]([p], 0.01) for p in inside.parameters()}

    def step(p: torch.Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in inside.parameters():
        p.register_post_accumulate_grad_hook(step)
    for batch in BATCHES:
        loss_of(inside, batch).backward()
        assert all(p.grad is None for p in inside.parameters())
        whole.zero_grad()
        loss_of(after, batch).backward()
        whole.step()
        assert same(weights_of(inside), weights_of(after))
    for (p, optimizer), q in zip(each.items(), after.parameters(), strict=True):
        assert same(dict(optimizer.state[p]), dict(whole.state[q]))
        if name == "PACE":
            with optimizer.averaged(), whole.averaged():
                assert torch.equal(p, q)


# ---- gradients of several passes, weights in several places, groups that come later ----------------------------------


@every_optimizer
def test_gradients_accumulate_over_passes(name: str) -> None:
    """The gradients of two passes, added up by torch, are those of one with both losses."""
    passes, once = start(name), start(name)
    for first, second in zip(BATCHES[::2], BATCHES[1::2], strict=True):
        for batch in (first, second):
            (loss_of(passes[0], batch) / 2).backward()
        grads = [torch.autograd.grad(loss_of(once[0], b) / 2, list(once[0].parameters())) for b in (first, second)]
        for p, a, b in zip(once[0].parameters(), *grads, strict=True):
            p.grad = a + b
        for _, optimizer in (passes, once):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(passes, once)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(6, 5, bias=False)
        self.head = torch.nn.Linear(6, 5, bias=False)
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(3))
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).sin() + self.embedding(x)


@every_optimizer
def test_tied_weights_are_one_parameter(name: str) -> None:
    """They take one step of the sum of both gradients, and stay tied through the average."""
    model = Tied()
    alone = torch.nn.Parameter(model.head.weight.detach().clone())
    optimizer, reference = made(name, model.parameters()), made(name, [alone])
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        alone.grad = model.head.weight.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(model.head.weight, alone)
    assert model.head.weight is model.embedding.weight
    assert same(state_of(optimizer), state_of(reference))
    if name != "MADA":
        exported = optimizer.ema_state_dict(model)
        with optimizer.averaged(), reference.averaged():
            assert model.head.weight is model.embedding.weight
            assert torch.equal(model.head.weight, alone)
            assert torch.equal(exported["head.weight"], alone)
            assert torch.equal(exported["embedding.weight"], alone)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule-free"])  # whose groups count on
def test_layers_that_are_unfrozen_later_begin_at_their_own_step_one(name: str) -> None:
    """The head alone at first; then the body too, by ``add_param_group``, at a learning rate of its own. As if the
    group had been there all the time, without gradients."""
    UNFROZEN = 4
    model, reference = tiny(), tiny()
    for m in (model, reference):
        m[0].requires_grad_(False)
    body = {"lr": 0.003, "weight_decay": 0.0}
    optimizer = made(name, model[2].parameters())
    from_the_start = made(name, [{"params": reference[2].parameters()}, {"params": reference[0].parameters(), **body}])
    for i, batch in enumerate(BATCHES):
        if i == UNFROZEN:
            for m in (model, reference):
                m[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters(), **body})
        for m, o in ((model, optimizer), (reference, from_the_start)):
            m.zero_grad()
            loss_of(m, batch).backward()
            o.step()
        assert same(weights_of(model), weights_of(reference)), i
    assert same(state_of(optimizer), state_of(from_the_start))
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [STEPS - UNFROZEN] * 2 + [STEPS] * 2
    assert not torch.equal(model[0].weight, tiny()[0].weight)
