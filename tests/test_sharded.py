"""Promise: sharded training is the training of the whole model. Real process groups, 1, 2 and 4 ranks, shards of
unequal sizes, empty ones among them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mada_cases import CASES as MADA_CASES
from pace_cases import CASES as PACE_CASES
from ranks import run
from torch import Tensor, nn

import pace_kernels.torch_rules.mada as mada_rule
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, averaged, clip_coefficient

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORLDS = [2, 4]
KINDS: dict[str, Any] = {"PACE": PACE, "MADA": MADA, "schedule-free": ScheduleFreeAdamW}
CASES = {"PACE": PACE_CASES, "MADA": MADA_CASES, "schedule-free": {"": {"warmup_steps": 3, "weight_decay": 0.1}}}
MESHES = {"hsdp": ("replicate", "shard"), "tensor parallel": ("data", "tensor")}
LAYOUTS = ["fsdp", *MESHES]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows of 5, 3 and 1: neither 2 nor 4 ranks get equal shares, and some get nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1)).to(dtype)


def shard(model: nn.Module, layout: str = "fsdp", **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of(layout)
    if layout == "hsdp":
        return fully_shard(model, mesh=mesh, **options)
    if layout == "tensor parallel":
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["data"]
    return fully_shard(model, mesh=mesh, **options)


@functools.cache
def mesh_of(layout: str) -> Any:
    """Once in each process: every mesh brings process groups with their own threads and connections."""
    from torch.distributed.device_mesh import init_device_mesh

    world = torch.distributed.get_world_size()
    if layout == "fsdp":
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=MESHES[layout])


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_grads(model: nn.Module, t: int, scale: float = 1.0) -> None:
    """The same gradients, whatever the sharding."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
    for t in which:
        set_grads(model, t)
        optimizer.step()


def differences(model: nn.Module, optimizer: Any, reference: nn.Module, wanted: Any) -> list[str]:
    """What differs in weights or states from a model and optimizer that are not sharded."""
    found = []
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not torch.equal(whole(p), q):
            found.append(name)
        ours, theirs = optimizer.state[p], wanted.state[q]
        if ours.keys() != theirs.keys():
            found.append(f"{name}: {sorted(ours)} instead of {sorted(theirs)}")
            continue
        for key, value in ours.items():
            if value.shape != theirs[key].shape or not torch.equal(whole(value), theirs[key]):
                found.append(f"{name}.{key}")
            if key in getattr(optimizer, "STATE_TENSORS", ("ema",)) and (value.placements, value.stride()) != (
                p.placements,
                p.stride(),
            ):
                found.append(f"{name}.{key} is placed as {value.placements}, strides {value.stride()}")
    return found


def make(rule: str, params: Any, **options: Any) -> Any:
    return KINDS[rule](params, lr=1e-2, **options)


# ---- the same weights and states ----


def check_cases(rule: str, layout: str, dtype: torch.dtype) -> dict[str, list[str]]:
    found = {}
    for case, options in CASES[rule].items():
        if rule == "MADA" and options.get("learn") != ():
            options = {**options, "hyper_lr": 0.0}  # the coefficients stay, so that all else is equal to the last bit
        reference = net(dtype)
        model = shard(net(dtype), layout)
        optimizer, wanted = make(rule, model.parameters(), **options), make(rule, reference.parameters(), **options)
        for _ in range(2):
            steps(model, optimizer, range(4))
            steps(reference, wanted, range(4))
            if case_found := differences(model, optimizer, reference, wanted):
                found[case] = case_found
            if not optimizer._keeps_average(optimizer.param_groups[0]):
                continue
            with optimizer.averaged(), wanted.averaged():
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    if not torch.equal(whole(p), q):
                        found[f"{case}, averaged"] = []
    return found


@pytest.mark.parametrize("rule", KINDS)
@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [
        (2, "fsdp", torch.float32),
        (2, "fsdp", torch.bfloat16),
        (4, "fsdp", torch.bfloat16),
        (4, "hsdp", torch.float32),
        (4, "tensor parallel", torch.float32),
    ],
    ids=str,
)
def test_given_the_same_gradients_sharding_changes_no_bit(
    rule: str, world: int, layout: str, dtype: torch.dtype
) -> None:
    assert run(world, check_cases, rule, layout, dtype) == [{}] * world


