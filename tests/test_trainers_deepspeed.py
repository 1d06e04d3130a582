"""Promise: from a DeepSpeed engine of ZeRO 0, 1, 2 or 3 the averages can be exported; whatever asks for a swap there is
refused by a sentence. The CPU, gloo, 2 ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run
from torch import Tensor, nn

import pace_kernels
from pace_kernels import MADA, PACE

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

pytestmark = pytest.mark.slow
STEPS = 4
# Stage and dtype of the weights, as data. ZeRO 0 leaves float32 weights to the optimizer itself.
ENGINES = [(0, torch.float32), (0, torch.bfloat16), (1, torch.bfloat16), (2, torch.bfloat16), (3, torch.bfloat16)]
ENGINES += [(1, torch.float32), (3, torch.float32)]
RULES: dict[str, Any] = {
    "PACE": lambda params: PACE(params, lr=0.1, weight_decay=0.0),
    "averaged MADA": lambda params: MADA(params, lr=0.1, weight_decay=0.0, learn=(), use_ema_eval=True),
}


class Net(nn.Module):
    """A frozen bias, a buffer, a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.first(x).tanh()) * self.scale)


def engine_of(stage: int, dtype: torch.dtype, rule: str = "PACE") -> Any:
    import sys

    import deepspeed

    logging.disable(logging.CRITICAL)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled for the CPU
    deepspeed.init_distributed("gloo")
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, optimizer=RULES[rule](trained), config=config)[0]


def step(engine: Any, t: int, dtype: torch.dtype) -> None:
    """The same batch on all ranks, whose mean gradient is that of one."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t)).to(dtype)
    engine.backward(engine(x).float().square().mean())
    engine.step()


def exported(stage: int, dtype: torch.dtype, rule: str) -> tuple[dict[str, Tensor], list[str]]:
    """The export, and what was wrong. The right average follows from the engine's own float32 weights after each step,
    by the formula; both are rounded to the weights' dtype."""
    from deepspeed.utils import safe_get_full_fp32_param

    from pace_kernels.integrations.callbacks import stepping
    from pace_kernels.integrations.deepspeed import ema_state_dict

    engine = engine_of(stage, dtype, rule)
    module, wrong = engine.module, []

    def weights() -> dict[str, Tensor]:
        """In float32, as the optimizer has them."""
        found = {}
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            whole = safe_get_full_fp32_param(p)
            if whole is None:
                narrow = getattr(engine.optimizer, "fp16_groups", [[]])[0]
                whole = dict(zip(narrow, getattr(engine.optimizer, "fp32_groups", [[]])[0], strict=False)).get(p, p)
            found[name] = whole.detach().double().clone()
        return found

    averages, state = weights(), stepping(engine.optimizer).state  # DeepSpeed may have taken a step of zeros
    for t in range(STEPS):
        step(engine, t, dtype)
        w = (
            1 + next(iter(state.values()))["step"].item()
        ) ** -0.2  # docs/pace.md, with the defaults of PACE and MADA: γ = 1, ρ = 0, κ = 0.2
        for name, value in weights().items():
            averages[name] += w * (value - averages[name])

        if t == 1:
            ema_state_dict(engine)  # training goes on as if it had not been called
    before = weights()
    result = ema_state_dict(engine)
    if any(not torch.equal(value, before[name]) for name, value in weights().items()):
        wrong.append("the export changed the weights")
    if torch.distributed.get_rank() != 0:
        return result, wrong
    for name, average in averages.items():
        # Rounded in each of the steps to float32, and at the end to the weights' dtype.
        bound = (STEPS * 4 * 2.0**-24 + torch.finfo(dtype).eps) * average.abs().max()
        if result[name].dtype != dtype or (result[name].double() - average).abs().max() > bound:
            wrong.append(name)
    return result, wrong


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("stage", "dtype"), ENGINES, ids=str)
def test_the_averages_are_exported(stage: int, dtype: torch.dtype, rule: str) -> None:
    (first, wrong), (other, wrong_there) = run(2, exported, stage, dtype, rule)
    assert (wrong, wrong_there, other) == ([], [], {})
    model = Net().to(dtype)
    assert list(first) == list(model.state_dict())
    assert torch.equal(first["first.weight"], first["tied.weight"])
    assert first["first.weight"].data_ptr() != first["tied.weight"].data_ptr()
    assert torch.equal(first["first.bias"], model.first.bias) and torch.equal(first["scale"], model.scale)
    assert not torch.equal(first["second.weight"], model.second.weight)


