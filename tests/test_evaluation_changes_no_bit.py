"""Promise: an evaluation between two steps computes with the averages, in every stack, and changes no bit of the
training that follows. Whoever holds a derived copy of the weights (FSDP's whole parameters, autocast's casts, a
compiled graph) would otherwise go on with it. Each stack says how a model is made ready; the check is one for all."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn

import pace_kernels
from pace_kernels import MADA, PACE, Pullback

RULES: dict[str, Callable[[Any], Any]] = {
    "PACE": lambda params: PACE(params, lr=0.03),
    "averaged MADA": lambda params: MADA(params, lr=0.03, use_ema_eval=True, hyper_warmup=2),
    "Pullback": lambda params: Pullback(torch.optim.SGD(params, lr=0.1), gain=0.05),
}
STEPS = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.25))
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), inner, nn.Tanh(), nn.Linear(8, 4))


# ---- the stacks, as data ----


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@functools.cache
def mesh(*names: str) -> Any:
    """Once in each process: every mesh brings process groups with their own threads and connections."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,), mesh_dim_names=names or None)


def fully_sharded(**options: Any) -> nn.Module:
    """Nested, so that there are modules that are no root."""
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model[2], mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def fully_sharded_in_bfloat16() -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fully_sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(net(), mesh("tensor"), {"0": ColwiseParallel(), "2.0": RowwiseParallel()})


def distributed_data_parallel() -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(net())


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@dataclass(frozen=True)
class Stack:
    made: Callable[[], nn.Module] = net
    ranks: int = 1
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    # Whether an evaluation is within the precision context of the training's forward, as a loop within one block is.
    one_block: bool = False


STACKS = {
    "plain": Stack(),
    "autocast": Stack(precision=bfloat16),
    "one autocast block": Stack(precision=bfloat16, one_block=True),
    "compiled": Stack(lambda: torch.compile(net())),
    "DDP": Stack(distributed_data_parallel, 2),
    "DDP, one autocast block": Stack(distributed_data_parallel, 2, bfloat16, one_block=True),
    "FSDP2": Stack(fully_sharded, 2),
    "FSDP2, reshard_after_forward=True": Stack(lambda: fully_sharded(reshard_after_forward=True), 2),
    "FSDP2, reshard_after_forward=False": Stack(lambda: fully_sharded(reshard_after_forward=False), 2),
    "FSDP2, bfloat16": Stack(fully_sharded_in_bfloat16, 2),
    "FSDP2, autocast": Stack(fully_sharded, 2, bfloat16),
    "tensor parallel": Stack(tensor_parallel, 2),
}
# Whether the optimizer is told of the model, or has to find who holds copies by itself, as with Trainer.
TOLD = (True, False)
WHEN = ("never", "before the first step", "between steps", "between micro-batches")