def check_pullback(layout: str) -> tuple[list[str], list[str]]:
    """Around SGD with a learning rate of 2^-6: a product that is exact, so that it is no matter whether torch's loop
    fuses it with the sum."""
    reference, model = net(), shard(net(), layout)
    ours, wanted = (
        Pullback(torch.optim.SGD(m.parameters(), lr=2.0**-6), gain=0.25, log_stats=True) for m in (model, reference)
    )
    steps(model, ours, range(5))
    steps(reference, wanted, range(5))
    found = differences(model, ours, reference, wanted)
    averages = wanted.ema_state_dict(reference)
    return found, [k for k, v in ours.ema_state_dict(model).items() if not torch.equal(whole(v), averages[k])]


@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "tensor parallel")])
def test_pullback_around_a_sharded_optimizer(world: int, layout: str) -> None:
    assert run(world, check_pullback, layout) == [([], [])] * world


def train_really(kind: str, rule: str) -> list[Tensor]:
    """A training on the same batch on all ranks, whose mean gradient is that of one: sums of 2 or 4 equal numbers are
    exact."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"hyper_lr": 0.0} if rule == "MADA" else {}
    model: nn.Module = net(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind in ("fsdp", "bfloat16"):
        model = shard(model)
    elif kind == "mixed":
        model = shard(model, mp_policy=mixed)
    elif kind in ("ddp", "zero"):
        model = DistributedDataParallel(model)
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), KINDS[rule], lr=1e-2, **options)
    else:
        optimizer = make(rule, model.parameters(), **options)
    dtype = torch.bfloat16 if kind in ("bfloat16", "mixed") else torch.float32
    for t in range(6):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(t)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [whole(p).detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("rule", KINDS)
@pytest.mark.parametrize("kind", ["fsdp", "bfloat16", "mixed", "ddp", "zero"])
def test_training_through_the_engine_is_that_of_one_rank(kind: str, rule: str) -> None:
    [wanted] = run(1, train_really, kind if kind == "mixed" else kind.replace("fsdp", "plain"), rule)
    for world in WORLDS:
        for weights in run(world, train_really, kind, rule):
            assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))


# ---- what MADA learns ----


@contextmanager
def absolute_sums(store: list[float]) -> Iterator[None]:
    """Notes Σ|term| of each hypergradient sum that the torch rule makes."""
    original = mada_rule.fixed_order_sum

    def noted(term: Tensor) -> Any:
        store.append(term.to(torch.float64).abs().sum().item())
        return original(term)

    mada_rule.fixed_order_sum = noted
    try:
        yield
    finally:
        mada_rule.fixed_order_sum = original


def learn(kind: str, order: str) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Hypergradients and coefficients after three steps that learn nothing and one that does, and what was wrong with
    the former."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    options = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7, "hyper_warmup": 3, "hyper_lr": 0.01, "lr": 1e-2}
    options["hyper_order"] = order
    reference = net()
    inner: Any
    model: nn.Module
    if kind == "zero":
        model = net()
        group = torch.distributed.group.WORLD
        outer = ZeroRedundancyOptimizer(
            DistributedDataParallel(model).parameters(), MADA, hyper_process_group=group, **options
        )
        inner = outer.optim
    else:
        model = shard(net(), kind)
        outer = inner = MADA(model.parameters(), **options)
    wanted = MADA(reference.parameters(), **options)
    weigher = copy.deepcopy(reference)
    weighing = MADA(weigher.parameters(), backend="torch", **options)
    wrong = []
    for t in range(4):
        for m in (model, reference, weigher):
            set_grads(m, t)
        magnitudes: list[float] = []
        outer.step()
        wanted.step()
        with absolute_sums(magnitudes):
            weighing.step()
        # A tile adds up at most 256 float32 terms (csrc/cpu/mada_kernel.h) with an error of at most 255 u Σ|term|, u =
        # 2^-24, on either side; the sums over tiles, tensors and ranks are in double. Σ|term| comes from another
        # backend, whose terms are those within their own rounding: 1 % is far more.
        bound = 1.01 * 2 * 255 * 2.0**-24
        for k, name in enumerate(wanted.hypergradients):
            # The factors that the terms share (csrc/scalars.h, mada_factors) are at most these.
            allowed = bound * max_factor(name, t, options) * sum(magnitudes[k :: len(wanted.hypergradients)])
            apart = abs(inner.hypergradients[name] - wanted.hypergradients[name])
            if apart > allowed:
                wrong.append(f"step {t}: h of {name} is {apart} off, allowed {allowed}")
            if t == 3:
                moved = abs(inner.coefficients[name] - wanted.coefficients[name])
                # Clip and projection bring numbers no further apart.
                if moved > options["hyper_lr"] * allowed + 1e-15:
                    wrong.append(f"{name} is {moved} off, allowed {options['hyper_lr'] * allowed}")
    if kind != "zero":
        wrong += [d for d in differences(model, inner, reference, wanted) if not d.endswith("last_scalars")]
    if wanted.coefficients["rho"] == options["rho"]:
        wrong.append("nothing was learned")
    return inner.hypergradients, inner.coefficients, wrong


def max_factor(name: str, t: int, options: dict[str, Any]) -> float:
    lr, gamma, rho = options["lr"], options["gamma"], options["rho"]
    bias1, bias2 = 1 - 0.9 ** max(t, 1), 1 - 0.95 ** max(t, 1)
    A = lr * gamma
    square = rho * (1 - 0.95)
    factors = (A / bias1, A / bias2, A, A / bias2, A * square / bias2, lr)
    return factors[("beta1", "beta2", "beta3", "rho", "c", "gamma").index(name)]


LEARNING = [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "tensor parallel"), (2, "zero")]


@pytest.mark.parametrize(
    ("world", "kind", "order"),
    [*((*case, "algorithm") for case in LEARNING), (2, "fsdp", "published"), (2, "zero", "published")],
)
def test_coefficients_are_the_same_on_all_ranks_and_those_of_one(world: int, kind: str, order: str) -> None:
    results = run(world, learn, kind, order)
    assert [wrong for *_, wrong in results] == [[]] * world
    assert all(result[:2] == results[0][:2] for result in results)  # to the last bit


# ---- what a step costs ----


def operations_of_a_step(rule: str, options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The collectives of a step, and its operations on DTensors."""
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    collectives: list[str] = []
    dispatched: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function)
            if name.startswith(("c10d", "_c10d")):
                collectives.append(name)
            if any(issubclass(kind, DTensor) for kind in types):
                dispatched.append(name)
            return function(*args, **(kwargs or {}))

    model = shard(net())
    optimizer = make(rule, model.parameters(), **options)
    steps(model, optimizer, range(2))
    set_grads(model, 2)
    with Watch():
        optimizer.step()
    return collectives, dispatched


