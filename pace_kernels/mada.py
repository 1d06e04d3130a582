"""MADA: a parameterized optimizer that learns which optimizer to be, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backend import choose
from .checks import Group, check_average_options, check_common_options, check_number, checked_count, require
from .ops import COEFFICIENTS, DONE, HYPERGRADIENTS, LAST_SCALARS, NO_GRADIENT, REDO
from .optimizer import KernelOptimizer
from .sharding import all_reduce_, is_sharded, local, reduce_
from .states import Work, as_state, moved
from .torch_rules.mada import MadaMoments, MadaOptions, caught_up

_HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}
_BOUNDS = {"beta1": (0.01, 0.99), "beta2": (0.501, 0.999), "beta3": (0.0, 0.99)} | dict.fromkeys(
    ("rho", "c", "gamma"), (0.0, 1.0)
)
# What a group keeps of its learned coefficients, float64 tensors on the parameters' device: values, momenta and
# hypergradients in the order of COEFFICIENTS, and a step count. They are options, so that checkpoints carry them; with
# coefficients="global" all groups have the same ones.
_LEARNED = ("coefficient_values", "coefficient_momenta", "hypergradients", "hyper_step")
# Options that mean something only where a coefficient is learned, and what they are where nobody gave them.
_HYPER_DEFAULTS = {"hyper_lr": None, "hyper_momentum": 0.0, "hyper_clip": 10.0, "hyper_warmup": 50, "bounds": None}
_LEARNING = ("learn", *_HYPER_DEFAULTS)
# The options of groups that PACE does not have, and what the groups hold of MADA. "last_options" is in checkpoints
# alone: what the step to redo was taken with, where options were changed since. "frozen": the values of freeze().
MADA_ONLY = (
    "lion_betas",
    "second_moment",
    "coefficients",
    *COEFFICIENTS,
    *_LEARNING,
    *_LEARNED,
    "last_options",
    "frozen",
    "hyper_process_group",  # ZeroRedundancyOptimizer puts all arguments into groups, and so into checkpoints
)
_PRESETS: dict[str, dict[str, Any]] = {
    "adamw": {"rho": 1.0, "betas": (0.9, 0.999), "weight_decay": 0.01},
    "amsgrad": {"rho": 0.0, "second_moment": "max", "betas": (0.9, 0.999), "weight_decay": 0.01},
    "avgrad": {"rho": 0.0, "second_moment": "mean", "betas": (0.9, 0.999), "weight_decay": 0.01},
    "adan": {"rho": 1.0, "beta3": 0.92, "betas": (0.98, 0.99), "weight_decay": 0.02},
    "yogi": {"rho": 1.0, "c": 0.0, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0},
    "lion": {"gamma": 0.0, "lion_betas": (0.9, 0.99), "lr": 1e-4, "weight_decay": 0.01},
    "hyperadam": {"rho": 1.0, "betas": (0.9, 0.999), "weight_decay": 0.01, "learn": ("beta1", "beta2")},
}
# The group's options that mada_step_ takes by the same name.
_SAME_NAME = (
    *("beta3", "rho", "c", "gamma", "eps", "weight_decay", "lambda_pullback", "clamp_pullback", "beta_ema"),
    *("ema_kappa", "ema_rho", "ema_gamma", "ema_update_freq", "maximize", "capturable"),
)

# Those that the redone step and its sensitivities depend on, beside what it left in last_scalars.
_REDONE_BY = (
    *("lion_beta1", "lion_beta2", "eps", "second_max", "pullback_from_step", "lambda_pullback", "clamp_pullback"),
    *("ema_kappa", "ema_rho", "ema_gamma"),
)


def _bits(learn: tuple[str, ...]) -> int:
    return sum(1 << k for k, name in enumerate(COEFFICIENTS) if name in learn)


def _expand(argument: str, given: object, base: Sequence[Any], convert: Callable[[object], Any]) -> tuple[Any, ...]:
    """An option of each coefficient, in their order: from a dict, which may leave some out, from six values, or from
    one for all. A tuple, so that no change in place goes unseen."""
    if given is None:
        return tuple(base)
    if isinstance(given, (tuple, list)):
        require(len(given) == len(COEFFICIENTS), argument, f"given by name, or for all of {COEFFICIENTS}", given)
        return tuple(convert(value) for value in given)
    if not isinstance(given, Mapping):
        return (convert(given),) * len(COEFFICIENTS)
    for name in given:
        _check_name(argument, name)
    return tuple(convert(given[name]) if name in given else base[k] for k, name in enumerate(COEFFICIENTS))


def _check_name(argument: str, name: object) -> None:
    require(name in COEFFICIENTS, argument, f"coefficients, of {', '.join(COEFFICIENTS)}", name)


def _same(value: object) -> object:
    return value


def _pair(value: object) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"bounds must be pairs (low, high), got {value!r}")
    return (value[0], value[1])


class _Prepared(NamedTuple):
    """What the options of a group come to: those of ``mada_step_`` and ``mada_learn_``, the names of its states, and
    the options of learning as the group has them."""

    step: dict[str, Any]
    learn: dict[str, Any]
    states: tuple[str, ...]
    learning: dict[str, Any]


def _fixed(group: Group, name: str) -> float:
    """The coefficient's value among the options: its fixed value, or where learning starts."""
    if name == "beta1":
        return float(group["betas"][0])
    return float(group["betas"][1] if name == "beta2" else group[name])


