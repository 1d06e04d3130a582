"""Steps in compressed formats as data: the lists of a call of any optimizer's operator, new, in the formats that are
asked for, and gradients of every size for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mada_cases
import pullback_cases
import pytest
import torch
from torch import Tensor

from pace_kernels import MADA as MadaOptimizer
from pace_kernels.definitions import MADA, PACE, PULLBACK, SCHEDULE_FREE
from pace_kernels.definitions.kit import Definition
from pace_kernels.mada_options import state_tensors, step_options
from pace_kernels.ops import HYPERGRADIENTS, LAST_SCALARS, NO_GRADIENT
from pace_kernels.torch_rules import codes

WEIGHTS = ("float32", "bfloat16", "float16", "dithered", "24", "32")
PLAIN = WEIGHTS[:3]
STATES = (32, 16, 8)
AVERAGES = (None, 32, 24, 16, 8)
ITERATES = AVERAGES[1:]
SHAPES = ((64, 32), (1, 32), (3, 5, 64), (0, 32), (257, 64))  # the last is longer than a block of 16,384

MOMENTS = {32: torch.float32, 16: torch.bfloat16, 8: torch.uint8}
AVERAGED = {32: torch.float32, 24: torch.bfloat16, 16: torch.int16, 8: torch.int8}


def odd(n: int, dtype: torch.dtype) -> Tensor:
    """Zeros of no alignment but their element's."""
    return torch.zeros(n + 1, dtype=dtype)[1:]


def unusual(grads: list[Tensor], params: Sequence[Tensor], step: int) -> list[Tensor]:
    """The gradients of a step: in one some that are not finite or huge, in another zeros, in every other narrow."""
    if step == 3:
        for g, value in zip(grads, (torch.inf, torch.nan, 1e30, 0.0, -1e30), strict=False):
            g.view(-1)[:1] = value
    if step == 4:
        grads = [torch.zeros_like(g) for g in grads]
    return [g.to(p.dtype) if step % 2 else g for g, p in zip(grads, params, strict=True)]


