"""Pullback: the average of the weights and the clipped pull toward it, around any optimizer."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .checks import Group, check_average_options, check_lr, check_number, plain_number, require
from .ops import PACE_STATS
from .optimizer import KernelOptimizer
from .sharding import Axes, gathered_rows, local
from .states import Work
from .torch_rules.pace import average_weight, merge_stats
from .torch_rules.pullback import PullbackOptions
from .uninterrupted import uninterrupted

# The names of the pullback's options, by which a group of the base may set its own.
_OPTIONS = (
    *("lambda_pullback", "gain", "second_moment", "clamp_pullback", "beta_ema", "use_ema_eval", "ema_kappa", "ema_rho"),
    *("ema_gamma", "ema_update_freq", "log_stats", "pullback_from"),
)
_PREFIX = "pullback_"  # of those in the groups of a checkpoint
# What the average's states are called in a checkpoint, among those of the base.
_STATES = {"ema": "ema", "step": "pullback_step", "live": "live"}
_SMALLEST_EPS = 2.0**-126  # below, 1 / D could be infinite


@dataclass(frozen=True)
class SecondMoment:
    """Where a base keeps its second moment: the name of the state; β2 of its bias correction, 0 without one; ε."""

    name: str
    beta2: float
    eps: float


def _of_adam(group: Group, dtype: torch.dtype) -> SecondMoment:
    name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    return SecondMoment(name, float(group["betas"][1]), float(group["eps"]))


def _of_rmsprop(group: Group, dtype: torch.dtype) -> SecondMoment:
    return SecondMoment("square_avg", 0.0, float(group["eps"]))


def _of_adafactor(group: Group, dtype: torch.dtype) -> SecondMoment:
    eps = group["eps"][0]
    return SecondMoment("variance", 0.0, torch.finfo(dtype).eps if eps is None else float(eps))


# By class; AdamW is one of Adam.
_BASES: tuple[tuple[type, Callable[[Group, torch.dtype], SecondMoment]], ...] = (
    (torch.optim.Adam, _of_adam),
    (torch.optim.NAdam, _of_adam),
    (torch.optim.RAdam, _of_adam),
    (torch.optim.RMSprop, _of_rmsprop),
    (torch.optim.Adafactor, _of_adafactor),
)


def second_moment_of(base: torch.optim.Optimizer, group: Group, own: Group, dtype: torch.dtype) -> SecondMoment | None:
    """The second moment of a group's parameters; None where none is known. ``own`` are the pullback's options."""
    known = next((of for kind, of in _BASES if isinstance(base, kind)), None)
    found = None if known is None else known(group, dtype)
    name = own["second_moment"]
    if name is None or (found is not None and found.name == name):
        return found
    eps = group.get("eps", 1e-8)
    return SecondMoment(name, 0.0, float(eps) if isinstance(eps, (int, float)) else 1e-8)


def _refuse(base: object) -> None:
    """Raises where a pullback around this optimizer would mean nothing, or something else."""
    name = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {base!r}")
    if isinstance(base, Pullback):
        raise ValueError("optimizer is a Pullback already: one average is kept, wrap the optimizer inside")
    if isinstance(base, KernelOptimizer):
        raise ValueError(f"{name} carries the pullback in its own pass: give it lambda_pullback instead of wrapping it")
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("LBFGS moves the weights several times within a step, so there is no one step to pull back")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{name}.step needs a closure, which here runs before it: there is no one step to pull back")
    if any(kind.__module__.split(".")[0] == "schedulefree" for kind in type(base).__mro__):
        raise ValueError(
            f"{name} of schedulefree: the weights it evaluates are an average already, its gradients are taken between "
            "that and the iterates, and its own train() and eval() exchange the two; a pullback would act on the wrong "
            "ones"
        )


@dataclass
class _Row:
    """The statistics of one call, and what of them means something."""

    stats: Tensor
    axes: Axes
    moment: bool
    before: bool


@dataclass
class _Prepared:
    work: Work
    states: dict[str, list[Tensor]]
    befores: list[Tensor] = field(default_factory=list)


class _Averager(KernelOptimizer):
    """The average of a base's weights and the pull toward it: an optimizer whose step follows the base's. Its groups
    mirror those of the base: the same parameters, the pullback's options, and the base's learning rate."""

    READS_GRADIENTS = False
    STATE_TENSORS = ("ema",)
    OWN_OPTION = "gain"

    _base: torch.optim.Optimizer
    _rows: list[_Row]
    _buffers: dict[Tensor, Tensor]  # copies of weights, kept on the CPU, where new memory costs page faults
    _offsets: dict[Tensor, int]  # the base's steps before the first of the average

    def __init__(self, base: torch.optim.Optimizer, options: Group, backend: str | None) -> None:
        self._base = base
        self._rows, self._buffers, self._offsets = [], {}, {}
        first, *others = (self._mirrored(group, options) for group in base.param_groups)
        super().__init__([first], options, backend)
        self.param_groups[0]["params"] = base.param_groups[0]["params"]
        for group in others:
            self.add_param_group(group)

    # ---- groups ----------------------------------------------------------------------------------------------------

    def _mirrored(self, group: Group, options: Group) -> Group:
        own = {name: group.get(name, options[name]) for name in _OPTIONS}
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        return {"params": group["params"], **names, **own, **self._of_base(group)}

    @staticmethod
    def _of_base(group: Group) -> Group:
        capturable = bool(group.get("capturable", False))
        return {"lr": group["lr"], "betas": (0.0, 0.0), "capturable": capturable, "skip_nonfinite": False}

    def add_param_group(self, param_group: Group) -> None:
        params = param_group["params"]
        names = param_group.pop("param_names", None)
        if names is not None:  # as torch takes them
            param_group["params"] = list(zip(names, params, strict=True))
        super().add_param_group(param_group)
        self.param_groups[-1]["params"] = params  # the base's own list

    def follow(self) -> None:
        """Takes over what changed in the base's groups: options, learning rates, parameters, further groups."""
        for group in self._base.param_groups[len(self.param_groups) :]:
            self.add_param_group(self._mirrored(group, self.defaults))
        for own, group in zip(self.param_groups, self._base.param_groups, strict=True):
            for name in _OPTIONS:
                if name in group:
                    own[name] = group[name]
            own["lr"] = group["lr"]
            own["capturable"] = bool(group.get("capturable", False))
            own["params"] = group["params"]

    def base_group(self, own: Group) -> Group:
        return self._base.param_groups[next(k for k, group in enumerate(self.param_groups) if group is own)]

    def _check_options(self, group: Group) -> None:
        check_lr(group["lr"])
        check_average_options(group)
        if group["gain"] is not None:
            check_number("gain", group["gain"], "None, or a constant in [0, 1]", lambda a: 0 <= a <= 1)
        name = group["second_moment"]
        require(name is None or isinstance(name, str), "second_moment", "None or the name of a state", name)
        require(isinstance(group["log_stats"], bool), "log_stats", "True or False", group["log_stats"])
        if group["gain"] is not None or group["lambda_pullback"] == 0.0:
            return
        kind = type(self._base).__name__
        # Found by its parameters: while a group is added it is not among the base's groups yet.
        base = next((g for g in self._base.param_groups if g["params"] is group.get("params")), None)
        base = self._base.param_groups[0] if base is None else base
        found = second_moment_of(self._base, base, group, torch.float32)
        if found is None:
            raise ValueError(
                f"{kind} has no second moment that is known here, which the clipped gain divides by: give gain= (a "
                'constant in [0, 1]), or second_moment="name" of the state that holds one'
            )
        if isinstance(self._base, torch.optim.Adafactor) and found.name == "variance":
            for i, param in enumerate(group.get("params", ())):
                if param.dim() > 1:
                    raise ValueError(
                        f"parameter {i} of the group has shape {tuple(param.shape)}: of matrices Adafactor keeps a "
                        "factored second moment, not one of each coordinate; give gain= (a constant in [0, 1]), or put "
                        'matrices into a group of their own with a "gain"'
                    )

    def _pulls(self, group: Group) -> bool:
        gain = group["lambda_pullback"] if group["gain"] is None else group["gain"]
        return bool(gain != 0.0)

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        return ("ema",) if self._pulls(group) or group["use_ema_eval"] else ()

    def _required_states(self, group: Group) -> tuple[str, ...]:
        return ("ema",)

    # ---- the step --------------------------------------------------------------------------------------------------

    def prepare(self, found_inf: Tensor | None) -> list[_Prepared]:
        """Before the base's step: the averages that are missing start, and weights that are needed later are copied."""
        self.follow()
        scaling = self._scaling(None) if found_inf is None else {"found_inf": found_inf.detach().to(torch.float32)}
        works = [work for work in self._collect(scaling) if self._state_tensors(work.group)]
        # torch.distributed.checkpoint takes one wherever the base has no state, as SGD without momentum never has.
        if (not self.state or not self._base.state) and self._is_dry_run(works):
            if not self.state:
                for work in works:
                    self._states(work)
                self._dry = True
            return []
        self._forget_dry_run()
        for work in works:
            self._check_moments(work)
        prepared = [_Prepared(work, self._states(work)) for work in works]
        for p in prepared:
            for owner, step in zip(p.work.owners, p.states["step"], strict=True):
                if owner not in self._offsets:
                    taken = self._base.state.get(owner, {}).get("step", 0)
                    self._offsets[owner] = max(0, int(taken) - int(step)) if self._corrected(p.work) else 0
            if self._pulls(p.work.group) and p.work.group["pullback_from"] == "weights":
                p.befores = self._copied(p.work)
        return prepared

    def _is_dry_run(self, works: list[Work]) -> bool:
        def dense(grad: Tensor) -> Tensor:
            return grad._values() if grad.layout is torch.sparse_coo else grad

        return super()._is_dry_run([replace(w, grads=[dense(local(p.grad)) for p in w.owners]) for w in works])  # type: ignore[arg-type]

    def _moment(self, work: Work) -> SecondMoment | None:
        """None where the gain is a constant, or nothing pulls."""
        group = work.group
        if group["gain"] is not None or not self._pulls(group):
            return None
        return second_moment_of(self._base, self.base_group(group), group, work.params[0].dtype)

    def _corrected(self, work: Work) -> bool:
        moment = self._moment(work)
        return moment is not None and moment.beta2 != 0.0

    def _check_moments(self, work: Work) -> None:
        moment = self._moment(work)
        for owner in work.owners if moment is not None else ():
            state = self._base.state.get(owner)
            if state and moment is not None and moment.name not in state:
                self._lacks(moment.name, state)

    def _lacks(self, name: str, state: dict[str, Any]) -> None:
        raise RuntimeError(
            f"{type(self._base).__name__} keeps no state {name!r} of a parameter, but {', '.join(map(str, state))}: "
            "give second_moment= the name of its second moment, or gain="
        )

    def _copied(self, work: Work) -> list[Tensor]:
        buffers = []
        for owner, param in zip(work.owners, work.params, strict=True):
            kept = self._buffers.get(owner)
            if kept is None or kept.dtype != param.dtype or kept.shape != param.shape or kept.device != param.device:
                kept = torch.empty_like(param, requires_grad=False)
                if param.device.type == "cpu":
                    self._buffers[owner] = kept
            buffers.append(kept)
        torch._foreach_copy_(buffers, [param.detach() for param in work.params])
        return buffers

    def finish(self, prepared: list[_Prepared]) -> None:
        """After the base's step: the pull and the average."""
        self._rows = []
        for p in prepared:
            for part in self._by_offset(p):
                self._pull_back(part)
            torch.autograd.graph.increment_version(p.work.params)
            if p.work.axes:
                torch.autograd.graph.increment_version(p.work.owners)

    def _by_offset(self, p: _Prepared) -> list[_Prepared]:
        """As a rule one call; parameters that the base trained for longer before than others get their own."""
        offsets = [self._offsets[owner] for owner in p.work.owners]
        if len(set(offsets)) <= 1:
            return [p]

        def some(values: list[Any], offset: int) -> list[Any]:
            return [value for value, its in zip(values, offsets, strict=True) if its == offset] if values else []

        return [
            _Prepared(
                replace(p.work, owners=some(p.work.owners, k), params=some(p.work.params, k)),
                {name: some(values, k) for name, values in p.states.items()},
                some(p.befores, k),
            )
            for k in sorted(set(offsets))
        ]

    def _pull_back(self, p: _Prepared) -> None:
        work, group, device = p.work, p.work.group, p.work.device
        moment, seconds = self._moment(work), []
        if moment is not None:
            for owner in work.owners:
                state = self._base.state.get(owner, {})
                if moment.name not in state:
                    self._lacks(moment.name, state)
                seconds.append(local(state[moment.name]))
        stats = None
        if group["log_stats"]:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            stats = torch.empty(len(PACE_STATS), dtype=dtype, device=device)
            self._rows.append(_Row(stats, work.axes, moment is not None, bool(p.befores)))
        options = self.operator_options(group, moment)
        options |= {"step_offset": self._offsets[work.owners[0]], "capturable": work.on_device}
        work.backend.op("pullback_")(
            work.params,
            p.befores,
            seconds,
            p.states["ema"],
            p.states["step"],
            stats,
            **options | work.lr() | work.scaling,
        )

    def operator_options(self, group: Group, moment: SecondMoment | None) -> Group:
        """The operator's options that a group's parameters share."""
        shared = PullbackOptions.__dataclass_fields__.keys() & group.keys()
        options = {k: plain_number(group[k]) for k in shared} | {"step_offset": 0}
        beta2, eps = (0.0, 1.0) if moment is None else (moment.beta2, max(moment.eps, _SMALLEST_EPS))
        return options | {"beta2": beta2, "eps": eps}

    # ---- telemetry -------------------------------------------------------------------------------------------------

    def step_stats(self) -> dict[str, float]:
        def merged(rows: list[_Row]) -> dict[str, float]:
            found = [row for r in rows for row in gathered_rows(r.stats, r.axes)]
            if not found:
                return {}
            values = merge_stats([row.to("cpu", torch.float64) for row in found]).tolist()
            s = dict(zip(PACE_STATS, values, strict=True))
            return s if s["count"] > 0 else {}

        stats: dict[str, float] = {}
        s, raw = merged(self._rows), merged([r for r in self._rows if r.moment])
        if not s:
            return stats
        for key, name, of in (
            ("raw", "raw_lambda", raw),
            ("effective", "effective_lambda", s),
            ("lambda", "lambda", s),
        ):
            if of:
                stats[f"{name}_mean"] = of[f"{key}_sum"] / of["count"]
                stats[f"{name}_max"] = of[f"{key}_max"]
                stats[f"{name}_min"] = of[f"{key}_min"]
        stats["lambda_clipped_frac"] = s["clipped"] / s["count"]
        stats["pullback_norm"] = math.sqrt(s["pullback_sq"])
        if all(r.before for r in self._rows):
            stats["base_step_norm"] = math.sqrt(s["adam_sq"])
            stats["update_norm"] = math.sqrt(s["update_sq"])
        return stats

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def forget_offsets(self) -> None:
        self._offsets, self._buffers = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rows, self._buffers, self._offsets = [], {}, {}