class MADA(KernelOptimizer):
    """A parameterized optimizer that spans AdamW, AVGrad, AMSGrad, Adan, Yogi and Lion, and learns its six coefficients
    while it trains, by hypergradient descent, in one pass over memory.

    ::

        [formula: MADA]
          d   = g − g₋                                  g₋: the previous gradient; at a parameter's first step d = 0
          m   ← β1 m + (1 − β1) g                       Adam's first moment
          n   ← β3 n + (1 − β3) d                       Adan's gradient-difference moment
          ĝ   = g + β3 d
          s   = sign(ĝ² − v̄)                            v̄: the value before this step
          g̃²  = c ĝ² + (1 − c)(v̄ + ĝ² s)                c = 1 Adam, c = 0 Yogi
          v̄   ← β2 v̄ + (1 − β2) g̃²
          ṽ   ← (v̄ + (t − 1) ṽ) / t                     AVGrad; second_moment="max": ṽ ← max(ṽ, v̄), AMSGrad
          V   = (ρ v̄ + (1 − ρ) ṽ) / (1 − β2^t)          ρ = 1 Adam, ρ = 0 AVGrad
          N   = m / (1 − β1^t) + β3 n
          u   = λ1 l + (1 − λ1) g                       Lion; l: the value before this step
          l   ← λ2 l + (1 − λ2) g
          U   = γ N / (sqrt(V) + ε) + (1 − γ) sign(u)   γ = 0 Lion
          x₊  = x (1 − α λ_wd) − α U
        [end]

    A learned coefficient q then moves by ``q ← Π[q − hyper_lr b]``, ``b ← μ b + clip(h)``, within its bounds. ``h`` is
    the hypergradient: the sum over all coordinates of this step's gradient times ∂x/∂q of the step before
    (csrc/rules/mada.h has the six of them). They are exact and cost one saved tensor, or two where β3 is in play. Where
    h is not finite, as after a gradient that is not, ``hypergradients`` shows it and q rests. Options
    may change in training, ``learn`` by :meth:`freeze` alone; where the states in play change, a step learns nothing.

    Arguments:
        params: parameters, named parameters, or groups of them: dense, of dtype float32, bfloat16, float16 or float64.
            States are float32 (float64 for float64 parameters).
        lr: α ≥ 0, a number or a tensor with one element. A step with lr = 0 leaves the coefficients alone.
        betas: (β1, β2), each in [0, 1).
        eps: ε ≥ 2**-126, float32's smallest normal number, and ≥ 2**-51 where something is learned.
        weight_decay: λ_wd ≥ 0, decoupled from the gradient; no hypergradient sees it.
        beta3: β3 in [0, 1). Fixed at 0, neither n nor a previous gradient is kept.
        rho: ρ in [0, 1]. Fixed at 1, no ṽ is kept.
        c: c in [0, 1].
        gamma: γ in [0, 1]. Fixed at 1, no l is kept; fixed at 0 with nothing learned and no pullback, l alone.
        lion_betas: (λ1, λ2), each in [0, 1).
        second_moment: "mean" or "max", what ṽ is. No derivative goes through it.
        learn: the coefficients to learn, of beta1, beta2, beta3, rho, c, gamma; the options above are where they start.
            The others stay what the options say. Empty: a plain optimizer, which keeps no gradient for learning.
        hyper_lr: ≥ 0, for all learned coefficients or by name. Default 5e-4 for beta1 and beta2, 0.1 for the others.
        hyper_momentum: μ in [0, 1), for all or by name.
        hyper_clip: each hypergradient is clipped to ± this, > 0; may be infinite.
        hyper_warmup: in that many first steps no coefficient moves.
        bounds: by name, (low, high). Default beta1 (0.01, 0.99), beta2 (0.501, 0.999), beta3 (0, 0.99), others (0, 1).
        coefficients: "global", one set of learned coefficients for all parameters, or "group", one for each group.
        lambda_pullback: c ≥ 0 of :class:`PACE`: pulls toward an average of the weights, by the D = sqrt(V) + ε of MADA.
            The gain is a constant for the hypergradients.
        clamp_pullback, beta_ema, ema_kappa, ema_rho, ema_gamma, ema_update_freq, pullback_from: as in :class:`PACE`.
        use_ema_eval: whether ``eval()`` and ``averaged()`` swap this group's average in; keeps an average.
        maximize: whether to maximize the objective.
        capturable: whether the step counts live on the parameters' device, for CUDA graphs. What changes between
            replays must be a tensor there too: lr, and the clip_coef of ``step()``.
        skip_nonfinite: whether a NaN or an infinity in a gradient leaves the whole step undone, of all groups, and on
            all ranks that a DTensor is sharded over; ``skipped_steps`` counts them. That reads the gradients once more.
            By default they spread into the weights and states of their coordinates, as in ``torch.optim.AdamW``, but
            that squares end at float32's largest number: an infinite gradient makes its weight ±Inf, not NaN, and one
            of 1e30 moves it far where AdamW's stays. With ``hyper_process_group`` its ranks agree on it.
        hyper_process_group: "world" or a ``torch.distributed.ProcessGroup``, whose ranks hold different parameters as
            plain tensors: hypergradients are summed over it, so that all ranks learn the same coefficients.
            ``ZeroRedundancyOptimizer`` needs "world": its checkpoints carry all arguments, and no file holds a group.
            DTensors need none: theirs are summed over the axes of the mesh that they are sharded over. One all-reduce
            of a few numbers a step, or one for each such axis.
        backend: "cpu", "torch" or another name of ``backends()``, which works or raises; None takes the environment
            variable PACE_BACKEND, or else the fastest backend that is there.

    Raises:
        ValueError, TypeError: an argument is out of its range, hyper options come with nothing to learn, or a parameter
            is sparse, complex, an integer, overlaps itself, or is in two groups.
        RuntimeError: the backend asked for is not there; a gradient does not fit its parameter; ``step()`` while the
            average is swapped in. Nothing has changed then.

    Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through Hyper-Gradient Descent", ICML 2024 (PMLR 235).

    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = MADA(model.parameters(), lr=3e-3, learn=("beta1", "rho"))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> sorted(optimizer.hypergradients)
    ['beta1', 'rho']
    """

    STATE_TENSORS = (
        *("exp_avg", "exp_avg_sq", "exp_avg_diff", "mean_exp_avg_sq", "max_exp_avg_sq", "exp_avg_lion"),
        *("last_grad", "older_grad", "ema"),
    )
    STATE_ROWS = {"last_scalars": len(LAST_SCALARS)}  # noqa: RUF012
    OWN_OPTION = "learn"

    # Of a step: the group, its sums, and the work they are of.
    _sums: list[tuple[Group, Tensor, Work]]
    _built = True  # whether all groups of the constructor are there

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        beta3: float = 0.9,
        rho: float = 0.0,
        c: float = 1.0,
        gamma: float = 1.0,
        lion_betas: tuple[float, float] = (0.95, 0.98),
        second_moment: str = "mean",
        learn: tuple[str, ...] | list[str] = COEFFICIENTS,
        hyper_lr: float | Mapping[str, float] | None = None,
        hyper_momentum: float | Mapping[str, float] = 0.0,
        hyper_clip: float = 10.0,
        hyper_warmup: int = 50,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        coefficients: str = "global",
        lambda_pullback: float = 0.0,
        clamp_pullback: bool = True,
        beta_ema: float = 0.01,
        use_ema_eval: bool = False,
        ema_kappa: float | None = 0.2,
        ema_rho: float = 0.0,
        ema_gamma: float = 1.0,
        ema_update_freq: int = 1,
        pullback_from: str = "weights",
        maximize: bool = False,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        hyper_process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "beta3": beta3,
            "rho": rho,
            "c": c,
            "gamma": gamma,
            "lion_betas": lion_betas,
            "second_moment": second_moment,
            "learn": learn,
            "hyper_lr": hyper_lr,
            "hyper_momentum": hyper_momentum,
            "hyper_clip": hyper_clip,
            "hyper_warmup": hyper_warmup,
            "bounds": bounds,
            "coefficients": coefficients,
            "lambda_pullback": lambda_pullback,
            "clamp_pullback": clamp_pullback,
            "beta_ema": beta_ema,
            "use_ema_eval": use_ema_eval,
            "ema_kappa": ema_kappa,
            "ema_rho": ema_rho,
            "ema_gamma": ema_gamma,
            "ema_update_freq": ema_update_freq,
            "pullback_from": pullback_from,
            "maximize": maximize,
            "capturable": capturable,
            "skip_nonfinite": skip_nonfinite,
        }
        if hyper_process_group is not None and hyper_process_group != "world":
            kinds = torch.distributed.ProcessGroup if torch.distributed.is_available() else ()
            allowed = 'None, "world" or a torch.distributed.ProcessGroup'
            require(isinstance(hyper_process_group, kinds), "hyper_process_group", allowed, hyper_process_group)
        self._hyper_process_group = hyper_process_group
        self._sums = []
        defaults = self._expanded(defaults, {})
        self._check_options(defaults)
        self._check_start(defaults)
        self._built = False
        super().__init__(params, defaults, backend)
        self._built = True

    @classmethod
    def preset(cls, name: str, params: ParamsT, **options: Any) -> MADA:
        """MADA as one of the optimizers that it contains, with no more memory than that one.

        ``options`` go to the constructor, over the preset's: the rule's published coefficients, with AdamW's decoupled
        weight decay, ``x (1 − α λ_wd)``, and values of lr and weight_decay that need not be those of the public code
        (there Lion and Adan have no weight decay by default, and Yogi has lr 1e-2). What they are, and where the
        published ones differ:

        - "adamw": ``torch.optim.AdamW``. No difference.
        - "amsgrad": ``torch.optim.AdamW(amsgrad=True)``. No difference from it; the paper's corrects no bias and has no
          weight decay.
        - "avgrad": MADA's section 4.1, with weight decay.
        - "adan": β1, β3, β2 are what the decays β1, β2, β3 of its public code are. That code also corrects the bias of
          n, and divides by ``1 + α λ_wd`` instead.
        - "yogi": the paper's starts v̄ at the squared gradient of a first batch and corrects no bias; this starts at 0,
          as Adam does.
        - "lion": no difference.
        - "hyperadam": AdamW that learns beta1 and beta2. The published one differentiates by an autograd graph, which
          gives the same numbers, and starts from other hyper learning rates.

        >>> optimizer = MADA.preset("lion", [torch.nn.Parameter(torch.ones(3))], weight_decay=0.1)
        """
        require(name in _PRESETS, "name", f"one of {', '.join(_PRESETS)}", name)
        plain: dict[str, Any] = {"beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0, "learn": ()}
        return cls(params, **(plain | _PRESETS[name] | options))

    # ---- options ---------------------------------------------------------------------------------------------------

    def _expanded(self, given: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """Options with ``learn`` in order and the hyper options by name."""
        options = dict(given)
        if "learn" in given:
            names = given["learn"]
            if isinstance(names, str) or not isinstance(names, (tuple, list, set, frozenset)):
                raise TypeError(f"learn must be a tuple of names, got {names!r}")
            for name in names:
                _check_name("learn", name)
            options["learn"] = tuple(name for name in COEFFICIENTS if name in names)
        if not options.get("learn", base.get("learn", ())):
            for name, default in _HYPER_DEFAULTS.items():
                if name in given and given[name] != default and given[name] != base.get(name):
                    raise ValueError(f"{name} was given, but learn is empty: name the coefficients to learn")
        for name, start, convert in (
            ("hyper_lr", [_HYPER_LR[name] for name in COEFFICIENTS], _same),
            ("hyper_momentum", [0.0] * len(COEFFICIENTS), _same),
            ("bounds", [_BOUNDS[name] for name in COEFFICIENTS], _pair),
        ):
            if name in given:
                six = isinstance(given[name], (tuple, list)) and len(given[name]) == len(COEFFICIENTS)
                if name == "bounds" and not (given[name] is None or six or isinstance(given[name], Mapping)):
                    raise TypeError(f"bounds must be a dict from name to (low, high), got {given[name]!r}")
                options[name] = _expand(name, given[name], base.get(name, start), convert)
        return options

    def _check_options(self, group: Group) -> None:
        check_common_options(group)
        check_average_options(group)
        check_number("beta3", group["beta3"], "in [0, 1)", lambda a: 0 <= a < 1)
        for name in ("rho", "c", "gamma"):
            check_number(name, group[name], "in [0, 1]", lambda a: 0 <= a <= 1)
        lion = group["lion_betas"]
        if not isinstance(lion, (tuple, list)) or len(lion) != 2:
            raise ValueError(f"lion_betas must be two numbers in [0, 1), got {lion!r}")
        for i in (0, 1):
            check_number(f"lion_betas[{i}]", lion[i], "in [0, 1)", lambda a: 0 <= a < 1)
        require(group["second_moment"] in ("mean", "max"), "second_moment", '"mean" or "max"', group["second_moment"])
        mode = group["coefficients"]
        require(mode in ("global", "group"), "coefficients", '"global" or "group"', mode)
        if group["learn"]:
            allowed = "at least 2**-51 where coefficients are learned: below, hypergradients take a small sqrt(V) for 0"
            require(group["eps"] >= 2.0**-51, "eps", allowed, group["eps"])
        self._check_hyper_options(group)

    def _check_hyper_options(self, group: Group) -> None:
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
        if isinstance(clip, bool) or not isinstance(clip, (int, float)):
            raise TypeError(f"hyper_clip must be a number, got {clip!r}")
        require(clip > 0, "hyper_clip", "> 0", clip)
        counts = isinstance(warmup, int) and not isinstance(warmup, bool) and 0 <= warmup < 2**63
        require(counts, "hyper_warmup", "an integer >= 0", warmup)

    def _check_start(self, group: Group) -> None:
        """Learning starts within the bounds."""
        for name in group["learn"]:
            low, high = group["bounds"][COEFFICIENTS.index(name)]
            start = _fixed(group, name)
            require(low <= start <= high, name, f"within its bounds, [{low}, {high}]", start)

    # ---- groups and learned coefficients ---------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with options of its own; also in the middle of training. See ``torch.optim.Optimizer``.

        With coefficients="global" it shares what the other groups learn, and how; it may not ask for something else.
        """
        if isinstance(param_group, dict):
            first = self.param_groups[0] if self.param_groups else self.defaults
            base = dict(self.defaults)
            for group in self.param_groups:
                self._by_name(group)
            if self._built and first["coefficients"] == param_group.get("coefficients", "global") == "global":
                base |= {name: first[name] for name in _LEARNING}
                base["betas"] = tuple(
                    _fixed(first if name in first["learn"] else self.defaults, name) for name in ("beta1", "beta2")
                )
                base |= {name: first[name] for name in COEFFICIENTS[2:] if name in first["learn"]}
            param_group = {**base, **self._expanded(param_group, base)}
            param_group.setdefault("coefficients", first["coefficients"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_start(group)
            self._check_sharing(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        group.update(self._fresh(group), last_options=None, frozen=None)
        self._share()
        self._prepared[id(group)] = self._prepare(group)

    def _check_sharing(self, groups: list[Group], start: bool = True) -> None:
        """Groups that share their coefficients learn the same ones, in the same way, from the same ``start``."""
        first = groups[0]
        for group in groups[1:]:
            mode = group["coefficients"]
            require(mode == first["coefficients"], "coefficients", "the same in all groups", mode)
            if mode == "group":
                continue
            for name in _LEARNING:
                if group[name] != first[name] and (name == "learn" or group["learn"]):
                    raise ValueError(
                        f"{name} differs between groups, which share their coefficients: "
                        'give them the same, or coefficients="group"'
                    )
            for name in group["learn"] if start else ():
                if _fixed(group, name) != _fixed(first, name):
                    raise ValueError(
                        f"{name} is learned and shared between groups, but starts at {_fixed(first, name)} in one and "
                        f'{_fixed(group, name)} in another: give them the same, or coefficients="group"'
                    )

    def _fresh(self, group: Group) -> dict[str, Tensor | None]:
        """Coefficients at the start of learning."""
        if not group["learn"]:
            return dict.fromkeys(_LEARNED)
        device = self._home(group)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        start = torch.tensor([_fixed(group, name) for name in COEFFICIENTS], dtype=dtype, device=device)
        zeros = (torch.zeros_like(start), torch.zeros_like(start), start.new_zeros(()))
        return dict(zip(_LEARNED, (start, *zeros), strict=True))

    def _home(self, group: Group) -> torch.device:
        return group["params"][0].device if group.get("params") else torch.device("cpu")

    def _share(self) -> None:
        """Puts the coefficients on their device, and where they are global, the same ones into all groups."""
        source = self.param_groups[0]
        for group in self.param_groups:
            source = group if group["coefficients"] == "group" else source
            home = self._home(source)
            for name in _LEARNED:
                value = source.get(name)
                group[name] = value.to(home) if isinstance(value, Tensor) else None
                source[name] = group[name]

    @property
    def coefficients(self) -> dict[str, float] | list[dict[str, float]]:
        """The six coefficients, name → value, as the next step uses them; with coefficients="group" a list of dicts.

        Those that are not learned are the first group's. Reading waits for the device.
        """
        return self._by_group(self._group_coefficients)

    @property
    def hypergradients(self) -> dict[str, float] | list[dict[str, float]]:
        """The hypergradients of the last step, before the clip: name → value of each learned coefficient.

        With coefficients="group" a list of dicts. Reading waits for the device.
        """

        def read(group: Group) -> dict[str, float]:
            values = group["hypergradients"].tolist() if group["learn"] else ()
            return {name: value for name, value in zip(COEFFICIENTS, values, strict=False) if name in group["learn"]}

        return self._by_group(read)

    def _by_group(self, read: Callable[[Group], dict[str, float]]) -> dict[str, float] | list[dict[str, float]]:
        if self.param_groups[0]["coefficients"] == "group":
            return [read(group) for group in self.param_groups]
        return read(self.param_groups[0])

    def _group_coefficients(self, group: Group) -> dict[str, float]:
        values = {name: _fixed(group, name) for name in COEFFICIENTS}
        if group["learn"]:
            learned = dict(zip(COEFFICIENTS, group["coefficient_values"].tolist(), strict=True))
            values |= {name: learned[name] for name in group["learn"]}
        return values

    @torch.no_grad()
    def freeze(self) -> None:
        """Stops learning: the learned values become fixed options (MADA-FS), and what only learning needs is dropped.

        Training goes on as if the coefficients had stayed at their present values from here on.
        """
        for group in self.param_groups:
            self._by_name(group)
        for group in self.param_groups:
            if not group["learn"]:
                continue
            for param in group["params"]:
                if param in self.state:
                    self._catch_up(group, param)
            values = self._group_coefficients(group)
            frozen = tuple(values[name] if name in group["learn"] else None for name in COEFFICIENTS)
            fixed = {"betas": (values.pop("beta1"), values.pop("beta2")), **values, "learn": ()}
            group.update(fixed, frozen=frozen, **dict.fromkeys(_LEARNED))
            self._prepared[id(group)] = self._prepare(group)
            self._drop_unused(group)
        self._default_to_frozen()

    def _default_to_frozen(self) -> None:
        """Groups that are added once the shared coefficients are frozen start with them frozen, at the same values."""
        first = self.param_groups[0]
        if first["coefficients"] == "global" and first["frozen"] is not None:
            given = zip(COEFFICIENTS, first["frozen"], strict=True)
            values = {name: _fixed(self.defaults, name) if value is None else value for name, value in given}
            self.defaults.update({"betas": (values.pop("beta1"), values.pop("beta2")), **values, "learn": ()})

    def _catch_up(self, group: Group, param: Tensor) -> None:
        """Brings moments that are one step behind up to date, by redoing that step."""
        state = self.state[param]
        if "last_scalars" not in state:
            return
        self._fit(param, state, "last_grad", not is_sharded(param))  # as it is where it was saved and loaded before
        options = self._arguments(group).step  # those of the step to redo, whatever has been changed since
        second = "max_exp_avg_sq" if options["second_max"] else "mean_exp_avg_sq"
        names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", second, "exp_avg_lion")
        kept = MadaMoments(*(local(state[name]) if name in state else None for name in names))
        o = MadaOptions.of(options)
        last = state["last_scalars"].tolist()
        if last[0] != REDO:
            return
        older = local(state["older_grad"]) if "older_grad" in state else None
        after = caught_up(o, state["step"].item(), last, local(state["last_grad"]), older, kept)
        for tensor, value in zip(kept, after, strict=True):
            if tensor is not None and value is not None:
                tensor.copy_(value)
        state["last_scalars"][0] = DONE

    def _by_name(self, group: Group) -> None:
        """Hyper options that were replaced since the last step, as they are kept."""
        kept = self._prepared[id(group)].learning
        if any(group[name] is not kept[name] for name in _LEARNING):
            if isinstance(group["learn"], str) or tuple(group["learn"]) != kept["learn"]:
                raise ValueError(f"learn may not be changed from {kept['learn']}: use freeze() to stop learning")
            group.update(self._expanded({name: group[name] for name in _LEARNING}, kept))

    def _check_changed(self, group: Group) -> None:
        self._by_name(group)
        super()._check_changed(group)

    def _settle(self, groups: list[Group]) -> None:
        """Moments that are one step behind are brought up to date where the step to redo would come out otherwise by
        the new options; the next step learns nothing then."""
        self._check_sharing(self.param_groups, start=False)
        prepared = [self._prepare(group) for group in groups]
        for group, new in zip(groups, prepared, strict=True):
            old = self._prepared[id(group)]
            same = old.states == new.states and all(old.step[name] == new.step[name] for name in _REDONE_BY)
            for param in group["params"]:
                state = self.state.get(param, {})
                if same or not state:
                    continue
                self._catch_up(group, param)
                if "exp_avg_diff" in new.states and "exp_avg_diff" not in state:
                    state.pop("last_scalars", None)  # no difference of gradients at the first step with β3
        super()._settle(groups)
        for group, new in zip(groups, prepared, strict=True):
            self._prepared[id(group)] = new

    # ---- state -----------------------------------------------------------------------------------------------------

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
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

    def _initial(self, name: str, param: Tensor, group: Group) -> Tensor:
        if name == "last_scalars":
            dtype = torch.float32 if param.device.type == "mps" else torch.float64
            row = torch.zeros(len(LAST_SCALARS), dtype=dtype, device=param.device)
            row[0] = NO_GRADIENT
            return row
        if name in ("mean_exp_avg_sq", "max_exp_avg_sq"):
            # v̄ itself, which is 0 but in a checkpoint of Adam: as if it had been that all along.
            return as_state(param, self.state[param]["exp_avg_sq"])
        return super()._initial(name, param, group)

    # ---- the step --------------------------------------------------------------------------------------------------

    def _launch_all(self, prepared: list[tuple[Work, dict[str, list[Tensor]]]]) -> None:
        try:
            super()._launch_all(prepared)
            self._learn()
        finally:
            self._sums = []

    def _prepare(self, group: Group) -> _Prepared:
        learning = {name: group[name] for name in _LEARNING}
        return _Prepared(self._options(group), self._learn_options(group), self._state_tensors(group), learning)

    def _arguments(self, group: Group) -> _Prepared:
        """What the group's options came to when they were last checked; lr aside."""
        return self._prepared[id(group)]  # type: ignore[no-any-return]

    def _learn_options(self, group: Group) -> dict[str, Any]:
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

    def _options(self, group: Group) -> dict[str, Any]:
        """The options of ``mada_step_``. They are the group's, but for a few names."""
        options = {name: group[name] for name in _SAME_NAME}
        options["lr"] = group["lr"]
        options["beta1"], options["beta2"] = group["betas"]
        options["lion_beta1"], options["lion_beta2"] = group["lion_betas"]
        options["second_max"] = group["second_moment"] == "max"
        options["pullback_from_step"] = group["pullback_from"] == "step"
        options["learn"] = _bits(group["learn"])
        return options

    def _launch(self, work: Work, states: dict[str, list[Tensor]]) -> None:
        group, device = work.group, work.device
        options = {**self._arguments(group).step, "capturable": work.on_device, **work.lr(), **work.scaling}
        values = sums = None
        if group["learn"]:
            values = moved(group["coefficient_values"], device)
            sums = torch.empty(len(HYPERGRADIENTS), dtype=values.dtype, device=device)
            self._sums.append((group, sums, work))
        get = states.get
        last_grads, older_grads = get("last_grad", []), get("older_grad", [])
        work.backend.op("mada_step_")(
            work.params,
            work.grads,
            get("exp_avg", []),
            get("exp_avg_sq", []),
            get("exp_avg_diff", []),
            get("mean_exp_avg_sq") or get("max_exp_avg_sq", []),
            get("exp_avg_lion", []),
            last_grads,
            older_grads,
            get("last_scalars", []),
            get("ema", []),
            states["step"],
            values,
            sums,
            **options,
        )
        if not older_grads or work.on_device or work.left_undone():
            return
        for param in work.owners:
            state = self.state[param]
            state["last_grad"], state["older_grad"] = state["older_grad"], state["last_grad"]

    def _learn(self) -> None:
        """Moves the coefficients, once for each set of them that took part in the step."""
        reduce_((sums, work.axes) for _, sums, work in self._sums)
        by_set: dict[int, tuple[Group, dict[str, Tensor], list[Tensor]]] = {}
        for group, sums, work in self._sums:
            by_set.setdefault(id(group["coefficient_values"]), (group, work.scaling, []))[2].append(sums)
        if self._ranks() is not None:
            by_set = self._over_process_group(by_set)
        for group, scaling, rows in by_set.values():
            device = group["coefficient_values"].device
            rows = [moved(row, device) for row in rows]
            found_inf = moved(scaling["found_inf"], device) if "found_inf" in scaling else None
            learn = choose(self._backend_name, device, torch.float32).op("mada_learn_")
            learn(*(group[name] for name in _LEARNED), rows, found_inf, **self._arguments(group).learn)

    def _ranks(self) -> Any:
        return torch.distributed.group.WORLD if self._hyper_process_group == "world" else self._hyper_process_group

    def _over_process_group(
        self, by_set: dict[int, tuple[Group, dict[str, Tensor], list[Tensor]]]
    ) -> dict[int, tuple[Group, dict[str, Tensor], list[Tensor]]]:
        """One row for each set of coefficients, summed over the process group. A rank whose parameters took no part has
        to take part here: others wait for it."""
        scaling = next((given for _, given, _ in by_set.values()), {})
        if not by_set and self._nonfinite is not None:
            scaling = {"found_inf": self._nonfinite}
        sets = {id(group["coefficient_values"]): group for group in self.param_groups if group["learn"]}
        totals = {}
        for key, group in sets.items():
            values = group["coefficient_values"]
            rows = [moved(row, values.device) for row in by_set[key][2]] if key in by_set else []
            totals[key] = torch.stack([values.new_zeros(len(HYPERGRADIENTS)), *rows]).sum(dim=0)
        if totals:
            all_reduce_(list(totals.values()), self._ranks())
        return {key: (sets[key], scaling, [total]) for key, total in totals.items()}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _required_states(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg_sq",) if "exp_avg_sq" in self._state_tensors(group) else ("exp_avg_lion",)

    def _to_save(self, group: Group) -> Group:
        self._by_name(group)
        last = self._prepared[id(group)]
        options = (tuple(last.step[name] for name in _REDONE_BY), last.states)
        hyper = {name: group[name] for name in _LEARNING}
        return {**super()._to_save(group), **hyper, "last_options": options}

    def _merged(self, saved: Group, group: Group) -> Group:
        if self.OWN_OPTION not in saved:
            saved = {name: value for name, value in saved.items() if name != "log_stats"}  # of PACE
        options = super()._merged(saved, {**group, "last_options": None, "frozen": None})
        # What a dict of hyper options leaves out is as it is here; those that state_dict() saved are whole.
        kept = {k: v for k, v in self._prepared[id(group)].learning.items() if isinstance(options[k], Mapping)}
        options = self._expanded(options, {**options, **kept})
        if options["learn"] and self.OWN_OPTION in saved:
            for name, fresh in self._fresh({**options, "params": group["params"]}).items():
                value = saved.get(name)
                shape = tuple(fresh.shape) if fresh is not None else ()
                came = tuple(value.shape) if isinstance(value, Tensor) else value
                require(came == shape, name, f"a tensor of shape {shape}", came)
                options[name] = self._checked_learned(name, value).to(fresh)  # type: ignore[arg-type]
        elif options["learn"]:
            # Another optimizer's checkpoint: learning starts at its options.
            self._check_start(options)
            options.update(self._fresh({**options, "params": group["params"]}))
        frozen = options["frozen"]
        if frozen is not None:
            six = isinstance(frozen, (tuple, list)) and len(frozen) == len(COEFFICIENTS)
            require(six, "frozen", f"None, or values of {', '.join(COEFFICIENTS)}", frozen)
            for name, value in zip(COEFFICIENTS, frozen, strict=True):
                if value is not None:
                    check_number(f"frozen: {name}", value, "in [0, 1]", lambda a: 0 <= a <= 1)
        last = options["last_options"]
        if last is not None:
            whole = isinstance(last, (tuple, list)) and [isinstance(part, (tuple, list)) for part in last] == [
                True,
                True,
            ]
            whole = whole and len(last[0]) == len(_REDONE_BY)
            require(whole, "last_options", f"None, or ({', '.join(_REDONE_BY)}) and the names of states", last)
        return options

    @staticmethod
    def _checked_learned(name: str, value: Tensor) -> Tensor:
        """What was saved of the learned coefficients. Outside of bounds that were narrowed since, a step moves them."""
        require(value.is_floating_point() and not value.is_meta, name, "of real numbers", value)
        numbers = value.reshape(-1).tolist()
        if name == "coefficient_values":
            for coefficient, number in zip(COEFFICIENTS, numbers, strict=True):
                beta = coefficient.startswith("beta")
                fits = 0 <= number <= 1 and (number < 1 or not beta)
                require(fits, f"{name}: {coefficient}", "in [0, 1)" if beta else "in [0, 1]", number)
        elif name == "hyper_step":
            checked_count(name, value, 2**53)
        elif name == "coefficient_momenta":
            for coefficient, number in zip(COEFFICIENTS, numbers, strict=True):
                check_number(f"{name}: {coefficient}", number, "finite", lambda _: True)
        return value

    def _translated_state(
        self,
        saved: dict[str, Any],
        param: Tensor,
        group: Group,
        required: Sequence[str],
        name: str,
        notes: list[str],
    ) -> dict[str, Tensor]:
        state = super()._translated_state(saved, param, group, required, name, notes)
        if "last_scalars" in state:
            self._check_last_scalars(state["last_scalars"], group, name)
            last = group["last_options"]
            for needed in last[1] if last else self._state_tensors(group):
                if needed not in state and needed != "ema" and state["last_scalars"][0] == REDO:
                    raise ValueError(f"{name} lacks {needed}, without which its last step can't be redone")
        if "last_grad" in state and "last_scalars" not in state and "last_scalars" in self._state_tensors(group):
            # An earlier version kept scalars only where something was learned. The gradient is one of a step all the
            # same, but in the state of a dry run.
            state["last_scalars"] = self._initial("last_scalars", param, group)
            state["last_scalars"][0] = DONE if state["step"] > 0 else NO_GRADIENT
        return state

    @staticmethod
    def _check_last_scalars(row: Tensor, group: Group, name: str) -> None:
        taken, lr, *coefficients = row.tolist()
        known = taken in (DONE, NO_GRADIENT) or (taken == REDO and group["learn"])
        fits = taken == NO_GRADIENT or (lr >= 0 and math.isfinite(lr) and all(0 <= q <= 1 for q in coefficients))
        if not (known and fits):
            raise ValueError(f"{name}: last_scalars must be of a step ({', '.join(LAST_SCALARS)}), got {row.tolist()}")

    def _translated(self, loaded: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        saved_groups = self._checked_structure(loaded)
        starts = not any(self.OWN_OPTION in group for group in saved_groups)
        loaded = super()._translated(loaded, notes)
        if self._incoming is not None:
            self._check_sharing(loaded["param_groups"], start=starts)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        ranks = self._hyper_process_group if self._hyper_process_group == "world" else None  # no pickle holds others
        last = [self._prepared[id(group)] for group in self.param_groups]
        return {**super().__getstate__(), "_last": last, "_hyper_process_group": ranks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sums = []
        self.__dict__.setdefault("_hyper_process_group", None)
        self._share()
        kept = self.__dict__.pop("_last", ())  # of a pickle
        for group, before in zip_longest(self.param_groups, kept):
            last = group.setdefault("last_options", None)
            group.setdefault("frozen", None)
            group["last_options"] = None
            if before is not None:
                self._prepared[id(group)] = before
                continue
            now = self._prepare(group)
            if last is not None:
                now = now._replace(step=now.step | dict(zip(_REDONE_BY, last[0], strict=True)), states=tuple(last[1]))
            self._prepared[id(group)] = now
        self._default_to_frozen()