def local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def accumulating(model: Any, more: bool) -> Iterator[None]:
    """As a loop does that leaves the reduction of gradients to the last of its micro-batches."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not more)
    with model.no_sync() if more and hasattr(model, "no_sync") else nullcontext():
        yield


# ---- the check ----


class Training:
    """Steps of two micro-batches each, evaluated at some of its moments. Notes all that it computed, and what was wrong
    with an evaluation."""

    def __init__(self, stack: str, rule: str, told: bool = True) -> None:
        self.stack, self.told = STACKS[stack], told
        self.model = self.stack.made()
        self.optimizer = RULES[rule](self.model.parameters())
        self.computed: list[Tensor] = []
        self.wrong: list[str] = []
        self.batches = torch.Generator().manual_seed(1 + rank())

    def batch(self) -> Tensor:
        return torch.randn(4, 6, generator=self.batches)

    def of_the_average(self, x: Tensor) -> Tensor:
        """The output of a new model that was given the averages by hand."""
        twin = self.stack.made().eval()
        with torch.no_grad():
            for mine, other in zip(self.model.parameters(), twin.parameters(), strict=True):
                state = self.optimizer.state.get(mine, {})
                local(other).copy_(local(state.get("ema", mine)))
            with self.stack.precision():
                return twin(x).float()

    def evaluate(self) -> None:
        x = torch.full((3, 6), 0.5)
        random, training = torch.get_rng_state(), self.model.training
        wanted = self.of_the_average(x)
        self.model.eval()
        within = nullcontext if self.stack.one_block else self.stack.precision
        arguments = (self.model,) if self.told else ()
        with torch.no_grad():
            with within():
                live = self.model(x).float()
            with self.optimizer.averaged(*arguments), within():
                averaged = self.model(x).float()
        self.model.train(training)
        torch.set_rng_state(random)
        if not torch.equal(averaged, wanted):
            self.wrong.append(f"an average that is {(averaged - wanted).abs().max()} off")
        if self.optimizer.state and torch.equal(averaged, live):
            self.wrong.append("the average computes what the live weights do")

    def train(self, when: str) -> None:
        torch.manual_seed(7)  # of dropout
        if when == "before the first step":
            with self.stack.precision() if self.stack.one_block else nullcontext():
                self.evaluate()
        for _ in range(STEPS):
            for more in (True, False):
                with accumulating(self.model, more):
                    with self.stack.precision():
                        if when == "between steps" and more and self.stack.one_block:
                            self.evaluate()
                        loss = (self.model(self.batch()) - 1).float().square().mean()
                        if when == "between micro-batches" and more and self.stack.one_block:
                            self.evaluate()  # the graph holds the casts of the live weights
                    loss.backward()
                if when == "between micro-batches" and more and not self.stack.one_block:
                    self.evaluate()
                self.computed.append(loss.detach())
            self.optimizer.step()
            if when == "between steps" and not self.stack.one_block:
                self.evaluate()
            self.optimizer.zero_grad()
        for p in self.model.parameters():
            self.computed += [local(p).detach().clone(), local(self.optimizer.state[p]["ema"]).clone()]


def faults(stack: str, rules: tuple[str, ...]) -> list[str]:
    """What is wrong, over all rules, moments of evaluation, and ways to call it."""
    found = []
    for rule in rules:
        alone = Training(stack, rule)
        alone.train("never")
        for told, when in itertools.product(TOLD, WHEN[1:]):
            evaluated = Training(stack, rule, told)
            evaluated.train(when)
            case = f"{rule}, {'model given' if told else 'no model'}, evaluated {when}"
            found += [f"{case}: {wrong}" for wrong in evaluated.wrong]
            pairs = zip(evaluated.computed, alone.computed, strict=True)
            if any(not torch.equal(a, b) for a, b in pairs):
                found.append(f"{case}: another training")
    return found


def on(stack: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function gives on each of the ranks that the stack needs."""
    if STACKS[stack].ranks == 1:
        return [function(*arguments)]
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return run(2, function, *arguments)


@pytest.mark.parametrize("stack", STACKS)
def test_an_evaluation_computes_with_the_average_and_leaves_no_trace(stack: str) -> None:
    for found in on(stack, faults, stack, tuple(RULES)):
        assert found == []


# ---- graphs that a swap comes between ----

# Where a swap lies between the forward and the backward pass of a training. Where the graph holds the weights
# themselves, torch notices that they changed; where it holds copies or gathers them anew, it cannot.
BETWEEN = ("backward inside", "backward after", "forward inside, backward after")