@pytest.mark.parametrize(
    ("rule", "options", "collectives"),
    [
        ("PACE", {"log_stats": True}, 0),
        ("MADA", {}, 1),
        ("MADA", {"learn": ()}, 0),
        ("MADA", {"coefficients": "group", "lambda_pullback": 0.1}, 1),
        ("PACE", {"skip_nonfinite": True}, 1),
    ],
    ids=str,
)
def test_a_step_has_no_dispatch_of_dtensors_and_at_most_one_collective(
    rule: str, options: dict[str, Any], collectives: int
) -> None:
    for seen, dispatched in run(2, operations_of_a_step, rule, options):
        assert (len(seen), dispatched) == (collectives, [])
        assert all("allreduce" in name for name in seen)


# ---- around the step ----


def check_clipping(norm_type: float) -> list[Any]:
    found = []
    for layout in ("fsdp", "tensor parallel") if torch.distributed.get_world_size() == 4 else ("fsdp",):
        model, reference = shard(net(), layout), net()
        for m in (model, reference):
            set_grads(m, 0, 3.0)
        coefficient, norm = clip_coefficient(model.parameters(), 1.0, norm_type)
        wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0, norm_type)
        found.append((type(norm) is Tensor, (norm / wanted).item(), (coefficient * (wanted + 1e-6)).item()))
    return found


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("world", WORLDS)
def test_clip_coefficient_is_of_all_shards(world: int, norm_type: float) -> None:
    for results in run(world, check_clipping, norm_type):
        for plain, *ratios in results:
            # 68 numbers summed in float32 on both sides: 2 * 68 * 2^-24 is 8e-6.
            assert plain and ratios == pytest.approx([1.0, 1.0], abs=1e-5)