def refusals(stage: int) -> dict[str, str]:
    """What is said before a step, by swaps of the optimizer within, and by the callbacks."""
    from pace_kernels.integrations.callbacks import averaging, stepping
    from pace_kernels.integrations.deepspeed import ema_state_dict

    engine = engine_of(stage, torch.bfloat16)
    inner = stepping(engine.optimizer)
    said = {"export before a step": said_by(lambda: ema_state_dict(engine))}
    step(engine, 0, torch.bfloat16)
    said["eval"] = said_by(lambda: inner.eval(engine.module))
    said["averaged"] = said_by(lambda: pace_kernels.averaged(engine.module, inner).__enter__())
    said["ema_state_dict"] = said_by(lambda: pace_kernels.ema_state_dict(engine.module, inner))
    said["callback"] = said_by(lambda: averaging(engine.optimizer, engine.module))
    return said


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_would_not_reach_the_model_is_refused(stage: int) -> None:
    for said in run(2, refusals, stage):
        assert "no average yet" in said.pop("export before a step")
        assert "integrations.deepspeed.ema_state_dict(engine)" in said.pop("callback")
        for sentence in said.values():
            assert "no parameter that this optimizer steps" in sentence and "DeepSpeed" in sentence


def another_optimizer() -> str:
    from pace_kernels.integrations.deepspeed import ema_state_dict

    RULES["SGD"] = lambda params: torch.optim.SGD(params, lr=0.1)
    try:
        ema_state_dict(engine_of(1, torch.bfloat16, "SGD"))
    except TypeError as error:
        return str(error)
    return ""


def test_an_engine_of_another_optimizer_is_refused() -> None:
    assert ["SGD" in said for said in run(2, another_optimizer)] == [True, True]


def with_a_hook() -> str:
    from pace_kernels.integrations.deepspeed import ema_state_dict

    engine = engine_of(1, torch.bfloat16)
    step(engine, 0, torch.bfloat16)

    def clones(module: Any, state: Any, prefix: str, _: Any) -> None:
        state["second.weight"] = state["second.weight"].detach().clone()

    engine.module._register_state_dict_hook(clones)
    return said_by(lambda: ema_state_dict(engine))


def test_a_hook_that_hands_out_something_else_is_refused() -> None:
    for said in run(2, with_a_hook):
        assert "'second.weight'" in said


def through_the_trainers() -> list[str]:
    """The callback's own hooks, with what Trainer and Lightning hand to them."""
    from types import SimpleNamespace

    engine = engine_of(2, torch.bfloat16)
    said = []
    with contextlib.suppress(ModuleNotFoundError):
        from accelerate.utils import DeepSpeedOptimizerWrapper

        from pace_kernels.integrations.transformers import UseAverage

        wrapped = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)  # its __init__ wants an Accelerator
        wrapped.optimizer = engine.optimizer
        given = {"model": engine.module, "optimizer": wrapped}
        said.append(said_by(lambda: UseAverage().on_train_begin(None, None, None, **given)))
    with contextlib.suppress(ModuleNotFoundError):
        from pace_kernels.integrations.lightning import UseAverage as OfLightning

        trainer = SimpleNamespace(optimizers=[engine.optimizer], lightning_module=engine.module)
        said.append(said_by(lambda: OfLightning().on_fit_start(trainer, engine.module)))
    return said


def test_the_callbacks_refuse_it_as_training_begins() -> None:
    for said in run(2, through_the_trainers):
        assert all("integrations.deepspeed.ema_state_dict(engine)" in sentence for sentence in said)
