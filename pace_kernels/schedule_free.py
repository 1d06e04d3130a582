"""Schedule-free AdamW: weights are trained between their steps and the average, and lr needs no schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backend import BackendName
from .checks import Group, check_common_options, check_number, check_torchs_options, checked_count, require
from .compressing import Compressing
from .conversions import state_in, weight_in
from .definitions.schedule_free import SCHEDULE_FREE
from .editing import Entry
from .fitting import NO_STATE
from .formats import beside, every_name, is_beside, taken
from .launching import Prepared, of_c
from .options import make_plain, spelled
from .plan import Plan
from .sharding import axes, is_wrapper, local, reduce_
from .states import LAST_STEP, Work, empty_state, moved
from .torch_rules.common import at_hand, by_graph, data
from .torch_rules.schedule_free import Schedule, advanced, schedule_free_average, schedule_free_weights
from .whole import Call, at_once, each

# What a group counts from step to step, by the names and with the first values of the package `schedulefree`.
_COUNTED: Group = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}


class ScheduleFreeAdamW(Compressing):
    """AdamW without a schedule of the learning rate: the weights are trained at a point between the steps and their
    average, in one pass over memory.

    ::

        [formula: ScheduleFreeAdamW]
          α_t = α min(t / warmup, 1)                       learning rate, warmed up
          ω_t = t^r (max α_1 … α_t)^p                      weight of this step in the average
          c   = ω_t / (ω_1 + … + ω_t)                      its share
          v   ← β2 v + (1 − β2) g²                         second moment; g at y, the weights that are trained
          u   = g / (sqrt(v / (1 − β2^t)) + ε) + λ_wd y    direction
          y₊  = y + c (z − y) − α_t (1 − β1 (1 − c)) u
          z₊  = z − α_t u                                  where the steps alone lead to
          x   = y + (1 − 1 / β1) (z − y)                   the average, computed to evaluate
        [end]

    It is ``AdamWScheduleFree`` of the package ``schedulefree``, with its arguments, ``train()`` and ``eval()``; each
    loads the checkpoints of the other. ``t`` counts the steps of a group, and z starts at the weights. Here ``eval()``
    keeps the live weights as the state `live`, so that ``train()`` brings back their bits, and training may begin
    without ``train()``. A parameter that is frozen later keeps its average, as there.

    Arguments:
        params: parameters, named parameters, or groups of them: dense, of dtype float32, bfloat16, float16 or float64.
            States are float32 (float64 for float64 parameters), but for ``state_bits`` and ``ema_bits``.
        lr: α ≥ 0, a number or a tensor with one element.
        betas: (β1, β2): β1 in (0, 1), how near to the average gradients are taken, and β2 in [0, 1).
        eps: ε ≥ 2**-126, float32's smallest normal number.
        weight_decay: λ_wd ≥ 0, at y.
        warmup_steps: steps ≥ 0 over which the learning rate rises from 0; 0: none.
        r: power of t in the weight of a step.
        weight_lr_power: p ≥ 0, power of the largest learning rate so far in the weight of a step.
        state_bits: as in :class:`PACE`, of v.
        ema_bits: of z, from which the average is computed: as in :class:`PACE`. With 16 or 8 it lies beside y.
        master_weight_bits, stochastic_rounding: as in :class:`PACE`, of y.
        maximize, capturable, skip_nonfinite, fused, differentiable, backend: as in :class:`PACE`. With ``capturable``,
            or ``found_inf`` on a device, k, weight_sum, lr_max and scheduled_lr of the groups become tensors there.
        foreach: as in ``torch.optim``. It changes nothing here.

    Raises:
        ValueError, TypeError: an argument is out of its range, or a parameter is sparse, complex, an integer, overlaps
            itself or a part of another, or is in two groups.
        RuntimeError: the backend asked for is not there; a gradient does not fit its parameter; ``step()`` between
            ``eval()`` and ``train()``. Nothing has changed then.

    Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, Algorithm 1.

    >>> import torch
    >>> from pace_kernels import ScheduleFreeAdamW
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = ScheduleFreeAdamW(model.parameters(), warmup_steps=10)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> with optimizer.averaged():  # the weights to validate and to ship
    ...     loss = model(torch.ones(8, 4)).square().mean()
    """

    _OPERATOR = "schedule_free_step_"
    _STATE_TENSORS = every_name("exp_avg_sq", "z")
    _OWN_OPTION = "weight_lr_power"
    _MOVING = frozenset({"lr", *_COUNTED})
    _BOOKS = frozenset({*_COUNTED, "train_mode", "live_at"})
    _AVERAGE = "z"

    _turns: dict[int, tuple[Any, Any]]  # by id of a group: its schedule after the step that is taken, and c

    @spelled()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        state_bits: Literal[32, 16, 8] = 32,
        ema_bits: Literal[32, 24, 16, 8] | None = None,
        master_weight_bits: Literal[24, 32] | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: BackendName | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "foreach": foreach,
            "train_mode": True,
            **_COUNTED,
            "live_at": None,  # of a checkpoint: the k that its live weights belong to
            "state_bits": state_bits,
            "ema_bits": ema_bits,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "capturable": capturable,
            "skip_nonfinite": skip_nonfinite,
        }
        make_plain(defaults, defaults)
        self._check_options(defaults)
        check_torchs_options({"fused": fused, "differentiable": differentiable})
        self._step_supports_amp_scaling = bool(fused)
        super().__init__(params, defaults, backend)

    def _check_options(self, group: Group) -> None:
        check_common_options(group, SCHEDULE_FREE.options)
        self._check_formats(group)
        check_number("betas[0]", group["betas"][0], "in (0, 1): the average is computed with 1 / β1", lambda a: a > 0)
        check_number("warmup_steps", group["warmup_steps"], "finite and >= 0", lambda a: a >= 0)
        check_number("r", group["r"], "finite", math.isfinite)
        check_number("weight_lr_power", group["weight_lr_power"], "finite and >= 0", lambda a: a >= 0)
        require(isinstance(group["train_mode"], bool), "train_mode", "True or False", group["train_mode"])
        if not any(isinstance(group[name], Tensor) for name in _COUNTED):  # which would have to be waited for
            checked_count("k", group["k"], LAST_STEP)
            for name in ("weight_sum", "lr_max", "scheduled_lr"):
                check_number(name, group[name], "finite", math.isfinite)

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg_sq", "z")

    def _required_states(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg_sq", "z")

    def _initial(self, name: str, param: Tensor, group: Group, state: Any = NO_STATE) -> Tensor:
        return super()._initial("ema" if name == "z" else name, param, group, state)

    # ---- the step --------------------------------------------------------------------------------------------------

    def _launch_all(self, prepared: Prepared) -> None:
        works = [work for work, _ in prepared]
        found = next((work.scaling["found_inf"] for work in works if "found_inf" in work.scaling), None)
        self._turns = {id(group): self._turn(group, works, found) for group in self.param_groups}
        super()._launch_all(prepared)

    def _turn(self, group: Group, works: list[Work], found_inf: Tensor | None) -> tuple[Any, Any]:
        """A group's schedule after this step, and the share of the step in the average: numbers, or tensors where
        something that they follow from is on a device."""
        held = [group[name] for name in _COUNTED]
        lr = group["lr"]
        away = [t.device for t in (found_inf, lr, *held) if isinstance(t, Tensor) and not at_hand(t)]
        away += [work.device for work in works if work.group is group and work.on_device and work.device.type != "cpu"]
        if away:
            dtype = torch.float32 if away[0].type == "mps" else torch.float64  # MPS has no float64
            given = [lr, *held]
            numbers = [v for v in given if not isinstance(v, Tensor)]
            if by_graph(away[0]):
                sent = iter(data(numbers, dtype, away[0]))
            else:  # filled there: a copy from the host can't be captured
                sent = iter([torch.full((), v, dtype=dtype, device=away[0]) for v in numbers])
            lr, *held = (v.to(away[0], dtype).reshape(()) if isinstance(v, Tensor) else next(sent) for v in given)
        elif isinstance(lr, Tensor):
            lr = lr.item()
        turn, share = advanced(Schedule(*held), lr, group["warmup_steps"], group["r"], group["weight_lr_power"])
        if not away and not math.isfinite(turn.weight_sum):
            named = ", ".join(f"{name} {group[name]}" for name in ("r", "weight_lr_power", "lr"))
            raise ValueError(f"{named}: the weights of the steps add up beyond float64 at step {turn.k}")
        return turn, share

    def _option_numbers(self, group: Group) -> Group:
        record = self._record(group)
        if record.prepared is None:
            names = [name for name in ("eps", "weight_decay", "maximize", "stochastic_rounding") if name in group]
            record.prepared = dict(zip(("beta1", "beta2"), group["betas"], strict=True)) | {n: group[n] for n in names}
        return record.prepared  # type: ignore[no-any-return]

    def _launch(self, work: Work, states: dict[str, list[Tensor]]) -> Call:
        group, device = work.group, work.device
        turn, share = self._turns[id(group)]
        work.lr()  # raises where it has no value
        t, _, _, alpha = turn
        if isinstance(share, Tensor):
            now = {"lr": 0.0, "count": 1.0, "share": 0.0, "lr_tensor": moved(alpha, device)}
            schedule = moved(torch.stack([t, share]), device)
        else:
            now, schedule = {"lr": alpha, "count": float(t), "share": share}, None
        return partial(
            of_c(work.backend.op(self._OPERATOR)),
            work.params,
            work.grads,
            taken(states, "exp_avg_sq"),
            taken(states, "z"),
            states["step"],
            schedule,
            **beside(states),
            **{**self._option_numbers(group), "capturable": work.on_device, **now, **work.scaling},
        )

    def _scheduled(self, group: Group, names: Sequence[str]) -> dict[str, float] | None:
        return super()._scheduled(group, [name for name in names if name not in _COUNTED])

    def _takes_options(self, plan: Plan) -> bool:
        """With what the schedule makes of each group, which the step enters at once."""
        if not super()._takes_options(plan):
            return False
        groups, counted = [], []
        for kept in plan.options:
            try:
                turn, share = self._turn(kept.group, [], None)
            except (ArithmeticError, TypeError, ValueError):
                return False  # the usual step says why
            if isinstance(share, Tensor):
                return False
            plan.put(kept.group, {"lr": turn.scheduled_lr, "count": float(turn.k), "share": share})
            groups.append(kept.group)
            counted.append(dict(zip(_COUNTED, turn, strict=True)))
        plan.then = each(dict.update, groups, counted)
        return True

    def _afterwards(self, prepared: Prepared) -> list[Call]:
        if any(work.left_undone() for work, _ in prepared):
            return []
        found = next((work.scaling["found_inf"] for work, _ in prepared if "found_inf" in work.scaling), None)
        calls: list[Call] = []
        for group in self.param_groups:
            turn, _ = self._turns[id(group)]
            fresh = {}
            for name, value in zip(_COUNTED, turn, strict=True):
                held = group[name]
                if isinstance(value, Tensor) and found is not None:
                    value = torch.where(moved(found, value.device).reshape(()) != 0, held, value)
                if isinstance(value, Tensor) and isinstance(held, Tensor):
                    calls.append(partial(held.copy_, value))  # in place, as a captured graph does it again
                else:
                    fresh[name] = value
            calls.append(partial(dict.update, group, fresh))
        return calls

    @torch.no_grad()
    def get_step_stats(self) -> dict[str, float]:
        """``scheduled_lr`` (α_t) and ``share`` (c) of the first group at its last step, and ``average_distance_norm``,
        ‖x − y‖ over all parameters; empty before the first step. The call reads weights and z and waits for the device;
        with sharded parameters all ranks have to make it. Steps compute nothing for it."""
        entries, group = self._entries(self.param_groups), self.param_groups[0]
        if not entries:
            return {}
        rows = []
        for e in entries:
            y = weight_in(e.state.get("live", e.param), e.state)
            z = state_in("z", e.state, y)
            rows.append((((1.0 / e.group["betas"][0] - 1.0) * (z - y.to(z.dtype))).square().sum(), axes(e.param)))
        reduce_(rows)
        home = rows[0][0].device
        squares = torch.stack([moved(row, home) for row, _ in rows]).sum()
        weight = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        return {
            "scheduled_lr": float(group["scheduled_lr"]),
            "share": float(weight / group["weight_sum"]) if group["weight_sum"] > 0 else 0.0,
            "average_distance_norm": math.sqrt(squares),
        }

    # ---- the average, which is computed from y and z -----------------------------------------------------------------

    def _keeps_average(self, group: Group) -> bool:
        return True

    def _option(self, group: Group, name: str) -> Any:
        return True if name == "use_ema_eval" else super()._option(group, name)

    def _average_of(self, entry: Entry) -> Any:
        y = weight_in(entry.state["live"], entry.state)
        z = state_in("z", entry.state, y)
        beta1 = entry.group["betas"][0]
        to = local(entry.param)
        if y.dtype == z.dtype == to.dtype and y.device == z.device and not (is_wrapper(y) or by_graph(y.device)):
            return lambda out: schedule_free_average(y, z, beta1, out=out)  # without a third array of its size
        return schedule_free_average(y, z, beta1)

    def _holds_average(self, entry: Entry) -> bool:
        return bool(entry.group["swapped"])

    def _to_put_back(self, entries: list[Entry], loaded: set[int]) -> list[Entry]:
        """As in the package, what was loaded since ``eval()`` is taken for the average, and y follows from it; so it
        does, but for rounding, where the package saved the state, which it does in eval mode and without y."""
        swapped = [entry for entry in self._entries(self.param_groups) if entry.group["swapped"]]
        follow = [e for e in swapped if "live" not in e.state or id(e.param) in loaded]
        self._check_swap("train()", None, follow)
        lives = [empty_state(e.param, e.param.dtype) for e in follow]
        for e, live in zip(follow, lives, strict=True):
            z = state_in("z", e.state, weight_in(e.state.get("live", e.param), e.state))
            local(live).copy_(schedule_free_weights(local(e.param), z, e.group["betas"][0]))
        at_once([each(dict.__setitem__, [e.state for e in follow], repeat("live"), lives)])
        return swapped

    def _set_marks(self, entries: Any, copies: Any, groups: Any) -> None:
        super()._set_marks(entries, copies, groups)
        for group in groups:
            group["train_mode"] = copies is None

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _to_save(self, group: Group) -> Group:
        counted = {name: float(value) if isinstance(value := group[name], Tensor) else value for name in _COUNTED}
        k = int(counted["k"])
        here = {"k": k, "train_mode": not group["swapped"], "live_at": k if group["swapped"] else None}
        return super()._to_save(group) | counted | here

    def _translated(self, loaded: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        """The package has no step counts of parameters. It hands on what else was in a checkpoint of ours as it was:
        only train_mode tells the mode then, and live weights belong to their k."""
        states, groups = dict(loaded.get("state") or {}), []
        for saved in self._checked_structure(loaded):
            if self._OWN_OPTION in saved:
                here = [key for key in saved["params"] if states.get(key)]
                swapped = bool(here) and not saved["train_mode"]
                stale = {"live"} if not swapped or saved.get("live_at") != saved["k"] else set()
                for key in here:
                    kept = {name: value for name, value in states[key].items() if name not in stale}
                    if swapped and is_beside(kept) and "live" not in kept:
                        raise ValueError(
                            f"the state of parameter {key} was saved between eval() and train(), and the live weights, "
                            "beside which z lies, did not come along (distributed checkpoints drop them): call "
                            "optimizer.train() before saving"
                        )
                    states[key] = {"step": saved["k"], **kept}
                saved = {**saved, "swapped": swapped}
            groups.append(saved)
        return super()._translated({**loaded, "state": states, "param_groups": groups}, notes)

    def _merged(self, saved: Group, group: Group) -> Group:
        options = super()._merged(saved, group)
        return options | {"train_mode": not options["swapped"], "live_at": None}