class Lists:
    """The arguments of a call but the gradients. ``weights``: one of WEIGHTS; ``bits``: of each state that is there, by
    its symbol."""

    definition: Definition

    def __init__(self, weights: str, bits: dict[str, int], shapes: Sequence[tuple[int, ...]], seed: int = 0) -> None:
        self.gen = torch.Generator().manual_seed(seed)
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(weights, torch.bfloat16)
        params = [self.noise(shape).to(dtype) for shape in shapes]
        weight = self.definition.operands[0]
        self.lists: dict[str, list[Tensor]] = {entry.list: [] for entry in self.definition.lists}
        self.lists[weight.list] = self.params = params
        self.steps = [torch.zeros(()) for _ in shapes]
        self.beside: dict[str, list[Tensor] | None] = dict.fromkeys(self.definition.beside)
        self.extras: dict[str, Tensor] = {}
        self.options: dict[str, Any] = {}
        if weights in ("24", "32"):
            kind = torch.int8 if weights == "24" else torch.int16
            self.beside["remainders"] = [odd(p.numel(), kind).view(p.shape) for p in params]
        for operand in self.definition.operands:
            if operand.symbol in bits:
                self._add(operand.codec, operand.list, operand.beside, bits[operand.symbol])

    def _add(self, codec: str | None, name: str, beside: str | None, bits: int) -> None:
        averaged = codec in ("average", "iterate")
        dtype = (AVERAGED if averaged else MOMENTS)[bits]
        states = self.lists[name] = [odd(p.numel(), dtype).view(p.shape) for p in self.params]
        if bits == 8 or (averaged and bits == 16):
            assert beside is not None
            self.beside[beside] = [odd(p.numel() // codes.BLOCK, torch.uint8) for p in self.params]
        if not averaged or bits < 24:
            return
        for state, param in zip(states, self.params, strict=True):
            state.copy_(param)
        if bits == 24:
            assert beside is not None
            rests = self.beside[beside] = [odd(p.numel(), torch.int8).view(p.shape) for p in self.params]
            for state, rest, param in zip(states, rests, self.params, strict=True):
                high, low = codes.split(codes.rounded(param.float(), 24, codes.NEAREST_24), 24)
                state.copy_(high)
                rest.copy_(low)

    def noise(self, shape: Iterable[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.gen)

    def gradients(self, step: int) -> list[Tensor]:
        """Of every size, with what no training should meet."""
        largest = (min(torch.finfo(p.dtype).max, 1e30) for p in self.params)
        grads = [self.noise(p.shape) * 10.0 ** float(self.noise((1,)) * 3) for p in self.params]
        grads = [g.clamp(-most, most) for g, most in zip(grads, largest, strict=True)]
        return unusual(grads, self.params, step)

    def take(self, function: Any, grads: list[Tensor], **changed: Any) -> None:
        """A step, by an operator or what stands for it."""
        fresh = {name: grads for name in self.definition.lists_of("gradient")}
        lists = [(self.lists | fresh)[entry.list] for entry in self.definition.lists]
        function(*lists, self.steps, **self.extras, **self.beside, **self.options | changed)

    def everything(self) -> list[Tensor]:
        """All that a step writes, as bytes, with one NaN for all."""
        lists = [*self.lists.values(), self.steps, *(side for side in self.beside.values() if side)]
        flat = (t.reshape(-1).contiguous() for tensors in lists for t in tensors)
        settled = (
            t if t.dtype == torch.float64 or not t.is_floating_point() else codes.settled(t.float()) for t in flat
        )
        return [t.view(torch.uint8) for t in settled]


PACE_OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 1.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.5, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False, "capturable": False,
}  # fmt: skip


class Pace(Lists):
    """``ema_bits``: None leaves out the average, and the pull. A ``beta1`` of 0 among the options leaves out m."""

    definition = PACE

    def __init__(
        self,
        weights: str,
        state_bits: int,
        ema_bits: int | None,
        shapes: Any = SHAPES,
        seed: int = 0,
        v_bits: int | None = None,
        **options: Any,
    ) -> None:
        bits = {"m": state_bits, "v": v_bits or state_bits} | ({} if ema_bits is None else {"e": ema_bits})
        if options.get("beta1") == 0.0:
            del bits["m"]
        super().__init__(weights, bits, shapes, seed)
        self.options = PACE_OPTIONS | {"stochastic_rounding": weights == "dithered"} | options
        if ema_bits is None:
            self.options["lambda_pullback"] = 0.0


class Mada(Lists):
    """``case``: a name of mada_cases. ``ema_bits``: None leaves out an average that nothing pulls toward."""

    definition = MADA

    def __init__(
        self, case: str, weights: str, state_bits: int, ema_bits: int | None, shapes: Any = SHAPES, seed: int = 0
    ) -> None:
        group = MadaOptimizer([torch.nn.Parameter(torch.zeros(()))], lr=1e-2, **mada_cases.CASES[case]).param_groups[0]
        names = set(state_tensors(group))
        narrow = 16 if weights not in ("float32", "float16") and state_bits < 32 else 32
        bits = {
            "m": ("exp_avg", state_bits), "v": ("exp_avg_sq", state_bits), "n": ("exp_avg_diff", state_bits),
            "l": ("exp_avg_lion", state_bits), "last_g": ("last_grad", narrow), "older_g": ("older_grad", narrow),
            "w": (f"{group['second_moment']}_exp_avg_sq", max(16, state_bits)),
        }  # fmt: skip
        of_states = {symbol: its for symbol, (name, its) in bits.items() if name in names}
        if ema_bits is not None or group["lambda_pullback"] > 0.0:
            of_states["e"] = ema_bits or 32
        super().__init__(weights, of_states, shapes, seed)
        self.options = step_options(group) | {"stochastic_rounding": weights == "dithered"}
        if "last_scalars" in names:
            row = torch.tensor([NO_GRADIENT, *[0.0] * (len(LAST_SCALARS) - 1)], dtype=torch.float64)
            self.lists["last_scalars"] = [row.clone() for _ in shapes]
        self.start = [self.options[name] for name in ("beta1", "beta2", "beta3", "rho", "c", "gamma")]
        self.taken = 0

    def take(self, function: Any, grads: list[Tensor], **changed: Any) -> None:
        """With coefficients that are others at each step; the two last gradients change places after it."""
        self.taken += 1
        if self.options["learn"]:
            moved = (q + 0.04 * math.sin(self.taken + k) for k, q in enumerate(self.start))
            self.extras["coefficients"] = torch.tensor([min(max(q, 0.0), 0.999) for q in moved], dtype=torch.float64)
            self.extras["hypergradients"] = torch.zeros(len(HYPERGRADIENTS), dtype=torch.float64)
        super().take(function, grads, **changed)
        if self.lists["older_grads"] and not (self.options | changed)["capturable"]:
            exchanged = {"last_grads": self.lists["older_grads"], "older_grads": self.lists["last_grads"]}
            self.lists |= exchanged


class ScheduleFree(Lists):
    definition = SCHEDULE_FREE

    def __init__(
        self, weights: str, state_bits: int, z_bits: int, shapes: Any = SHAPES, seed: int = 0, lr: float = 1e-2
    ) -> None:
        super().__init__(weights, {"v": state_bits, "z": z_bits}, shapes, seed)
        self.options = {
            "lr": lr, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "count": 0.0, "share": 1.0,
            "maximize": False, "stochastic_rounding": weights == "dithered", "capturable": False,
        }  # fmt: skip

    def take(self, function: Any, grads: list[Tensor], **changed: Any) -> None:
        self.options["count"] += 1.0
        self.options["share"] = 1.0 / self.options["count"]
        super().take(function, grads, **changed)


class Pullback(Lists):
    """``case``: a name of pullback_cases. Its base moves weights by its gradients, and has a second moment."""

    definition = PULLBACK

    def __init__(self, case: str, weights: str, ema_bits: int, shapes: Any = SHAPES, seed: int = 0) -> None:
        super().__init__(weights, {"e": ema_bits}, shapes, seed)
        given = pullback_cases.CASES[case]
        self.options = pullback_cases.options_of(given)
        pull, self.step_from = pullback_cases.pulls(given), given.get("from") == "step"
        self.grid = ema_bits < 24
        self.options["pullback_from_step"] = self.step_from and self.grid
        if (pull and not self.step_from) or self.grid:
            self.lists["befores"] = [p.clone() for p in self.params]
        if pull and self.options["gain"] is None:
            dtypes = (p.dtype if given.get("moment") == "narrow" else torch.float32 for p in self.params)
            self.lists["second_moments"] = [
                torch.zeros(p.shape, dtype=d) for p, d in zip(self.params, dtypes, strict=True)
            ]

    def take(self, function: Any, grads: list[Tensor], **changed: Any) -> None:
        pullback_cases.base_step(self.lists, grads, self.options)
        super().take(function, grads, **changed)


OPS = torch.ops.pace_kernels
KERNELS = {kind: getattr(OPS, kind.definition.op).default for kind in (Pace, Mada, ScheduleFree, Pullback)}

# The common formats of each optimizer, and what they are called with.
COMMON: dict[str, Callable[..., Lists]] = {
    "PACE": lambda **o: Pace("32", 8, 8, **o),
    "PACE, 16 bits": lambda **o: Pace("24", 8, 16, **o),
    "PACE, 24 bits": lambda **o: Pace("dithered", 16, 24, **o),
    "PACE, float32 weights": lambda **o: Pace("float32", 8, 24, **o),
    "PACE, float16 weights": lambda **o: Pace("float16", 16, 8, **o),
    "MADA": lambda **o: Mada("pulled", "32", 8, 8, **o),
    "MADA, 16 bits": lambda **o: Mada("all, maximum", "24", 16, 24, **o),
    "MADA, roles stay": lambda **o: Mada("capturable", "dithered", 8, None, **o),
    "MADA, float32 weights": lambda **o: Mada("averaged, every third step", "float32", 8, 16, **o),
    "Adan": lambda **o: Mada("Adan", "dithered", 16, 16, **o),
    "Lion": lambda **o: Mada("averaged Lion", "32", 8, 8, **o),
    "schedule-free": lambda **o: ScheduleFree("32", 8, 16, **o),
    "schedule-free, 8 bits": lambda **o: ScheduleFree("24", 16, 8, **o),
    "schedule-free, 24 bits": lambda **o: ScheduleFree("float32", 8, 24, **o),
    "pullback": lambda **o: Pullback("default", "bfloat16", 8, **o),
    "pullback, 16 bits": lambda **o: Pullback("from the step", "float32", 16, **o),
    "pullback, 24 bits": lambda **o: Pullback("constant", "float16", 24, **o),
}


# ---- refusals ----


def given(name: str, *tensors: Tensor) -> Callable[[Lists], None]:
    """These in the list of that name, or beside the operands."""

    def change(call: Lists) -> None:
        (call.lists if name in call.lists else call.beside)[name] = list(tensors)  # type: ignore[index]

    return change


def no_blocks(call: Lists) -> None:
    for name, tensors in (call.lists | call.beside).items():
        if tensors and tensors[0].shape == (64, 32):
            given(name, tensors[0][:1, :31])(call)


FLOATS, BYTES, REST = (torch.zeros(64, 32, dtype=dtype) for dtype in (torch.float32, torch.uint8, torch.int16))
SCALES, TURNED = torch.zeros(64, dtype=torch.uint8), torch.zeros(32, 64, dtype=torch.uint8).t()
# What every backend says of a call with one parameter of 64 × 32, which of COMMON it is, and what is wrong with it.
REFUSED: list[tuple[str, str, Callable[[Lists], None]]] = [
    ("remainders has 2 tensors, params has 1", "PACE", given("remainders", REST, REST)),
    ("params[0] must be bfloat16, with remainders", "PACE", given("params", FLOATS.half())),
    ("remainders[0] must be int16 or int8", "PACE", given("remainders", REST.int())),
    ("remainders[0] has shape (32, 64), its parameter has (64, 32)", "PACE", given("remainders", REST.view(32, 64))),
    ("exp_avgs[0] must be float32 or bfloat16 without exp_avg_scales", "PACE", given("exp_avg_scales")),
    ("exp_avg_sqs[0] must be uint8, with exp_avg_sq_scales", "PACE", given("exp_avg_sqs", FLOATS)),
    ("exp_avg_sqs[0] and its parameter must be contiguous", "PACE", given("exp_avg_sqs", TURNED)),
    ("exp_avgs[0] and its parameter must be contiguous", "PACE", given("params", TURNED.bfloat16())),
    ("emas[0] must be float32 without ema_scales", "PACE", given("ema_scales")),
    ("emas[0] must be int8, int16 or bfloat16, with ema_scales", "PACE", given("emas", FLOATS)),
    ("ema_scales[0] must be contiguous, uint8, with an element for 32", "PACE", given("ema_scales", SCALES[1:])),
    ("ema_scales[0] must be int8", "PACE, 24 bits", given("ema_scales", REST)),
    ("params[0] must have a multiple of 32 elements, with exp_avg_scales", "PACE", no_blocks),
    ("exp_avg_diffs[0] must be float32 or bfloat16 without exp_avg_diff_scales", "MADA", given("exp_avg_diff_scales")),
    ("exp_avg_lions[0] must be uint8, with exp_avg_lion_scales", "MADA", given("exp_avg_lions", FLOATS)),
    ("exp_avg_lion_scales[0] must be contiguous, uint8", "MADA", given("exp_avg_lion_scales", SCALES[1:])),
    ("exp_avg_lion_scales has 2 tensors, params has 1", "MADA", given("exp_avg_lion_scales", SCALES, SCALES)),
    ("second_exp_avg_sqs[0] must be float32 or bfloat16", "MADA", given("second_exp_avg_sqs", BYTES)),
    ("last_grads[0] must be float32 or bfloat16", "MADA", given("last_grads", FLOATS.half())),
    ("older_grads[0] must be float32 or bfloat16", "MADA", given("older_grads", FLOATS.half())),
    ("zs[0] must be float32 without z_scales", "schedule-free", given("z_scales")),
    ("zs[0] must be int8, int16 or bfloat16, with z_scales", "schedule-free", given("zs", BYTES)),
    ("remainders[0] must be int16 or int8", "schedule-free", given("remainders", BYTES)),
    ("befores must not be empty where emas are int8 or int16", "pullback", given("befores")),
    ("emas[0] must be float32 without ema_scales", "pullback", given("ema_scales")),
]
each_refusal = pytest.mark.parametrize(("message", "name", "change"), REFUSED, ids=[f"{n}: {m}" for m, n, _ in REFUSED])


def assert_refused(
    function_of: Callable[[Lists], Any], message: str, name: str, change: Callable[[Lists], None]
) -> None:
    """By ``function_of`` the call, before anything is written."""
    call = COMMON[name](shapes=((64, 32),))
    change(call)

    def refused(*lists: list[Tensor], **named: Any) -> None:
        before = [t.clone() for t in call.everything()]
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function_of(call)(*lists, **named)
        assert all(map(torch.equal, before, call.everything()))

    call.take(refused, [torch.zeros_like(p) for p in call.lists["params"]])