class Pullback(torch.optim.Optimizer):
    """Averages the weights of any optimizer, and pulls them toward their average, in one pass behind its step.

    ::

        [formula: Pullback]
          x'  = base_step(x)                               any optimizer's step
          D   = sqrt(v / (1 − β2^t)) + ε                   of the base's second moment v
          w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
          Λ   = min(α c w_t / D, 1)                        pullback gain, clipped; or a constant Π
          x₊  = x' + Λ (e − x)                             pulled toward the average e
          e₊  = e + w_t (x₊ − e)                           the average
        [end]

    ``t`` of the averaging weight counts the steps of each parameter under this pullback. ``param_groups``, ``state``,
    ``defaults``, ``zero_grad()`` are those of ``optimizer.base``; learning-rate schedulers, hooks, ``GradScaler``,
    closures, checkpoints work as with the base. Global step hooks run for both.

    Arguments:
        optimizer: any ``torch.optim.Optimizer`` but PACE and MADA, which have the pullback in their own pass, LBFGS,
            and those of ``schedulefree``, whose weights are an average already.
        lambda_pullback: c ≥ 0. 0, without ``gain``, is an average alone: the weights are only read.
        gain: a constant Π in [0, 1], with which c means nothing. None: the clipped gain of the base's second moment,
            which Adam, AdamW, NAdam, RAdam, RMSprop and, of vectors and scalars, Adafactor have. RMSprop with
            ``centered=True`` and RAdam divide by something else themselves; D is that of the uncentred moment, and that
            of Adam.
        second_moment: the name of the state that holds a second moment, for other optimizers; without bias correction,
            and ε of the group, or 1e-8.
        clamp_pullback, beta_ema, use_ema_eval, ema_kappa, ema_rho, ema_gamma, ema_update_freq, log_stats: as in
            :class:`PACE`.
        pullback_from: where the distance to the average is measured: ``"weights"`` before the step (e − x), which costs
            a copy of them, 8 bytes a parameter moved and 4 held in float32 (on the CPU always, elsewhere for the time
            of a step); or ``"step"``, after it (e − x'), which costs none. Without a pull nothing is copied.
        backend: as in :class:`PACE`.

    A param group of the base may hold any of these options under its name, for its parameters alone:
    ``{"params": ..., "gain": 0.01}``.

    ``state_dict()`` has the base's states and options and, beside them, ``ema``, ``pullback_step`` and, while swapped,
    ``live`` of each parameter; ``base.state_dict()`` is the base's own, and loads too: the average then starts at the
    weights.

    Raises:
        ValueError, TypeError: an argument is out of its range, the optimizer is refused, or has no second moment.
        RuntimeError: ``step()`` while the average is swapped in; the second moment is not there. Nothing has changed
            then (in the very first step of an optimizer with a misnamed ``second_moment``, the base has stepped).

    Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 and 10.

    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = Pullback(torch.optim.SGD(model.parameters(), lr=0.1), gain=0.05)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> with optimizer.averaged():
    ...     loss = model(torch.ones(8, 4)).square().mean()
    """

    base: torch.optim.Optimizer
    averager: _Averager

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lambda_pullback: float = 0.15,
        *,
        gain: float | None = None,
        second_moment: str | None = None,
        clamp_pullback: bool = True,
        beta_ema: float = 0.01,
        use_ema_eval: bool = True,
        ema_kappa: float | None = 0.2,
        ema_rho: float = 0.0,
        ema_gamma: float = 1.0,
        ema_update_freq: int = 1,
        log_stats: bool = False,
        pullback_from: str = "weights",
        backend: str | None = None,
    ) -> None:
        _refuse(optimizer)
        options = {
            "lambda_pullback": lambda_pullback,
            "gain": gain,
            "second_moment": second_moment,
            "clamp_pullback": clamp_pullback,
            "beta_ema": beta_ema,
            "use_ema_eval": use_ema_eval,
            "ema_kappa": ema_kappa,
            "ema_rho": ema_rho,
            "ema_gamma": ema_gamma,
            "ema_update_freq": ema_update_freq,
            "log_stats": log_stats,
            "pullback_from": pullback_from,
        }
        self.base = optimizer
        self.averager = _Averager(optimizer, options, backend)
        self._hook_up()

    def _hook_up(self) -> None:
        """What torch.optim.Optimizer makes in __init__, but for groups and state, which are the base's."""
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                self.__dict__.setdefault(f"_optimizer_{kind}_{when}_hooks", OrderedDict())
        averager = self.averager
        self.base.register_load_state_dict_post_hook(lambda _: averager.forget_offsets())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    # ---- delegation ------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> Group:  # type: ignore[override]
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: Group) -> None:
        self.base.defaults = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the base takes over what a gradient scaler does; GradScaler asks."""
        return bool(getattr(self.base, "_step_supports_amp_scaling", False))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the base, with options of its own; also in the middle of training."""
        self.averager.follow()
        self.base.add_param_group(param_group)
        try:
            self.averager.follow()
        except Exception:
            self.base.param_groups.pop()
            raise

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The base's step, then the pull and the average. ``closure`` recomputes the loss; its value is returned."""
        self.averager._require_live("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.averager._require_live("step() with a closure that returns")
        self._step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step(self) -> None:
        scaling = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        with uninterrupted():
            averaged = set(self.averager.state)
            try:
                prepared = self.averager.prepare(scaling.get("found_inf"))
                for name, value in scaling.items():
                    setattr(self.base, name, value)
                try:
                    self.base.step()
                finally:
                    for name in scaling:
                        delattr(self.base, name)
            except BaseException:
                for owner in self.averager.state.keys() - averaged:  # it would be stale by the next step
                    del self.averager.state[owner]
                raise
            self.averager.finish(prepared)

    # ---- the average -----------------------------------------------------------------------------------------------

    def eval(self) -> None:
        """Puts the average in place of the weights, in groups with ``use_ema_eval``; again is harmless."""
        self.averager.follow()
        self.averager.eval()

    def train(self) -> None:
        """Puts the weights back that ``eval()`` took out; again is harmless."""
        self.averager.train()

    def averaged(self) -> AbstractContextManager[None]:
        """Within this context the parameters hold their averages, whatever is raised inside."""
        self.averager.follow()
        return self.averager.averaged()

    def ema_state_dict(self, model: torch.nn.Module, *, full: bool = False) -> dict[str, Any]:
        """A copy of ``model.state_dict()`` with averaged weights; see :meth:`PACE.ema_state_dict`."""
        self.averager.follow()
        return self.averager.ema_state_dict(model, full=full)

    def get_step_stats(self) -> dict[str, float]:
        """Statistics of the last step, over all groups with ``log_stats``: those of :meth:`PACE.get_step_stats`, of the
        base's step ``base_step_norm``. Where no second moment takes part there is no ``raw_lambda_*``, and where
        the weights before the step are not at hand (``pullback_from="step"``, or no pull) no ``base_step_norm`` and no
        ``update_norm``."""
        return self.averager.step_stats()

    def get_ema_beta_t(self) -> float | None:
        """The averaging weight w_t at the last step of the first group that keeps an average; None where none does."""
        averager = self.averager
        averager.follow()
        for group in averager.param_groups:
            if averager._keeps_average(group):
                steps = [float(averager.state[p]["step"]) for p in group["params"] if p in averager.state]
                options = {**averager.operator_options(group, None), "lr": 0.0, "capturable": False}
                return float(average_weight(PullbackOptions(**options), max(steps, default=0.0)))
        return None

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the average's states and options among those of the base."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self.averager.follow()
        saved, ours = self.base.state_dict(), self.averager.state_dict()
        states: dict[Any, Any] = dict(saved["state"])
        for key, state in ours["state"].items():
            average = {_STATES[name]: value for name, value in state.items()}
            if taken := sorted(average.keys() & states.get(key, {}).keys()):
                raise RuntimeError(
                    f"{type(self.base).__name__} has a state {taken[0]!r} of its own, as the average has"
                )
            states[key] = {**states.get(key, {}), **average}
        groups = []
        for group, own in zip(saved["param_groups"], ours["param_groups"], strict=True):
            names = [name for name in _OPTIONS if name not in group] + ["swapped", "format_version"]
            groups.append({**group, **{_PREFIX + name: own[name] for name in names}})
        merged = {**saved, "state": states, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, merged)
            merged = merged if result is None else result
        return merged

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the base alone: the average then starts at the weights.

        Averages stay float32 (float64 for float64 parameters). An option that the checkpoint does not have keeps its
        present value. A state that does not fit raises ValueError and changes nothing, in the base neither.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self.averager.follow()
        self.averager._checked_structure(state_dict)
        bases, ours = self._split(state_dict)
        self.averager._translated(ours, [])  # raises where it does not fit
        self.averager._incoming = None
        self._load_base(bases)
        self.averager.load_state_dict(ours)
        self.averager.forget_offsets()
        self.averager.follow()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_base(self, state_dict: dict[str, Any]) -> None:
        """torch puts new groups and states in place before a base finds out that they are not its own."""
        kind = type(self.base).__name__
        before = (self.base.state, self.base.param_groups)
        try:
            self.base.load_state_dict(state_dict)
            for number, group in enumerate(self.base.param_groups):
                if missing := sorted(self.base.defaults.keys() - group.keys()):
                    raise ValueError(f"param_groups[{number}] lacks {', '.join(missing)}, which {kind} has")
        except (KeyError, AttributeError, ValueError) as error:
            self.base.state, self.base.param_groups = before
            raise ValueError(f"the checkpoint is not one of {kind}: {error}") from error
        except BaseException:
            self.base.state, self.base.param_groups = before
            raise

    def _split(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The base's part and the average's, checked as far as they belong together."""
        saved = state_dict["param_groups"]
        present = self.base.param_groups
        if len(saved) != len(present):
            raise ValueError(f"the checkpoint has {len(saved)} parameter groups, the optimizer has {len(present)}")
        base_groups, own_groups = [], []
        for number, (group, now, own) in enumerate(zip(saved, present, self.averager.param_groups, strict=True)):
            if len(group["params"]) != len(now["params"]):
                counts = f"{len(group['params'])} parameters in the checkpoint, {len(now['params'])} here"
                raise ValueError(f"param_groups[{number}] has {counts}")
            prefixed = {k.removeprefix(_PREFIX): v for k, v in group.items() if k.startswith(_PREFIX)}
            overrides = {name: now[name] for name in _OPTIONS if name in now}
            plain = overrides | {k: v for k, v in group.items() if not k.startswith(_PREFIX)}
            base_groups.append(plain)
            options = {name: plain.get(name, prefixed.get(name, own[name])) for name in _OPTIONS}
            lr = group.get("lr", now["lr"])
            kept = {k: v for k, v in prefixed.items() if k in ("swapped", "format_version")}
            own_groups.append(
                {"params": group["params"], **self.averager._of_base({**now, "lr": lr}), **options, **kept}
            )
        params = dict(zip(_flat(saved), _flat(present), strict=True))
        reverse = {theirs: name for name, theirs in _STATES.items()}
        base_states, own_states = {}, {}
        for key, state in state_dict["state"].items():
            if not isinstance(state, dict):
                base_states[key] = state
                continue
            # Copies: torch takes tensors as they are, and would train those of the checkpoint.
            theirs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items() if k not in reverse}
            own_state = {reverse[k]: v for k, v in state.items() if k in reverse}
            if key in params:
                self._check_base_state(key, theirs, params[key])
            if theirs or not own_state:
                base_states[key] = theirs
            if own_state:
                if key in params and "step" not in own_state:
                    raise ValueError(
                        f"state[{key!r}] has an average without pullback_step: is it of another optimizer?"
                    )
                own_states[key] = own_state
        return (
            {**state_dict, "state": base_states, "param_groups": base_groups},
            {"state": own_states, "param_groups": own_groups},
        )

    def _check_base_state(self, key: Any, state: dict[str, Any], param: Tensor) -> None:
        """torch checks no shapes: a state of another model or optimizer would be found out by a step, too late."""
        have = self.base.state.get(param)
        if have and state and (missing := sorted(map(str, have.keys() - state.keys()))):
            kind = type(self.base).__name__
            raise ValueError(
                f"state[{key!r}] lacks {', '.join(missing)}, which {kind} keeps: is it of another optimizer?"
            )
        for name, value in state.items():
            like = have.get(name) if have else None
            shape = like.shape if isinstance(like, Tensor) else param.shape
            checked = isinstance(like, Tensor) or name in ("exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer")
            if checked and isinstance(value, Tensor) and value.shape != shape and value.numel() != 1:
                raise ValueError(f"state[{key!r}]: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "averager": self.averager}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.averager._base = self.base
        for own, group in zip(self.averager.param_groups, self.base.param_groups, strict=False):
            own["params"] = group["params"]
        self._hook_up()

    def __repr__(self) -> str:
        own = {name: self.averager.defaults[name] for name in ("lambda_pullback", "gain", "pullback_from")}
        return f"Pullback({self.base!r}, {', '.join(f'{k}={v!r}' for k, v in own.items())})"


def _flat(groups: list[Group]) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in groups))