def check_stats(layout: str) -> tuple[dict[str, float], dict[str, float]]:
    model, reference = shard(net(), layout), net()
    options = {"log_stats": True, "lambda_pullback": 0.5}
    optimizer, wanted = make("PACE", model.parameters(), **options), make("PACE", reference.parameters(), **options)
    steps(model, optimizer, range(3))
    steps(reference, wanted, range(3))
    return optimizer.get_step_stats(), wanted.get_step_stats()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_of_all_shards(layout: str) -> None:
    for got, wanted in run(4, check_stats, layout):
        assert got == pytest.approx(wanted, rel=1e-5)  # sums of 68 positive float32 terms


def check_one_bad_rank(rule: str) -> tuple[bool, int, bool]:
    """A gradient that is not finite, in the shard of the last rank that has one."""
    model = shard(net())
    optimizer = make(rule, model.parameters(), skip_nonfinite=True)
    steps(model, optimizer, range(3))
    before = [whole(p).detach().clone() for p in model.parameters()]
    states = copy.deepcopy([whole(v) for state in optimizer.state.values() for v in state.values()])
    set_grads(model, 3)
    if torch.distributed.get_rank() == 1:
        next(iter(model.parameters())).grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    after = [whole(v) for state in optimizer.state.values() for v in state.values()]
    same = all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))
    return same, optimizer.skipped_steps, all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


@pytest.mark.parametrize("rule", ["PACE", "MADA"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_bad_gradient_on_one_rank_leaves_the_step_undone_on_all(rule: str, world: int) -> None:
    assert run(world, check_one_bad_rank, rule) == [(True, 1, True)] * world


def check_absent(order: str) -> Any:
    """One rank has no gradient in a step, then none has."""
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))]
    groups: list[Any] = [{"params": params[:1], "learn": ()}, {"params": params[1:]}]
    options: Any = {"coefficients": "group", "hyper_process_group": "world", "hyper_order": order}
    optimizer = MADA(groups, lr=1e-2, hyper_warmup=1, **options)
    for t in range(5):
        for p in params:
            p.grad = None if t == 3 or (t == 2 and torch.distributed.get_rank() == 0) else torch.ones_like(p) / (t + 1)
        optimizer.step()
    return optimizer.coefficients, optimizer.param_groups[1]["hyper_step"].item()


@pytest.mark.parametrize("order", ["algorithm", "published"])
def test_a_rank_without_gradients_learns_with_the_others(order: str) -> None:
    """It takes part in their sums: without it they would wait forever."""
    here, there = run(2, check_absent, order)
    assert here == there and here[0][0]["gamma"] == 1.0 != here[0][1]["gamma"]
    assert here[1] == 4  # of 5 steps, of which one had no gradients