def backward_across(stack: str, between: str) -> tuple[str, bool]:
    """What torch says of a backward pass of a graph with a swap between, and whether its gradients are those of the
    weights that the forward pass computed with."""
    training = Training(stack, "PACE")
    training.train("never")
    model, optimizer, x = training.model.eval(), training.optimizer, training.batch()
    if between.startswith("forward inside"):
        with optimizer.averaged(model):
            model(x).float().square().mean().backward()
    else:
        model(x).float().square().mean().backward()
    wanted = [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()

    with optimizer.averaged(model) if between.startswith("forward inside") else nullcontext():
        loss = model(x).float().square().mean()
    try:
        with optimizer.averaged(model):
            if between == "backward inside":
                loss.backward()
        if between != "backward inside":
            loss.backward()
    except RuntimeError as error:
        return str(error), False
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    return "", all(map(torch.equal, grads, wanted))


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("stack", ["plain", "compiled", "DDP", "tensor parallel"])
def test_a_graph_of_before_a_swap_is_refused_by_torch(stack: str, between: str) -> None:
    for said, _ in on(stack, backward_across, stack, between):
        assert "modified by an inplace operation" in said


FSDP2 = [name for name in STACKS if name.startswith("FSDP2")]


@pytest.mark.parametrize("stack", FSDP2)
def test_fsdp2_gathers_anew_for_a_backward_pass(stack: str) -> None:
    """So it is right after the context, and must not be run inside: torch cannot notice."""
    assert on(stack, backward_across, stack, "backward after") == [("", True)] * 2
    if "autocast" not in stack:  # whose casts are in the graph
        assert on(stack, backward_across, stack, "backward inside") == [("", False)] * 2


def gradients_of_two_forwards(how: str) -> list[Tensor]:
    training = Training("autocast", "PACE")
    training.train("never")
    model, (first, second) = training.model.eval(), (training.batch(), training.batch())
    if how == "two blocks":
        for x in (first, second):
            with bfloat16():
                loss = model(x).square().mean()
            loss.backward()
    else:
        with bfloat16():
            loss = model(first).square().mean()
            if how == "evaluated":
                with torch.no_grad(), training.optimizer.averaged():
                    model(second)
            loss = loss + model(second).square().mean()
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_two_forwards_of_one_backward_in_one_autocast_block() -> None:
    """Alone they share the casts, whose two gradients torch adds up in bfloat16. An evaluation between them makes the
    second cast anew, and the sum is float32's, as it is in two blocks. One rounding to bfloat16 lies between: 2^-8."""
    shared, evaluated, apart = map(gradients_of_two_forwards, ("alone", "evaluated", "two blocks"))
    assert all(map(torch.equal, evaluated, apart))
    assert not all(map(torch.equal, evaluated, shared))
    for a, b in zip(evaluated, shared, strict=True):
        assert ((a - b).abs() <= 2.0**-8 * a.abs()).all()


# ---- what is refused, before anything has changed ----


def refused(training: Training, swap: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    before = [local(p).detach().clone() for p in training.model.parameters()]
    with pytest.raises(kind, match=sentence):
        swap()
    assert not any(group["swapped"] for group in training.optimizer.param_groups)
    assert not any("live" in state for state in training.optimizer.state.values())
    assert all(torch.equal(local(p), q) for p, q in zip(training.model.parameters(), before, strict=True))


def trained(stack: str = "plain") -> Training:
    training = Training(stack, "PACE")
    training.train("never")
    return training


def enter(context: AbstractContextManager[Any]) -> None:
    with context:
        raise AssertionError("it was entered")


@pytest.mark.parametrize("rule", RULES)
def test_a_swap_changes_contents_and_no_address(rule: str) -> None:
    """Which captured CUDA graphs read."""
    training = Training("plain", rule)
    training.train("never")
    optimizer = training.optimizer

    def addresses() -> list[int]:
        params = list(training.model.parameters())
        return [t.data_ptr() for p in params for t in (p, optimizer.state[p]["ema"])]

    before = addresses()
    with optimizer.averaged(training.model):
        assert addresses() == before
    optimizer.ema_state_dict(training.model)
    assert addresses() == before


def test_frozen_graphs_of_inductor_are_refused() -> None:
    import torch._inductor.config as inductor

    training = trained()
    with inductor.patch(freezing=True):
        for swap in (training.optimizer.eval, lambda: enter(training.optimizer.averaged(training.model))):
            refused(training, swap, RuntimeError, "freezing is on")
    with training.optimizer.averaged(training.model):
        pass


def test_a_model_that_the_optimizer_does_not_step_is_refused() -> None:
    training, other = trained(), net()
    optimizer = training.optimizer
    for swap in (
        lambda: optimizer.eval(other),
        lambda: enter(optimizer.averaged(other)),
        lambda: enter(pace_kernels.averaged(other, optimizer)),
        lambda: optimizer.ema_state_dict(other),
        lambda: pace_kernels.ema_state_dict(other, optimizer),
    ):
        refused(training, swap, ValueError, "steps none of them|no parameter that")
    part = nn.ModuleList([training.model[0], other])  # a model that it trains in part
    with optimizer.averaged(part):
        assert torch.equal(part[0].weight, optimizer.state[part[0].weight]["ema"])
    with optimizer.averaged(nn.ReLU()):  # nothing to train, so nothing that could be missed
        pass


def refusal(swap: Callable[[], Any]) -> str:
    try:
        swap()
    except RuntimeError as error:
        return str(error)
    return ""


def flat(use_orig_params: bool, told: bool) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = PACE(model.parameters(), lr=0.03)
    for _ in range(2):
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    arguments = (model,) if told else ()
    said = [
        refusal(lambda: optimizer.eval(*arguments)),
        refusal(lambda: enter(optimizer.averaged(*arguments))),
        refusal(lambda: optimizer.ema_state_dict(model)),
    ]
    assert all(map(torch.equal, model.parameters(), before)) and not optimizer.param_groups[0]["swapped"]
    return said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(use_orig_params: bool, told: bool) -> None:
    for said in on("FSDP2", flat, use_orig_params, told):
        assert len(said) == 3 and all("fully_shard (FSDP2)" in sentence for sentence in said)


def without_internals(told: bool) -> list[str]:
    """As on a torch whose internals have other names."""
    training = trained("FSDP2")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(pace_kernels.derived, "_state", lambda module: object())
        with training.optimizer.averaged(*((training.model,) if told else ())):
            pass
    return [str(warning.message) for warning in caught if "pass the model" in str(warning.message)]


@pytest.mark.parametrize("told", TOLD)
def test_where_fsdp2_cannot_be_found_it_says_what_to_pass(told: bool) -> None:
    for said in on("FSDP2", without_internals, told):
        assert bool(said) is not told
