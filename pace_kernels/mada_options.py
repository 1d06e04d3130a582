"""MADA's options: presets, what may be given for each of its coefficients, what is checked, what it comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .checks import (
    Group,
    check_average_options,
    check_common_options,
    check_count,
    check_number,
    check_pair,
    check_word,
    plain_number,
    require,
    shortened,
)
from .definitions.mada import COEFFICIENTS, MADA
from .memory import is_whole
from .options import listed, plain_float, plain_sequence

Coefficient: TypeAlias = Literal["beta1", "beta2", "beta3", "rho", "c", "gamma"]
Preset: TypeAlias = Literal["adamw", "amsgrad", "avgrad", "adan", "yogi", "lion", "hyperadam"]
_HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
_BOUNDS = {"beta1": (0.01, 0.99), "beta2": (0.501, 0.999), "beta3": (0.0, 0.99)} | dict.fromkeys(
    ("rho", "c", "gamma"), (0.0, 1.0)
)
# What a group keeps of its learned coefficients, float64 tensors on the parameters' device: values, momenta and
# hypergradients in the order of COEFFICIENTS, and a step count. They are options, so that checkpoints carry them; with
# coefficients="global" all groups have the same ones.
LEARNED = ("coefficient_values", "coefficient_momenta", "hypergradients", "hyper_step")
LEARNING = ("learn", "hyper_lr", "hyper_momentum", "hyper_clip", "hyper_warmup", "bounds")
# The options of groups that no other optimizer has, and what the groups hold of MADA. "last_options" is in checkpoints
# alone: what the step to redo was taken with, where options were changed since. "frozen": the values of freeze().
MADA_ONLY = (
    "lion_betas",
    "second_moment",
    "coefficients",
    *COEFFICIENTS,
    *LEARNING,
    "hyper_order",  # stands only in groups where it is "published": flattened checkpoints of before have no key for it
    *LEARNED,
    "last_options",
    "frozen",
    "hyper_process_group",  # ZeroRedundancyOptimizer puts all arguments into groups, and so into checkpoints
)
PRESETS: dict[str, dict[str, Any]] = {
    "adamw": {"rho": 1.0, "betas": (0.9, 0.999), "weight_decay": 0.01},
    "amsgrad": {"rho": 0.0, "second_moment": "max", "betas": (0.9, 0.999), "weight_decay": 0.01},
    "avgrad": {"rho": 0.0, "second_moment": "mean", "betas": (0.9, 0.999), "weight_decay": 0.01},
    "adan": {"rho": 1.0, "beta3": 0.92, "betas": (0.98, 0.99), "weight_decay": 0.02},
    "yogi": {"rho": 1.0, "c": 0.0, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0},
    "lion": {"gamma": 0.0, "lion_betas": (0.9, 0.99), "lr": 1e-4, "weight_decay": 0.01},
    "hyperadam": {"rho": 1.0, "betas": (0.9, 0.999), "weight_decay": 0.01, "learn": ("beta1", "beta2")},
}
# The options of mada_step_ that a group has under other names, or in another form.
_OTHERWISE = ("learn", "beta1", "beta2", "lion_beta1", "lion_beta2", "second_max", "pullback_from_step")

# Those that the redone step and its sensitivities depend on, beside what it left in last_scalars.
REDONE_BY = (
    *("lion_beta1", "lion_beta2", "eps", "second_max", "pullback_from_step", "lambda_pullback", "clamp_pullback"),
    *("ema_kappa", "ema_rho", "ema_gamma"),
)


def _bits(learn: tuple[str, ...]) -> int:
    return sum(1 << k for k, name in enumerate(COEFFICIENTS) if name in learn)


def _expand(argument: str, given: object, base: Sequence[Any], convert: Callable[[object], Any]) -> tuple[Any, ...]:
    """An option of each coefficient, in their order: from a dict, which may leave some out, from six values, or from
    one for all. A tuple, so that it is changed by replacing it."""
    if given is None:
        return tuple(base)
    if isinstance(given, Mapping):
        for name in given:
            _check_name(argument, name)
        return tuple(convert(given[name]) if name in given else base[k] for k, name in enumerate(COEFFICIENTS))
    values = listed(given)
    if values is None or isinstance(plain_float(given), float):
        return (convert(given),) * len(COEFFICIENTS)
    require(len(values) == len(COEFFICIENTS), argument, f"given by name, or for all of {COEFFICIENTS}", given)
    return tuple(map(convert, values))


def _check_name(argument: str, name: object) -> None:
    known = isinstance(name, str) and name in COEFFICIENTS
    require(known, argument, f"coefficients, of {', '.join(COEFFICIENTS)}", name)


def _pair(value: object) -> tuple[Any, Any]:
    pair = plain_sequence(value)
    require(isinstance(pair, (tuple, list)) and len(pair) == 2, "bounds", "pairs (low, high)", value)
    return (pair[0], pair[1])


# Options that mean something only where a coefficient is learned: what they are where nobody gave them, and what makes
# one value plain.
_HYPER: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "hyper_lr": (tuple(_HYPER_LR[name] for name in COEFFICIENTS), plain_float),
    "hyper_momentum": ((0.0,) * len(COEFFICIENTS), plain_float),
    "hyper_clip": (10.0, plain_float),
    "hyper_warmup": (50, plain_number),
    "hyper_order": ("algorithm", lambda word: word),
    "bounds": (tuple(_BOUNDS[name] for name in COEFFICIENTS), _pair),
}


class Prepared(NamedTuple):
    """What the options of a group come to: those of ``mada_step_`` and ``mada_learn_``, the names of its states, and
    the options of learning as the group has them."""

    step: dict[str, Any]
    learn: dict[str, Any]
    states: tuple[str, ...]
    learning: dict[str, Any]


def fixed(group: Group, name: str) -> float:
    """The coefficient's value among the options: its fixed value, or where learning starts."""
    if name == "beta1":
        return float(group["betas"][0])
    return float(group["betas"][1] if name == "beta2" else group[name])