def check_one_bad_rank_of_zero(order: str) -> tuple[int, dict[str, float]]:
    """A gradient that is not finite, of a parameter that one rank holds: all leave the step undone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        MADA,
        lr=1e-2,
        skip_nonfinite=True,
        hyper_process_group="world",
        hyper_warmup=1,
        hyper_order=order,
    )
    for t in range(6):
        set_grads(model, t)
        if t in (0, 3):
            next(iter(model.parameters())).grad[0, 0] = float("nan")
        optimizer.step()
    return optimizer.optim.skipped_steps, optimizer.optim.coefficients


@pytest.mark.parametrize("order", ["algorithm", "published"])
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_of_zero_redundancy_leave_a_step_undone_together(world: int, order: str) -> None:
    results = run(world, check_one_bad_rank_of_zero, order)
    assert all(result == results[0] for result in results)
    assert results[0][0] == 2 and results[0][1]["gamma"] != 1.0


def check_averages_of_zero() -> tuple[bool, bool, list[str]]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, alone = net(), net()
    zero, whole_one = ZeroRedundancyOptimizer(model.parameters(), PACE, lr=1e-2), PACE(alone.parameters(), lr=1e-2)
    for t in range(3):
        for m, optimizer in ((model, zero), (alone, whole_one)):
            set_grads(m, t)
            optimizer.step()
    live, wanted = [p.detach().clone() for p in model.parameters()], whole_one.ema_state_dict(alone)
    with averaged(model, zero):
        right = all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    back = all(map(torch.equal, model.parameters(), live))

    def refusal(call: Any) -> str:
        with pytest.raises(RuntimeError) as error, call(model):
            pass
        return str(error.value)

    return right, back, [refusal(c) for c in (zero.optim.averaged, zero.optim.eval, zero.optim.ema_state_dict)]


@pytest.mark.parametrize("world", WORLDS)
def test_averages_under_zero_redundancy_are_those_of_all_ranks(world: int) -> None:
    for right, back, refusals in run(world, check_averages_of_zero):
        assert right and back
        for what, refusal in zip(("averaged()", "eval()", "ema_state_dict()"), refusals, strict=True):
            assert refusal.startswith(f"{what}: this is one rank's part of a ZeroRedundancyOptimizer")


def check_gradient_scaler(rule: str, fused: bool) -> tuple[list[str], float]:
    options = {"hyper_lr": 0.0} if rule == "MADA" else {}
    model, reference = shard(net()), net()
    optimizer, wanted = (
        make(rule, model.parameters(), fused=fused, **options),
        make(rule, reference.parameters(), **options),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(4):
        scaler.scale(torch.zeros(()))
        set_grads(model, t, 4.0)
        if t == 2 and torch.distributed.get_rank() == 0:
            next(iter(model.parameters())).grad.to_local()[0, 0] = float("inf")
        if t == 2:
            scaler._scale.fill_(4.0)
        scaler.step(optimizer)
        scaler.update(4.0)
        if t != 2:
            set_grads(reference, t)
            wanted.step()
    return differences(model, optimizer, reference, wanted), optimizer.state[next(iter(model.parameters()))][
        "step"
    ].item()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", ["PACE", "MADA"])
def test_a_gradient_scaler_over_shards(rule: str, fused: bool) -> None:
    assert run(2, check_gradient_scaler, rule, fused) == [([], 3.0)] * 2


def check_first_step_without_lr() -> list[Any]:
    """Rank 1 alone has a gradient in the first step, whose learning rate is 0: it is a step on both."""
    model = shard(net())
    optimizer = PACE(model.parameters(), lr=0.0)
    set_grads(model, 0)
    for p in model.parameters():
        if torch.distributed.get_rank() == 0:
            p.grad.to_local().zero_()
    optimizer.step()
    return [optimizer._dry, [state["step"].item() for state in optimizer.state.values()]]


def test_ranks_agree_on_whether_a_first_step_counts() -> None:
    assert run(2, check_first_step_without_lr) == [[False, [1.0] * 8]] * 2


def check_refusals() -> list[str]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh = mesh_of("fsdp")
    said = []
    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    try:
        PACE([nn.Parameter(partial)])
    except ValueError as error:
        said.append(str(error))
    # A gradient that is placed otherwise, as where a parameter is used outside of its module, is redistributed.
    weights = nn.Parameter(distribute_tensor(torch.ones(5, 3), mesh, [Replicate()]))
    reference = nn.Parameter(torch.ones(5, 3))
    optimizer, wanted = PACE([weights]), PACE([reference])
    weights.grad = DTensor.from_local(torch.full((5, 3), 0.5), mesh, [Partial()])
    reference.grad = torch.ones(5, 3)
    optimizer.step()
    wanted.step()
    said.append(str(torch.equal(weights.full_tensor(), reference)))
    return said


def test_summands_are_refused_as_parameters_and_added_up_as_gradients() -> None:
    refusal = (
        "param_groups[0]['params'][0] is a DTensor with Partial placements: parameters must be replicated or sharded"
    )
    assert run(2, check_refusals) == [[refusal, "True"]] * 2
