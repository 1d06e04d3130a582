"""Promise: a checkpoint that is torn, of something else, or not true is refused by name, and the optimizer goes on as
if nobody had tried; one of an older format goes on where it was saved."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data import checkpoint, make_format0
from test_checkpoint_properties import Training, bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_leaves

import pace_kernels
from pace_kernels import MADA, PACE
from pace_kernels.optimizer import KernelOptimizer
from pace_kernels.states import CODED_FORMAT, FORMAT

F32 = torch.float32


def training_of(script: str, swapped: bool = False) -> Training:
    training = Training(script, F32)
    for index in range(3):
        training.step(index, set(), 1.0)
    if swapped:
        training.optimizer.eval()
    return training


def snapshot(training: Training) -> Any:
    """All of an optimizer that can be told from outside, and where its tensors lie."""
    o = training.optimizer
    hooks = [list(v) for k, v in vars(o).items() if k.endswith("_hooks")]
    places = [[(k, v.data_ptr()) for k, v in s.items()] for s in o.state.values()]
    learned = [[v.data_ptr() for v in g.values() if isinstance(v, torch.Tensor)] for g in o.param_groups]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in o.param_groups]
    facts = [dict(training.model.state_dict()), list(o.state.values()), groups, o.defaults]
    return bits(facts), o._swapped, o._dry, o._incoming, o._backend_name, hooks, places, learned


def assert_untouched(training: Training, loads: Callable[[KernelOptimizer], None], message: str) -> None:
    """The load is refused with the message, nothing is changed by it, and training goes on as if it was never tried."""
    twin = copy.deepcopy(training)
    before = snapshot(training)
    with pytest.raises((ValueError, TypeError), match=message):
        loads(training.optimizer)
    assert snapshot(training) == before
    for t in (training, twin):
        t.optimizer.train()
        for index in range(5, 8):
            t.step(index, {1}, 1.0)
    assert bits(training.optimizer.state_dict()) == bits(twin.optimizer.state_dict())
    assert bits(dict(training.model.state_dict())) == bits(dict(twin.model.state_dict()))


# ---- files ----


# What torch.load raises. OSError: it may seek to before the begin of a file that was cut off.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError)


def file_of(training: Training) -> bytes:
    file = io.BytesIO()
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, file)
    return file.getvalue()


def resume(training: Training, content: bytes) -> None:
    saved = torch.load(io.BytesIO(content), weights_only=True)
    training.optimizer.load_state_dict(saved["optimizer"])
    training.model.load_state_dict(saved["model"])


@pytest.mark.parametrize("script", ["PACE", "MADA, pulled"])
def test_a_truncated_file_does_not_load(script: str) -> None:
    training = training_of(script)
    content = file_of(training)
    before = snapshot(training)
    cuts = {0, 1, 2, 3, 100, *range(0, len(content), len(content) // 40), *range(len(content) - 30, len(content))}
    for cut in sorted(cuts):
        with pytest.raises(UNREADABLE):
            resume(training, content[:cut])
    assert snapshot(training) == before


@pytest.mark.slow
def test_a_flipped_bit_is_found() -> None:
    """torch.load does not look at the checksums of the file, and finds only what it can't read. docs/checkpoints.md
    says what to do: zipfile finds all of them. What does not load changes nothing."""
    training = training_of("MADA, pulled")
    content = file_of(training)
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    read = loaded = 0
    for record in zipfile.ZipFile(io.BytesIO(content)).infolist():
        name, extra = struct.unpack("<HH", content[record.header_offset + 26 : record.header_offset + 30])
        start = record.header_offset + 30 + name + extra
        for at in range(start, start + record.file_size, max(1, record.file_size // 3)):
            flipped = bytearray(content)
            flipped[at] ^= 0x10
            assert zipfile.ZipFile(io.BytesIO(bytes(flipped))).testzip() == record.filename
            before = snapshot(training)
            read += 1
            try:
                saved = torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
                training.optimizer.load_state_dict(saved["optimizer"])
                loaded += 1
            except Exception:
                assert snapshot(training) == before
    assert read > 100 and 0 < loaded < read


KILLED = """
import os, sys, torch, pace_kernels
path, atomic = sys.argv[1], sys.argv[2] == "atomic"
model = torch.nn.Linear(1024, 1024)
optimizer = pace_kernels.PACE(model.parameters())
def save(step):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    if atomic:
        torch.save(saved, path + ".tmp")
        os.replace(path + ".tmp", path)
    else:
        torch.save(saved, path)
