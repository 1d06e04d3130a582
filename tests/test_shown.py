"""Promise: users see of the optimizers what is meant for them: types refuse misspelt options, groups nearly misspelt
ones, and repr, dir and statistics hold no bookkeeping."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pace_kernels
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW

KINDS: dict[str, Any] = {
    "PACE": lambda params, **kwargs: PACE(params, log_stats=True, **kwargs),
    "MADA": MADA,
    "Pullback": lambda params, **kwargs: Pullback(torch.optim.Adam(params), log_stats=True, **kwargs),
    "ScheduleFreeAdamW": ScheduleFreeAdamW,
}
each_kind = pytest.mark.parametrize("kind", KINDS)

# A user's file; the lines that end in "# no" are type errors, and no others.
USERS = """
import torch
from pace_kernels import MADA, PACE, Pullback, ScheduleFreeAdamW, averaged, clip_coefficient, ema_state_dict
model = torch.nn.Linear(4, 1)
pace = PACE(model.parameters(), lr=torch.tensor(1e-3), pullback_from="step", backend="cpu")
PACE([{"params": [model.weight], "lr": 0.1}], pullback_from="steps")  # no
PACE(model.parameters(), lambda_pulback=0.1)  # no
PACE(model.parameters(), state_bits=8, ema_bits=16, master_weight_bits=24)
PACE(model.parameters(), state_bits=4)  # no
ScheduleFreeAdamW(model.named_parameters(), backend="gpu")  # no
MADA(model.parameters(), learn=("beta1", "rho"), hyper_lr={"rho": 0.1}, second_moment="max", coefficients="group")
MADA(model.parameters(), learn=("beta1", "roh"))  # no
MADA(model.parameters(), hyper_lr={"beta": 0.1})  # no
MADA(model.parameters(), second_moment="maximum")  # no
MADA(model.parameters(), coefficients="groups")  # no
MADA.preset("lion", model.parameters())
MADA.preset("lions", model.parameters())  # no
pulled = Pullback(torch.optim.SGD(model.parameters()), gain=0.1, pullback_from="weights")
pulled.step(clip_coef=0.5)  # no
coefficient, norm = clip_coefficient(model.parameters(), 1.0)
pace.step(clip_coef=coefficient)
pace.clip_coef = 0.5
pace.train(keep="loaded")
pace.train(keep="load")  # no
with pace.averaged(model), averaged(model, pace, pulled):
    saved: dict[str, object] = ema_state_dict(model, pace)
stats: dict[str, float] = pace.get_step_stats()
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_misspelt_option_is_a_type_error(checker: str, tmp_path: Path) -> None:
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "user.py").write_text(USERS)
    root = str(Path(pace_kernels.__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "strict", "extraPaths": ["{root}"]}}')
    strict = ["--strict", f"--cache-dir={root}/.mypy_cache", "user.py"]
    options = strict if checker == "mypy" else ["--pythonpath", sys.executable]
    command = [sys.executable, "-m", checker, *options]
    environment = {**os.environ, "MYPYPATH": root}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    found = {int(line) for line in re.findall(r"user\.py:(\d+):.*error", done.stdout)}
    wanted = {number for number, line in enumerate(USERS.splitlines(), 1) if line.endswith("# no")}
    assert found == wanted, done.stdout + done.stderr


def trained(kind: str) -> Any:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = KINDS[kind]([param])
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    return optimizer


@each_kind
def test_statistics_are_flat_floats(kind: str) -> None:
    stats = trained(kind).get_step_stats()
    assert len(stats) >= 3 and all(type(k) is str and type(v) is float for k, v in stats.items())


def test_statistics_of_what_is_learned_by_group() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = MADA([{"params": [p]} for p in params], coefficients="group", learn=("rho",))
    assert sorted(optimizer.get_step_stats()) == ["hypergradient_rho_0", "hypergradient_rho_1", "rho_0", "rho_1"]
    optimizer.freeze()
    assert optimizer.get_step_stats() == {}


@each_kind
def test_repr_and_dir_hold_options_and_methods_alone(kind: str) -> None:
    optimizer = trained(kind)
    optimizer.param_groups[0]["my_tag"] = 7
    shown = set(re.findall(r"^    (\w+): ", repr(optimizer), re.M))
    assert {"lr", "betas", "my_tag"} <= shown
    assert not re.search(
        r"swapped|format_version|skipped_steps|state_names|coefficient_|hyper_step|weight_sum", repr(optimizer)
    )
    assert {name for name in dir(pace_kernels) if not name.startswith("_")} == set(pace_kernels.__all__)
    public = {name for name in dir(type(optimizer)) if not name.startswith("_")} - set(dir(torch.optim.Optimizer))
    assert all(name.islower() for name in public) and "plans" not in public


@pytest.mark.parametrize(
    ("make", "came", "meant"),
    [
        (PACE, "lambda_pulback", "lambda_pullback"),
        (MADA, "lion_beta", "lion_betas"),
        (ScheduleFreeAdamW, "warmup_step", "warmup_steps"),
        (lambda groups: Pullback(torch.optim.SGD(groups), gain=0.1), "ema_kapa", "ema_kappa"),
    ],
)
def test_an_option_of_a_group_that_is_nearly_misspelt_is_refused(make: Any, came: str, meant: str) -> None:
    param = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=f"{came}.*did you mean '{meant}'"):
        make([{"params": [param], came: 1}])
    tags = {"params": [param], "layer": 3, "lr_scale": 0.5, "is_bias": True, "decay": 1, "scale": 2, "group": "a"}
    optimizer = make([tags])
    assert optimizer.param_groups[0]["layer"] == 3
    optimizer.param_groups[0][came] = 1  # a tag that is set later stays
    param.grad = torch.ones(1)
    optimizer.step()


def test_messages_name_what_was_called() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for optimizer in (PACE(model.parameters()), ScheduleFreeAdamW(model.parameters())):
        with pytest.raises(ValueError, match=r"^averaged\(\): model has no parameter"), optimizer.averaged(other):
            pass
        optimizer.eval()
        with pytest.raises(RuntimeError, match="while the averaged weights are swapped in"):
            optimizer.step()


def test_an_instruction_set_that_is_not_there_ends_the_step() -> None:
    if not pace_kernels.backends()["cpu"].available:
        pytest.skip("the native kernels are not built")
    code = "import torch, pace_kernels; p = torch.ones(1); p.grad = p.clone(); pace_kernels.PACE([p]).step()"
    environment = {**os.environ, "PACE_CPU_ISA": "avx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RuntimeError: the requested instruction set is not available: PACE_CPU_ISA=avx: this build" in done.stderr


def test_moments_of_radam_are_taken_over_with_a_warning() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    radam = torch.optim.RAdam([param])
    radam.step()
    with pytest.warns(UserWarning, match="is of RAdam: its moments are Adam's and are taken over"):
        PACE([param]).load_state_dict(radam.state_dict())