def expanded(given: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Options with ``learn`` in order and the hyper options by name."""
    options = dict(given)
    if "learn" in given:
        learn = given["learn"]
        names = list(learn) if isinstance(learn, (set, frozenset)) else listed(learn)
        if names is None:
            raise TypeError(f"learn must be a tuple of names, got {shortened(learn)}")
        for name in names:
            _check_name("learn", name)
        options["learn"] = tuple(name for name in COEFFICIENTS if name in names)
    if "bounds" in given and not isinstance(given["bounds"], Mapping):
        six = given["bounds"] is None or len(listed(given["bounds"]) or ()) == len(COEFFICIENTS)
        if not six:
            raise TypeError(f"bounds must be a dict from name to (low, high), got {shortened(given['bounds'])}")
    idle = not options.get("learn", base.get("learn", ()))
    for name, (start, convert) in _HYPER.items():
        if name in given:
            present = base.get(name, start)
            by_name = isinstance(start, tuple)
            options[name] = _expand(name, given[name], present, convert) if by_name else convert(given[name])
            unsaid = given[name] is None if name in ("hyper_lr", "bounds") else options[name] == start
            if idle and not unsaid and given[name] is not base.get(name) and options[name] != base.get(name):
                raise ValueError(f"{name} was given, but learn is empty: name the coefficients to learn")
    return options


def check_learned(group: Group) -> None:
    """What a group keeps of its learned coefficients, where it was replaced by hand: a step takes it last."""
    for name in LEARNED if group["learn"] else ():
        value, shape = group.get(name), () if name == "hyper_step" else (len(COEFFICIENTS),)
        if value is not None:
            good = isinstance(value, Tensor) and value.shape == shape and value.is_contiguous() and is_whole(value)
            dtypes = (torch.float32, torch.float64) if good and value.device.type == "mps" else (torch.float64,)
            require(good and value.dtype in dtypes, name, f"a contiguous float64 tensor of shape {shape}", value)


def check_mada_options(group: Group) -> None:
    """Raises ValueError or TypeError where an option of the group is not allowed."""
    check_common_options(group, MADA.options)
    check_average_options(group)
    check_pair("lion_betas", group["lion_betas"])
    check_word("second_moment", group["second_moment"], ("mean", "max"))
    check_word("coefficients", group["coefficients"], ("global", "group"))
    if group["learn"]:
        allowed = "at least 2**-51 where coefficients are learned: below, hypergradients take a small sqrt(V) for 0"
        require(group["eps"] >= 2.0**-51, "eps", allowed, group["eps"])
    _check_hyper_options(group)


def _check_hyper_options(group: Group) -> None:
    for k, name in enumerate(COEFFICIENTS):
        check_number(f"hyper_lr[{name!r}]", group["hyper_lr"][k], "finite and >= 0", lambda a: a >= 0)
        check_number(f"hyper_momentum[{name!r}]", group["hyper_momentum"][k], "in [0, 1)", lambda a: 0 <= a < 1)
        low, high = group["bounds"][k]
        widest = "within [0, 1)" if name.startswith("beta") else "within [0, 1]"
        for end in (low, high):
            check_number(f"bounds[{name!r}]", end, widest, lambda a: 0 <= a <= 1)
        ordered = low <= high and (high < 1 or not name.startswith("beta"))
        require(ordered, f"bounds[{name!r}]", f"(low, high), low <= high, {widest}", (low, high))
    clip, warmup = group["hyper_clip"], group["hyper_warmup"]
    if clip != math.inf:
        check_number("hyper_clip", clip, "> 0", lambda a: a > 0)
    check_count("hyper_warmup", warmup, 0)
    check_word("hyper_order", group.get("hyper_order", "algorithm"), ("algorithm", "published"))
    if group.get("hyper_order") == "published":
        # Its two passes would round and dither codes twice; a captured graph keeps gradients in their places.
        for name, allowed in {"capturable": (False,), "state_bits": (32,), "ema_bits": (None, 32)}.items():
            text = f'{" or ".join(map(str, allowed))} with hyper_order="published"'
            require(group.get(name, allowed[0]) in allowed, name, text, group.get(name))


def check_start(group: Group) -> None:
    """Learning starts within the bounds."""
    for name in group["learn"]:
        low, high = group["bounds"][COEFFICIENTS.index(name)]
        start = fixed(group, name)
        require(low <= start <= high, name, f"within its bounds, [{low}, {high}]", start)


def check_sharing(groups: list[Group], start: bool = True) -> None:
    """Groups that share their coefficients learn the same ones, in the same way, from the same ``start``."""
    first = groups[0]
    for group in groups[1:]:
        mode = group["coefficients"]
        require(mode == first["coefficients"], "coefficients", "the same in all groups", mode)
        order = group.get("hyper_order", "algorithm")
        require(order == first.get("hyper_order", "algorithm"), "hyper_order", "the same in all groups", order)
        if mode == "group":
            continue
        for name in LEARNING:
            if group[name] != first[name] and (name == "learn" or group["learn"]):
                raise ValueError(
                    f"{name} differs between groups, which share their coefficients: "
                    'give them the same, or coefficients="group"'
                )
        for name in group["learn"] if start else ():
            if fixed(group, name) != fixed(first, name):
                raise ValueError(
                    f"{name} is learned and shared between groups, but starts at {fixed(first, name)} in one and "
                    f'{fixed(group, name)} in another: give them the same, or coefficients="group"'
                )


def state_tensors(group: Group) -> tuple[str, ...]:
    """The states that a parameter of the group keeps, beside `step`."""
    learn, gamma = group["learn"], group["gamma"]
    pull = group["lambda_pullback"] > 0.0
    names: tuple[str, ...] = ()
    if learn or pull or gamma != 0.0:
        names = ("exp_avg", "exp_avg_sq")
        if group["beta3"] != 0.0 or "beta3" in learn:
            names += ("exp_avg_diff", "last_grad", "older_grad") if learn else ("exp_avg_diff", "last_grad")
        elif learn:
            names += ("last_grad",)
        if group["rho"] != 1.0 or "rho" in learn:
            names += ("mean_exp_avg_sq",) if group["second_moment"] == "mean" else ("max_exp_avg_sq",)
    if gamma != 1.0 or "gamma" in learn:
        names += ("exp_avg_lion",)
    if "last_grad" in names:
        names += ("last_scalars",)
    return (*names, "ema") if pull or group["use_ema_eval"] else names


def learns_first(group: Group) -> bool:
    """Whether the group's coefficients move before its weights do."""
    return bool(group["learn"]) and group.get("hyper_order") == "published"


def learn_options(group: Group) -> dict[str, Any]:
    """The options of ``mada_learn_``."""
    return {
        "learn": _bits(group["learn"]),
        "hyper_lr": list(map(float, group["hyper_lr"])),
        "hyper_momentum": list(map(float, group["hyper_momentum"])),
        "lower": [float(low) for low, _ in group["bounds"]],
        "upper": [float(high) for _, high in group["bounds"]],
        "clip": float(group["hyper_clip"]),
        "warmup": group["hyper_warmup"],
    }


def step_options(group: Group) -> dict[str, Any]:
    """The options of ``mada_step_``. They are the group's, but for a few names."""
    own = [option for option in MADA.options if option.name not in _OTHERWISE]
    options = {o.name: group[o.name] for o in own if o.default is None or o.name in group}
    options["capturable"] = group["capturable"]
    options["beta1"], options["beta2"] = group["betas"]
    options["lion_beta1"], options["lion_beta2"] = group["lion_betas"]
    options["second_max"] = group["second_moment"] == "max"
    options["pullback_from_step"] = group["pullback_from"] == "step"
    options["learn"] = _bits(group["learn"])
    return options