save(1)
print("saved", flush=True)
while True:
    save(2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.slow
def test_a_save_that_is_killed(atomic: bool, tmp_path: Path) -> None:
    """With the recipe of docs/checkpoints.md, a whole checkpoint is there at any time. Without it, a file that was
    cut off: that is what the test below loads, at every length."""
    path = tmp_path / "checkpoint.pt"
    root = str(Path(pace_kernels.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", KILLED, str(path), "atomic" if atomic else "plain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        whole = path.stat().st_size
        writing = path.with_name(path.name + ".tmp") if atomic else path
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if 0 < writing.stat().st_size < whole:
                    break
            except FileNotFoundError:
                pass
    finally:
        process.kill()
        process.wait()
    model = torch.nn.Linear(1024, 1024)
    optimizer = PACE(model.parameters())
    if atomic:
        saved = torch.load(path, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
        steps = [int(state["step"]) for state in optimizer.state.values()]
        assert steps[0] == steps[1] >= 1
    elif path.stat().st_size < whole:  # else it was just through
        with pytest.raises(UNREADABLE):
            torch.load(path, weights_only=True)


# ---- what does not fit ----

Change = Callable[[dict[str, Any]], Any]


def state(**values: Any) -> Change:
    return lambda saved: saved["state"][0].update(values)


def option(**values: Any) -> Change:
    return lambda saved: [group.update(values) for group in saved["param_groups"][1:]]


def no_state(name: str) -> Change:
    return lambda saved: saved["state"][0].pop(name)


ONES = torch.ones(4, 3, 2, 2)  # of the first parameter's shape
HERE = r"the state of param_groups\[0\]\['params'\]\[0\]"
GROUP = r"param_groups\[1\] of the checkpoint: "
BOTH: dict[str, tuple[Change, str]] = {
    "another shape": (state(exp_avg=torch.ones(2)), rf"{HERE}: exp_avg must be a tensor of shape \(4, 3, 2, 2\)"),
    "transposed": (state(exp_avg_sq=torch.ones(2, 2, 3, 4)), "exp_avg_sq must be a tensor of shape"),
    "integers": (state(exp_avg=ONES.long()), f"{HERE}: exp_avg must be dense, of torch.float32.*, got torch.int64"),
    "complex numbers": (state(exp_avg_sq=ONES.cfloat()), "exp_avg_sq must be dense, of .*, got torch.complex64"),
    "booleans": (state(ema=ONES.bool()), "ema must be dense, of .*, got torch.bool"),
    "sparse": (state(exp_avg=ONES.to_sparse()), "exp_avg must be dense, of .*, got torch.sparse_coo"),
    "on meta": (state(exp_avg=ONES.to("meta")), "exp_avg is on the meta device"),
    "a list": (state(exp_avg=[1.0]), "exp_avg must be a tensor of shape .*, got list"),
    "None": (state(exp_avg_sq=None), "exp_avg_sq must be a tensor of shape .*, got NoneType"),
    "an unknown state": (state(exp_inf=ONES), f"{HERE} has exp_inf, which is no state of"),
    "a key that is no name": (lambda s: s["state"][0].update({3: ONES}), f"{HERE} has 3, which is no state of"),
    "no first moment": (no_state("exp_avg"), f"{HERE} lacks exp_avg"),
    "no second moment": (no_state("exp_avg_sq"), f"{HERE} lacks exp_avg_sq"),
    "no average": (no_state("ema"), f"{HERE} lacks ema"),
    "no step": (no_state("step"), f"{HERE} lacks step"),
    "step NaN": (state(step=torch.tensor(float("nan"))), f"{HERE}: step must be one whole number >= 0"),
    "step infinite": (state(step=float("inf")), f"{HERE}: step must be one whole number"),
    "step negative": (state(step=-1), f"{HERE}: step must be one whole number"),
    "step huge": (state(step=torch.tensor(1e30)), f"{HERE}: step must be .* <= 9007199254740992"),
    "step beyond float64": (state(step=2**53 + 1), f"{HERE}: step must be .* <= 9007199254740992, got 9.*3"),
    "step between": (state(step=2.5), f"{HERE}: step must be one whole number"),
    "step a string": (state(step="3"), f"{HERE}: step must be one whole number >= 0 .*, got '3'"),
    "step True": (state(step=True), f"{HERE}: step must be one whole number"),
    "step two": (state(step=torch.ones(2)), f"{HERE}: step must be one whole number"),
    "step complex": (state(step=torch.tensor(1j)), f"{HERE}: step must be one whole number"),
    "step on meta": (state(step=torch.ones((), device="meta")), f"{HERE}: step must be one whole number"),
    "no states": (lambda s: s.pop("state"), "must have 'state' and 'param_groups'.*: state is only param_groups"),
    "no groups": (lambda s: s.pop("param_groups"), "must have 'state' and 'param_groups'.*param_groups is only state"),
    "nothing": (lambda s: s.clear(), "must have 'state' and 'param_groups'.*: state is only nothing"),
    "states in a list": (lambda s: s.update(state=list(s["state"].values())), "state is list"),
    "a state that is a tensor": (lambda s: s["state"].update({1: ONES}), "parameter 1 must be a dict, got Tensor"),
    "a group that is a list": (lambda s: s["param_groups"].__setitem__(1, []), r"param_groups\[1\] .* must be a dict"),
    "a group without params": (lambda s: s["param_groups"][0].pop("params"), r"param_groups\[0\] .* a list 'params'"),
    "a group less": (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    "a group more": (lambda s: s["param_groups"].append({"params": []}), "different number of parameter groups"),
    "a parameter less": (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "a stranger's state": (lambda s: s["state"].update({99: {"step": 1}}), "in none of its groups: 99"),
    "eps": (option(eps=-1.0), f"{GROUP}eps must be finite and at least"),
    "eps a string": (option(eps="1e-8"), f"{GROUP}eps must be a number, got '1e-8'"),
    "lr NaN": (option(lr=float("nan")), f"{GROUP}lr must be finite"),
    "lr of two": (option(lr=torch.ones(2)), f"{GROUP}lr must be a number or a tensor with one"),
    "betas": (option(betas=(0.9, 1.0)), rf"{GROUP}betas\[1\] must be in \[0, 1\), got 1.0"),
    "betas three": (option(betas=(0.9, 0.9, 0.9)), f"{GROUP}betas must be two numbers"),
    "capturable 1": (option(capturable=1), f"{GROUP}capturable must be True or False, got 1"),
    "a frequency": (option(ema_update_freq=0.5), f"{GROUP}ema_update_freq must be an integer >= 1"),
    "a form": (option(pullback_from="average"), f"{GROUP}pullback_from must be"),
    "swapped 2": (option(swapped=2), f"{GROUP}swapped must be True or False, got 2"),
    "swapped without its weights": (option(swapped=True), r"was saved between eval\(\) and train\(\)"),
    "skipped -3": (option(skipped_steps=torch.tensor(-3)), f"{GROUP}skipped_steps must be one whole number"),
    "skipped half": (option(skipped_steps=0.5), f"{GROUP}skipped_steps must be one whole number"),
    "names": (option(state_names="ema"), f"{GROUP}state_names must be None or a tuple"),
    "the future": (option(format_version=CODED_FORMAT + 1), f"was saved in format {CODED_FORMAT + 1} by a later"),
    "format -1": (option(format_version=-1), r"param_groups\[1\]: format_version must be an integer >= 0, got -1"),
    "format '1'": (option(format_version="1"), "format_version must be an integer >= 0, got '1'"),
    "format True": (option(format_version=True), "format_version must be an integer >= 0, got True"),
    "format 1.0": (option(format_version=1.0), "format_version must be an integer >= 0, got 1.0"),
    "format None": (option(format_version=None), "format_version must be an integer >= 0, got None"),
}  # fmt: skip


def row(*head: float) -> torch.Tensor:
    full = torch.full((8,), 0.5, dtype=torch.float64)
    full[: len(head)] = torch.tensor(head, dtype=torch.float64)
    return full


NAN = float("nan")
SIX = torch.full((6,), 0.5, dtype=torch.float64)
OF_MADA: dict[str, tuple[Change, str]] = {
    "scalars of another length": (state(last_scalars=torch.ones(7)), r"last_scalars must be a tensor of shape \(8,\)"),
    "scalars of code 7": (state(last_scalars=row(7.0)), f"{HERE}: last_scalars must be of a step"),
    "scalars of code NaN": (state(last_scalars=row(NAN)), f"{HERE}: last_scalars must be of a step"),
    "scalars with lr NaN": (state(last_scalars=row(1.0, NAN)), f"{HERE}: last_scalars must be of a step"),
    "scalars with beta1 2": (state(last_scalars=row(1.0, 0.1, 2.0)), f"{HERE}: last_scalars must be of a step"),
    "scalars of integers": (state(last_scalars=row().long()), "last_scalars must be dense, of"),
    "no scalars": (no_state("last_scalars"), f"{HERE} lacks last_scalars"),
    "no last gradient": (no_state("last_grad"), f"{HERE} lacks last_grad"),
    "no older gradient": (no_state("older_grad"), f"{HERE} lacks older_grad"),
    "no differences": (no_state("exp_avg_diff"), f"{HERE} lacks exp_avg_diff"),
    "coefficients of five": (option(coefficient_values=SIX[:5]), r"must be a tensor of shape \(6,\), got \(5,\)"),
    "coefficients None": (option(coefficient_values=None), r"coefficient_values must be a tensor of .*, got None"),
    "coefficients NaN": (option(coefficient_values=SIX * NAN), f"{GROUP}coefficient_values: beta1 must be in"),
    "coefficients 2": (option(coefficient_values=SIX * 4), r"coefficient_values: beta1 must be in \[0, 1\), got 2.0"),
    "coefficients complex": (option(coefficient_values=SIX.cfloat()), "coefficient_values must be of real numbers"),
    "momenta infinite": (option(coefficient_momenta=SIX / 0), "coefficient_momenta: beta1 must be finite"),
    "momenta None": (option(coefficient_momenta=None), "coefficient_momenta must be a tensor of shape"),
    "a count NaN": (option(hyper_step=torch.tensor(NAN)), f"{GROUP}hyper_step must be one whole number"),
    "a count of -1": (option(hyper_step=torch.tensor(-1.0)), f"{GROUP}hyper_step must be one whole number"),
    "learn a string": (option(learn="beta1"), f"{GROUP}learn must be a tuple of names"),
    "learn a stranger": (option(learn=("beta9",)), f"{GROUP}learn must be coefficients, of"),
    "learn another": (option(learn=("rho",)), "learn differs between groups"),
    "bounds": (option(bounds={"rho": (0.9, 0.1)}), rf"{GROUP}bounds\['rho'\] must be \(low, high\)"),
    "hyper_lr": (option(hyper_lr=-1.0), rf"{GROUP}hyper_lr\['beta1'\] must be finite"),
    "last options": (option(last_options=(1, 2, 3)), f"{GROUP}last_options must be None, or"),
    "frozen": (option(frozen=(0.5,)), f"{GROUP}frozen must be None, or values of"),
    "frozen at 2": (option(frozen=(2.0,) * 6), rf"{GROUP}frozen: beta1 must be in \[0, 1\]"),
    "last options of numbers": (option(last_options=(1, 2)), f"{GROUP}last_options must be None, or"),
    "last options of nothing": (option(last_options=3), f"{GROUP}last_options must be None, or"),
}  # fmt: skip
CASES = [("PACE", how) for how in BOTH] + [("MADA, pulled", how) for how in (*BOTH, *OF_MADA)]


@pytest.mark.parametrize(("script", "how"), CASES)
@pytest.mark.slow
def test_what_does_not_fit_changes_nothing(script: str, how: str) -> None:
    change, message = {**BOTH, **OF_MADA}[how]
    for swapped in (False, True):
        training = training_of(script, swapped)
        other = training_of(script)
        other.step(9, set(), 1.0)
        saved = copy.deepcopy(other.optimizer.state_dict())
        change(saved)
        assert_untouched(training, lambda optimizer, saved=saved: optimizer.load_state_dict(saved), message)


@pytest.mark.parametrize("what", [None, 3, "checkpoint.pt", [1]], ids=str)
def test_what_is_no_dict_is_refused(what: Any) -> None:
    assert_untouched(training_of("PACE"), lambda o: o.load_state_dict(what), "state_dict must be a dict, got")


# ---- other optimizers ----


def other_optimizers(params: list[torch.nn.Parameter]) -> dict[str, tuple[Callable[[], torch.optim.Optimizer], str]]:
    matrices = torch.nn.Parameter(torch.ones(2, 3))
    muon = getattr(torch.optim, "Muon", None)
    return {
        "SGD": (lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9), "momentum_buffer"),
        "Adagrad": (lambda: torch.optim.Adagrad(params), "has sum"),
        "RMSprop": (lambda: torch.optim.RMSprop(params), "square_avg"),
        "RMSprop, centered": (lambda: torch.optim.RMSprop(params, centered=True, momentum=0.9), "grad_avg"),
        "Adadelta": (lambda: torch.optim.Adadelta(params), "acc_delta, square_avg"),
        "Adamax": (lambda: torch.optim.Adamax(params), "exp_inf"),
        "NAdam": (lambda: torch.optim.NAdam(params), "mu_product"),
        "ASGD": (lambda: torch.optim.ASGD(params), "ax, eta, mu"),
        "Rprop": (lambda: torch.optim.Rprop(params), "prev, step_size"),
        "Adafactor": (lambda: torch.optim.Adafactor(params), "col_var|row_var|variance"),
    } | ({"Muon": (lambda: muon([matrices], lr=0.1), "momentum_buffer")} if muon else {})


OTHERS = list(other_optimizers([torch.nn.Parameter(torch.ones(2, 3))]))


@pytest.mark.parametrize("script", ["PACE", "MADA, pulled", "Lion"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_optimizer_is_refused(script: str, name: str) -> None:
    p = torch.nn.Parameter(torch.ones(2, 3))
    make, message = other_optimizers([p])[name]
    theirs = make()
    for q in theirs.param_groups[0]["params"]:
        q.grad = torch.full_like(q, 0.1)
    theirs.step()
    training = training_of(script)
    group = {"params": list(training.model.late.parameters())[:1]}
    make_ours = type(training.optimizer)
    ours = Training.__new__(Training)
    ours.script, ours.dtype, ours.added, ours.refused = script, F32, None, []
    ours.model = training.model
    ours.optimizer = make_ours([group]) if script != "Lion" else MADA.preset("lion", [group])
    ours.step(0, set(), 1.0)
    assert_untouched(ours, lambda o: o.load_state_dict(copy.deepcopy(theirs.state_dict())), message)


# ---- PACE and MADA for each other ----


@pytest.mark.parametrize("learn", [(), ("beta1", "rho")])
def test_mada_goes_on_from_pace(learn: tuple[str, ...]) -> None:
    """Moments, average, step counts and options mean the same. As AdamW, it goes on as PACE would, but for rounding."""
    pace = training_of("PACE")
    mada = training_of("PACE")
    options: dict[str, Any] = {"beta3": 0.0, "rho": 1.0, "learn": learn}
    groups = [{"params": g["params"]} for g in mada.optimizer.param_groups]
    mada.optimizer = MADA(groups, **options)
    mada.optimizer.load_state_dict(pace.optimizer.state_dict())
    assert "log_stats" not in mada.optimizer.param_groups[0]
    assert mada.optimizer.param_groups[0]["lambda_pullback"] == 0.15
    for t in (pace, mada):
        t.step(5, set(), 1.0)
    for p, q in zip(pace.model.parameters(), mada.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-22)
        if p in pace.optimizer.state:
            assert pace.optimizer.state[p]["step"] == mada.optimizer.state[q]["step"]
            a, b = pace.optimizer.state[p]["ema"], mada.optimizer.state[q]["ema"]
            torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-22)


@pytest.mark.parametrize("preset", ["adamw", "hyperadam"])
def test_pace_goes_on_from_mada_where_it_is_adamw(preset: str) -> None:
    mada, pace = training_of("PACE"), training_of("PACE")
    mada.optimizer = MADA.preset(preset, [{"params": g["params"]} for g in mada.optimizer.param_groups])
    for index in range(3):
        mada.step(index, set(), 1.0)
    mada.freeze()
    if preset == "hyperadam":
        assert mada.optimizer.param_groups[0]["learn"] == ()
    pace.model.load_state_dict(mada.model.state_dict())
    pace.optimizer = PACE([{"params": g["params"]} for g in pace.optimizer.param_groups], lambda_pullback=0.0)
    pace.optimizer.load_state_dict(mada.optimizer.state_dict())
    assert "learn" not in pace.optimizer.param_groups[0] and "lion_betas" not in pace.optimizer.param_groups[0]
    for t in (pace, mada):
        t.step(5, set(), 1.0)
    for p, q in zip(pace.model.parameters(), mada.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-22)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("yogi", "c is 0.0 in a checkpoint of MADA: PACE is AdamW, where it is 1.0"),
        ("lion", "has exp_avg_lion, which is no state of PACE"),
        ("adan", "has exp_avg_diff, last_grad, last_scalars, which is no state of PACE"),
        ("avgrad", "has mean_exp_avg_sq, which is no state of PACE"),
        ("hyperadam", "has last_grad, last_scalars, which is no state of PACE"),
    ],
)
def test_pace_refuses_another_mada(preset: str, message: str) -> None:
    training = training_of("PACE")
    mada = MADA.preset(preset, [{"params": g["params"]} for g in copy.deepcopy(training.optimizer).param_groups])
    for group in mada.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    mada.step()
    saved = mada.state_dict()
    assert_untouched(training, lambda o: o.load_state_dict(saved), message)


# ---- what distributed checkpoints drop ----


def test_states_that_a_flat_checkpoint_drops_are_missed() -> None:
    """It brings what a fresh optimizer has. Where options changed, that is less than was saved: no average here."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    saved, fresh = (PACE(m.parameters(), lambda_pullback=0.0, use_ema_eval=False) for m in models)
    saved.param_groups[0]["lambda_pullback"] = 0.5
    for _ in range(2):
        for p in models[0].parameters():
            p.grad = torch.ones_like(p)
        saved.step()
    flat = get_optimizer_state_dict(models[0], saved, options=options)
    with pytest.raises(ValueError, match="lacks ema"):
        set_optimizer_state_dict(models[1], fresh, flat, options=options)
    fresh.param_groups[0]["lambda_pullback"] = 0.5  # as the script did
    fresh.state.clear()
    set_optimizer_state_dict(models[1], fresh, flat, options=options)
    assert all("ema" in s for s in fresh.state.values())


# ---- steps as torch.optim has had them, another capturable, names ----


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=str)
def test_steps_of_any_kind(step: Any) -> None:
    training = training_of("PACE")
    saved = copy.deepcopy(training.optimizer.state_dict())
    for s in saved["state"].values():
        s["step"] = step
    training.optimizer.load_state_dict(saved)
    steps = [s["step"] for s in training.optimizer.state.values()]
    assert all(s.shape == () and s.dtype == F32 and s == 3 for s in steps)


@pytest.mark.parametrize("script", ["PACE", "MADA"])
@pytest.mark.parametrize("saved_so", [False, True])
def test_capturable_comes_from_the_checkpoint(script: str, saved_so: bool) -> None:
    training = training_of(script)
    training.change({"capturable": saved_so}, None)
    training.step(4, set(), 1.0)
    twin = Training(script, F32)
    twin.change({"capturable": not saved_so}, None)
    twin.optimizer.load_state_dict(training.optimizer.state_dict())
    twin.model.load_state_dict(training.model.state_dict())
    assert all(g["capturable"] is saved_so for g in twin.optimizer.param_groups)
    for t in (training, twin):
        t.step(5, set(), 1.0)
    assert bits(training.optimizer.state_dict()) == bits(twin.optimizer.state_dict())


def test_names_in_another_order_are_pointed_out() -> None:
    """As in torch.optim, states go by position, and the names come from the checkpoint."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = PACE(model.named_parameters())
    optimizer.step()
    saved = optimizer.state_dict()
    turned = PACE(list(model.named_parameters())[::-1])
    with pytest.raises(ValueError, match="exp_avg must be a tensor of shape"):
        turned.load_state_dict(saved)  # a bias has not the shape of a weight
    weights = [("0.weight", model[0].weight), ("1.weight", model[1].weight)]
    optimizer, turned = PACE(weights), PACE(weights[::-1])
    optimizer.step()
    with pytest.warns(UserWarning, match=r"param_groups\[0\] was saved with its parameters in another order") as said:
        turned.load_state_dict(optimizer.state_dict())
    assert said[0].filename == __file__
    assert turned.param_groups[0]["param_names"] == ["0.weight", "1.weight"]


@pytest.mark.parametrize("script", ["PACE", "MADA, pulled"])
@pytest.mark.parametrize("saved_swapped", [False, True])
def test_loading_over_a_swap_leaves_live_weights(script: str, saved_swapped: bool) -> None:
    """The weights are the model's; but averages that are in their place would be taken for live ones from then on."""
    source, target = training_of(script, saved_swapped), training_of(script, not saved_swapped)
    live = bits(dict(training_of(script, False).model.state_dict()))
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert bits(dict(target.model.state_dict())) == live
    assert target.optimizer._swapped is saved_swapped
    target.model.load_state_dict(source.model.state_dict())
    for t in (source, target):
        t.optimizer.train()
        t.step(4, set(), 1.0)
    assert bits(source.optimizer.state_dict()) == bits(target.optimizer.state_dict())
    assert bits(dict(source.model.state_dict())) == bits(dict(target.model.state_dict()))


def test_skipped_steps_survive() -> None:
    training = training_of("PACE, capturable, lr a tensor")
    training.step(4, set(), NAN)
    training.step(5, set(), float("inf"))
    assert training.optimizer.skipped_steps == 2
    fresh = Training(training.script, F32)
    fresh.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert fresh.optimizer.skipped_steps == 2
    fresh.step(6, set(), NAN)
    assert (fresh.optimizer.skipped_steps, training.optimizer.skipped_steps) == (3, 2)


# ---- the format before there were versions ----


@pytest.mark.parametrize("dtype", make_format0.DTYPES, ids=str)
@pytest.mark.parametrize("case", make_format0.CASES)
def test_format_0_goes_on_where_it_was_saved(case: str, dtype: torch.dtype) -> None:
    """The files were written by the package at commit f84b320, which tests/data/make_format0.py says how to do."""
    made = torch.load(checkpoint(f"format0-{case}.pt"), weights_only=True)[str(dtype)]
    assert "format_version" not in made["saved"]["optimizer"]["param_groups"][0]
    model = make_format0.model_of(dtype)
    optimizer = make_format0.optimizer_of(pace_kernels, case, model)
    optimizer.load_state_dict(made["saved"]["optimizer"])
    model.load_state_dict(made["saved"]["model"])
    assert all(g["format_version"] == FORMAT for g in optimizer.param_groups)
    optimizer.train()
    make_format0.train(model, optimizer, range(4, 7))
    now = make_format0.ends(model, optimizer)
    assert bits(dict(now["model"])) == bits(dict(made["ends"]["model"]))
    assert bits(now["states"]) == bits(made["ends"]["states"])
    assert bits(now["learned"]) == bits(made["ends"]["learned"])
    # Where the average's bits are others than f84b320's: three steps, of three roundings each in either form.
    for ours, theirs in zip(tree_leaves(now), tree_leaves(made.get("ends_of_old", now)), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3 * 6 * 2**-24 * float(theirs.abs().max()))
