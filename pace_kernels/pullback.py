"""Pullback: the average of the weights and the clipped pull toward it, around any optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .backend import BackendName, requested
from .checks import Group
from .formats import HASH, has_average, parts_of
from .options import shown, spelled
from .planning import is_observed
from .pull_plan import PullPlan
from .pull_reports import PullReports
from .pulls import AT_REST, AVERAGE, FORMAT_VERSION, SWAPPED, Pull, Scratch, versions
from .second_moments import refuse
from .states import FORMAT

_OWN = "states and weights are those of the wrapped optimizer; ema_bits says how the average lies"
_OF_THE_BASE = dict.fromkeys(("state_bits", "master_weight_bits", "stochastic_rounding"), _OWN)
_NO_CLIP_COEF = (
    "Pullback.step() takes no clip_coef: the base's step takes the gradients as they are. Clip them before it, as by "
    "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)"
)


class Pullback(PullReports):
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
            ``centered=True`` and RAdam use another denominator in their own step; D here is that of the uncentred
            moment, and Adam's.
        second_moment: the name of the state that holds a second moment, for other optimizers; without bias correction,
            and ε of the group, or 1e-8.
        clamp_pullback, beta_ema, use_ema_eval, ema_kappa, ema_rho, ema_gamma, ema_update_freq, log_stats: as in
            :class:`PACE`.
        ema_bits: of each element of the average, as in :class:`PACE`. With 16 and 8 the weights before the step are
            copied for ``pullback_from="step"`` and without a pull, too.
        pullback_from: where the distance to the average is measured: ``"weights"`` before the step (e − x), which costs
            a copy of them: 8 bytes moved and 4 held per float32 parameter (on the CPU always, on other devices only
            during a step); or ``"step"``, after it (e − x'), without a copy. Without a pull nothing is copied.
        backend: as in :class:`PACE`.

    A param group of the base may hold any of these options under its name, for its parameters alone:
    ``{"params": ..., "gain": 0.01}``.

    The average (``ema``), its step count (``pullback_step``) and, while swapped, ``live`` are states of the base:
    whatever moves, clears or saves the base's states does the same to them. ``state_dict()`` adds the options. A
    checkpoint of the base alone loads, and the average then starts at the weights (a flattened distributed one: before
    the base is wrapped). A parameter that did not require a gradient at the last step has no average, and starts one
    anew when it steps again.

    Raises:
        ValueError, TypeError: an argument is out of its range, the optimizer is refused, or has no second moment.
        RuntimeError: ``step()`` while the average is swapped in; the second moment is not there. Nothing has changed
            then (in the very first step of an optimizer with a misnamed ``second_moment``, the base has stepped).

    Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 and 10.

    >>> import torch
    >>> from pace_kernels import Pullback
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

    @spelled(_OF_THE_BASE)
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
        pullback_from: Literal["weights", "step"] = "weights",
        ema_bits: Literal[32, 24, 16, 8] | None = None,
        backend: BackendName | None = None,
    ) -> None:
        if isinstance(optimizer, Pullback):
            raise ValueError("optimizer is a Pullback already: one average is kept, wrap the optimizer inside")
        refuse(optimizer)
        self.base = optimizer
        self._defaults = {
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
            "ema_bits": ema_bits,
        }
        self._backend_name = requested(backend)
        self._set_up()
        for group in optimizer.param_groups:
            self._taken_over(group)
        self._drop_cast_averages()
        self._hook_base()

    def _set_up(self) -> None:
        """What torch.optim.Optimizer makes in __init__, but for groups and state, which are the base's; and ours."""
        self._scratch, self._unfinished, self._versions = Scratch(), [], {}
        self._left, self._dtypes = {}, {}
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                self.__dict__.setdefault(f"_optimizer_{kind}_{when}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()
        self._mark_groups()

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
        self.base.add_param_group(param_group)
        try:
            self._taken_over(self.base.param_groups[-1])
        except Exception:
            self.base.param_groups.pop()
            raise
        self._mark_groups()

    # ---- the step --------------------------------------------------------------------------------------------------

    @property
    def clip_coef(self) -> None:
        """None: :meth:`step` takes no coefficient. Setting another one raises TypeError."""

    @clip_coef.setter
    def clip_coef(self, value: Any) -> None:
        if value is not None:
            raise TypeError(_NO_CLIP_COEF)

    def step(self, closure: Callable[[], Any] | None = None, *, clip_coef: None = None) -> Any:  # type: ignore[override]
        """The base's step, then the pull and the average. ``closure`` recomputes the loss; its value is returned.
        A ``clip_coef``, as :meth:`PACE.step` takes it, is refused (TypeError): bases do not scale gradients."""
        if clip_coef is not None:
            raise TypeError(_NO_CLIP_COEF)
        observed = is_observed(self)
        # A subclass with a step of its own has torch's hooks around that one.
        if observed and type(self).step is Pullback.step:
            return self._observed_step(*(() if closure is None else (closure,)))
        if closure is None and not observed and self._scratch.step_plans.next is not None and self._again():
            return None
        return self._unobserved_step(closure)

    # torch's own wrapper, of hooks and a profiler's range, takes 12 µs: here it is around what needs it.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _unobserved_step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._require_whole("step()")
        self._require_live("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_whole("step() with a closure that returns")
            self._require_live("step() with a closure that returns")
        self._step()
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_unobserved_step)

    def _again(self) -> bool:
        """Takes the step by the plan of the last one; False where it does not fit, and nothing has changed."""
        scratch = self._scratch
        plan = scratch.step_plans.next
        if plan is None or self._unfinished or scratch.unsure or torch._C._len_torch_dispatch_stack():
            return False
        if hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            return False
        if not plan.fits(self):
            scratch.step_plans.end()
            return False
        scratch.step_plans.vain = 0
        around = self._around_the_base if plan.sets_grad_mode else torch.no_grad()(self._around_the_base)
        around({}, plan.written, plan.aside, plan.pulls, plan.rest, plan=plan)
        return True

    @_disable_dynamo
    def _step(self) -> None:
        if self._again():
            return
        scaling = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        found_inf = scaling.get("found_inf")
        found_inf = None if found_inf is None else found_inf.detach().to(torch.float32)
        self._mark_groups()
        dry = not self.base.state and self._is_dry_run()
        self._forget_dry_run()
        pulls, rest = self._collect(found_inf)
        for pull in pulls if not dry else ():
            self._copy_weights(pull)
        written: list[Any] = [p for group in self.base.param_groups for p in group["params"]]
        # And of each state the first, which is what torch's optimizers write first.
        entries = filter(None, map(self.base.state.get, written))
        written += (next(iter(entry.values())) for entry in entries)
        # Bases take a state that is not empty for one of theirs, so one with nothing but ours is kept aside.
        aside = [(p, self.base.state[p]) for pull in pulls for p in pull.hidden]
        self._around_the_base(scaling, partial(versions, written), aside, pulls, rest, found_inf, dry=dry)

    def _around_the_base(
        self,
        scaling: dict[str, Any],
        written: Callable[[], list[int]],
        aside: list[tuple[Tensor, Group]],
        pulls: list[Pull],
        rest: list[Tensor],
        found_inf: Tensor | None = None,
        *,
        dry: bool = False,
        plan: PullPlan | None = None,
    ) -> None:
        """The base's step, of which the versions ``written`` tell whether it wrote anything, and what follows it."""
        before, marks = written(), self._unfinished
        try:
            marks.append("step")
            error = None
            if plan is None or aside:
                error = self._base_step(scaling, pulls if plan is None else [], aside)
            else:
                self.base.step()
            if error is None and (plan is None or not plan.taken(self)):
                with torch.no_grad():
                    error = None if plan is None else self._missing(plan.left())
                    if error is None:
                        self._finish(pulls, rest, found_inf, dry)
            marks.clear()
        except BaseException:
            self._put_back_states(aside)  # the exception may have come while it was done
            if written() == before and self._weights_are_as_copied(pulls):  # nothing was written
                marks.clear()
            raise
        if error is not None:
            raise error

    def _weights_are_as_copied(self, pulls: list[Pull]) -> bool:
        """Whether a base that may write past the versions of tensors, as through ``param.data``, wrote no weights."""
        if type(self.base).__module__.startswith("torch.optim"):
            return True
        copied = all(pull.befores for pull in pulls)
        return copied and all(
            torch.equal(a, b) for pull in pulls for a, b in zip(pull.befores, pull.params, strict=True)
        )

    def _base_step(
        self, scaling: dict[str, Any], pulls: list[Pull], aside: list[tuple[Tensor, Group]]
    ) -> RuntimeError | None:
        try:
            for p, _ in aside:
                self.base.state.pop(p)
            for name, value in scaling.items():
                setattr(self.base, name, value)
            self.base.step()
            return self._missing(pulls) if pulls else None
        finally:
            for name in scaling:
                self.base.__dict__.pop(name, None)
            if aside:
                self._put_back_states(aside)

    def _put_back_states(self, aside: list[tuple[Tensor, Group]]) -> None:
        for p, ours in aside:
            state = self.base.state.setdefault(p, ours)
            if state is not ours:
                state.update({name: value for name, value in ours.items() if name not in state})

    def _finish(self, pulls: list[Pull], rest: list[Tensor], found_inf: Tensor | None, dry: bool) -> None:
        self._scratch.rows = []
        if found_inf is not None and found_inf.is_cpu and bool(found_inf):
            self._note_left(_lying(pulls))  # a base may have counted a write
            return  # left undone: averages that would start begin at the weights of a step that counts
        for pull in pulls:
            self._enter(pull)
            pull.group[FORMAT_VERSION] = FORMAT
            self._scratch.unsure |= bool(pull.new) and (dry or pull.found_inf is not None)
        if dry:
            self._note_left(_lying(pulls))
            return
        parts = [part for pull in pulls for part in pull.parts()]
        for part in sorted(parts, key=lambda part: part.rounds[0]) if len(parts) > 1 else parts:
            self._pull_back(part)
        self._note_left(_lying(pulls))
        for p in rest:
            state = self.base.state.get(p)
            if state and has_average(state):
                for name in (*parts_of(AVERAGE), HASH):
                    state.pop(name, None)
                state[AT_REST] = True
        self._plan(pulls, parts, rest)

    # ---- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._require_whole("copying or pickling")
        kept = {name: self.__dict__[name] for name in ("base", "_defaults", "_backend_name")}
        return {**kept, "_unsure": self._scratch.unsure, "_edited_weights": self._edited()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unsure, edited = state.pop("_unsure"), state.pop("_edited_weights", ())
        self.__dict__.update(state)
        self._set_up()
        self._scratch.unsure = unsure
        self._note_copied(edited)
        self._hook_base()

    def __repr__(self) -> str:
        own = {name: self._defaults[name] for name in ("lambda_pullback", "gain", "pullback_from")}
        plain = type(self.base).__repr__ is torch.optim.Optimizer.__repr__
        books = {SWAPPED, FORMAT_VERSION}
        base = shown(type(self.base).__name__, self.param_groups, books) if plain else repr(self.base)
        return f"Pullback({base}, {', '.join(f'{k}={v!r}' for k, v in own.items())})"


def _lying(pulls: list[Pull]) -> list[Tensor]:
    """The parameters beside which averages lie."""
    return [owner for pull in pulls if pull.formats.on_grid for owner in pull.owners]
