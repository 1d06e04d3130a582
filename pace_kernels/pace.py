"""PACE: AdamW + EMA of the weights + clipped pullback toward it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backend import BackendName
from .checks import Group, check_average_options, check_common_options, check_switch, check_torchs_options
from .definitions import DEFINITIONS
from .definitions.kit import average_weight
from .formats import beside, every_name, taken
from .host_average import HostAveraging, check_ema_device
from .launching import Prepared, of_c
from .ops import PACE_STATS
from .options import make_plain, spelled
from .plan import Plan
from .planning import NO_ROLES
from .sharding import Axes, gathered_rows, on_host
from .states import EMA_DEVICE, Work, is_away
from .torch_rules.pace import PaceOptions, merge_stats
from .whole import Call


class PACE(HostAveraging):
    """AdamW whose weights are pulled toward their own moving average, in one pass over memory.

    ::

        [formula: PACE]
          m   ← β1 m + (1 − β1) g                          first moment
          v   ← β2 v + (1 − β2) g²                         second moment
          D   = sqrt(v / (1 − β2^t)) + ε                   Adam's denominator
          x'  = x (1 − α λ_wd) − α (m / (1 − β1^t)) / D    AdamW
          w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
          Λ   = min(α c w_t / D, 1)                        pullback gain, clipped
          x₊  = x' + Λ (e − x)                             pulled toward the average e
          e₊  = e + w_t (x₊ − e)                           the average
        [end]

    ``t`` counts the steps of each parameter from 1; the average ``e`` starts at the weights. Evaluate, save and ship
    the average: training is steered for it.

    Arguments:
        params: parameters, named parameters, or groups of them: dense, of dtype float32, bfloat16, float16 or float64.
            States are float32 (float64 for float64 parameters), but for ``state_bits`` and ``ema_bits``.
        lr: α ≥ 0, a number or a tensor with one element.
        betas: (β1, β2), each in [0, 1). With β1 = 0 no first moment is kept; raised in mid-training, it starts at 0.
        eps: ε ≥ 2**-126, float32's smallest normal number.
        weight_decay: λ_wd ≥ 0, decoupled from the gradient.
        lambda_pullback: c ≥ 0, the strength of the pullback. 0 is AdamW, with an averaged copy if ``use_ema_eval``.
        clamp_pullback: whether Λ is clipped at 1.
        beta_ema: averaging weight in [0, 1] where ``ema_kappa`` is None.
        use_ema_eval: whether ``eval()`` and ``averaged()`` swap this group's average in. With False and
            ``lambda_pullback=0`` no average is kept.
        ema_kappa: κ ≥ 0, the decay of the averaging weight. None: w_t is 1 in the gain and ``beta_ema`` in the average.
        ema_rho: ρ ≥ 0, steps before the averaging weight starts to decay.
        ema_gamma: γ ≥ 0, how fast it decays.
        ema_update_freq: n ≥ 1: the average moves at every n-th step of a parameter; in between it pulls, but stays
            unchanged.
        log_stats: whether each step leaves the statistics of ``get_step_stats()``, computed in the same pass.
        ema_device: "cpu" keeps the average in host memory (docs/offload.md): 4 bytes per parameter less on a GPU. For
            ``lambda_pullback=0``, ``ema_bits=32``. The weights are copied every ``ema_update_freq`` steps. None: on the
            parameter's device.
        pullback_from: "weights" measures the pullback from the weights before the step, as above; "step" from the
            stepped ones: x₊ = x' + Λ (e − x').
        state_bits: bits per element of m and v: 32; 16, bfloat16; 8, codes with one power of two per 32 elements. Below
            32 they are rounded stochastically, with a dither computed from the data. Vectors, small tensors and odd
            shapes stay in float32: :meth:`memory` lists which, and why. This and the next two may be changed in
            training, as by ``optimizer.param_groups[0]["state_bits"] = 16``: the next step converts the states.
        ema_bits: bits per element of the average: None, as ``state_bits``; 32; 24; 16 or 8, which are relative to the
            weight: change weights between steps only within :meth:`editing_weights`.
        master_weight_bits: bits of bfloat16 parameters together with the state `remainder`: 32 trains them with the
            bits of float32 parameters; 24 rounds stochastically to 24 bits; None: no remainder. Float32 parameters in
            the group stay float32. The optimizer's checkpoint has the remainder: load it along with the model's.
            Weights that other code writes are off by at most half a bfloat16's place.
        stochastic_rounding: whether bfloat16 parameters without master weights are rounded stochastically.
        maximize: whether to maximize the objective.
        capturable: whether the step counts live on the parameters' device, for CUDA graphs. What changes between
            replays must be a tensor there too: lr, and the clip_coef of ``step()``.
        skip_nonfinite: whether a NaN or an infinity in a gradient skips the whole step, for all groups and on all ranks
            over which a DTensor is sharded; ``skipped_steps`` counts such steps. The check reads the gradients once
            more. By default non-finite values spread to the weights and states of their coordinates, as in
            ``torch.optim.AdamW``. Each rank of a ``ZeroRedundancyOptimizer`` checks only its own parameters.
        foreach, differentiable: as in ``torch.optim``. They change nothing here; ``differentiable=True`` is refused.
        fused: whether the step unscales the gradients in its pass, instead of ``torch.amp.GradScaler``. With False or
            None the scaler unscales them before the step, as code that clips gradients itself needs (Lightning's).
        backend: "cpu", "torch" or another name of ``backends()``, which works or raises; None takes the environment
            variable PACE_BACKEND, or else the fastest backend that is there.

    Raises:
        ValueError, TypeError: an argument is out of its range, or a parameter is sparse, complex, an integer, overlaps
            itself or a part of another, or is in two groups.
        RuntimeError: the backend asked for is not there; a gradient does not fit its parameter; ``step()`` while the
            average is swapped in. Nothing has changed then.

    Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 and 10, Algorithm 1.

    >>> import torch
    >>> from pace_kernels import PACE
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = PACE(model.parameters(), lr=3e-3)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> with optimizer.averaged():  # the weights to validate and to ship
    ...     loss = model(torch.ones(8, 4)).square().mean()
    """

    _OPERATOR = "pace_step_"
    _STATE_TENSORS = every_name("exp_avg", "exp_avg_sq", "ema")
    _OWN_OPTION = "log_stats"
    _ONLY_OPTIONS = ("log_stats", EMA_DEVICE)

    _step_stats: list[tuple[Tensor, Axes]]  # of the last step
    _new_stats: list[tuple[Tensor, Axes]]  # of the step that is being taken
    _said = False  # whether get_step_stats() said that it has nothing to tell

    @spelled()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lambda_pullback: float = 0.15,
        clamp_pullback: bool = True,
        beta_ema: float = 0.01,
        use_ema_eval: bool = True,
        ema_kappa: float | None = 0.2,
        ema_rho: float = 0.0,
        ema_gamma: float = 1.0,
        ema_update_freq: int = 1,
        log_stats: bool = False,
        *,
        pullback_from: Literal["weights", "step"] = "weights",
        ema_device: Literal["cpu"] | None = None,
        state_bits: Literal[32, 16, 8] = 32,
        ema_bits: Literal[32, 24, 16, 8] | None = None,
        master_weight_bits: Literal[24, 32] | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: BackendName | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lambda_pullback": lambda_pullback,
            "clamp_pullback": clamp_pullback,
            "beta_ema": beta_ema,
            "use_ema_eval": use_ema_eval,
            "ema_kappa": ema_kappa,
            "ema_rho": ema_rho,
            "ema_gamma": ema_gamma,
            "ema_update_freq": ema_update_freq,
            "log_stats": log_stats,
            "pullback_from": pullback_from,
            EMA_DEVICE: ema_device,
            "state_bits": state_bits,
            "ema_bits": ema_bits,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "capturable": capturable,
            "skip_nonfinite": skip_nonfinite,
        }
        self._step_stats = []
        make_plain(defaults, defaults)
        self._check_options(defaults)
        check_torchs_options({"foreach": foreach, "fused": fused, "differentiable": differentiable})
        self._step_supports_amp_scaling = bool(fused)
        super().__init__(params, defaults, backend)

    def _check_options(self, group: Group) -> None:
        check_common_options(group, DEFINITIONS[self._OPERATOR].options)
        check_average_options(group)
        check_switch("log_stats", group["log_stats"])
        check_ema_device(group)
        self._check_formats(group)

    def _merged(self, saved: Group, group: Group) -> Group:
        # Of MADA: other rules than AdamW's have states of other names, but for Yogi's, which c mixes in.
        if saved.get("c", 1.0) != 1.0:
            raise ValueError(f"c is {saved['c']!r} in a checkpoint of MADA: PACE is AdamW, where it is 1.0")
        return super()._merged(saved, group)

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        moment = ("exp_avg",) if group["betas"][0] != 0.0 else ()
        average = ("ema",) if group["lambda_pullback"] > 0.0 or group["use_ema_eval"] else ()
        return (*moment, "exp_avg_sq", *average)

    def _options(self, group: Group) -> dict[str, Any]:
        """The operator's options. They are the group's, but for a few names."""
        beta1, beta2 = group["betas"]
        shared = PaceOptions.__dataclass_fields__.keys() & group.keys()
        return {k: group[k] for k in shared} | {
            "beta1": beta1,
            "beta2": beta2,
            "pullback_from_step": group["pullback_from"] == "step",
            "stochastic_rounding": group.get("stochastic_rounding", False),
        }

    def _launch_all(self, prepared: Prepared) -> None:
        self._new_stats = []
        super()._launch_all(prepared)
        self._step_stats = self._new_stats

    def _option_numbers(self, group: Group) -> Group:
        record = self._record(group)
        if record.prepared is None:
            record.prepared = self._options(group)
        return record.prepared  # type: ignore[no-any-return]

    def _planned(self, works: list[Work], mask: tuple[bool, ...], roles: Mapping[str, str] = NO_ROLES) -> Plan:
        self._new_stats = []
        plan = super()._planned(works, mask, roles)
        plan.left = self._new_stats
        return plan

    def _taken_by(self, plan: Plan) -> None:
        super()._taken_by(plan)
        self._step_stats = plan.left

    def _launch(self, work: Work, states: dict[str, list[Tensor]]) -> Call:
        group, device = work.group, work.device
        options = {**self._option_numbers(group), "capturable": work.on_device, **work.lr(), **work.scaling}
        stats = None
        if group["log_stats"]:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            stats = torch.empty(len(PACE_STATS), dtype=dtype, device=device)
            self._new_stats.append((stats, work.axes))
        if is_away(group):  # a plan's states have it
            states = {name: column for name, column in states.items() if name != "ema"}
        return partial(
            of_c(work.backend.op(self._OPERATOR)),
            work.params,
            work.grads,
            *(taken(states, name) for name in ("exp_avg", "exp_avg_sq", "ema")),
            states["step"],
            stats,
            **beside(states),
            **options,
        )

    def get_step_stats(self) -> dict[str, float]:
        """Statistics of the last step, over all groups with ``log_stats``; empty before the first step and, with a
        warning once, where no group has ``log_stats``.

        ``raw_lambda_{mean,max,min}``: the gain before α c, w_t / D. ``effective_lambda_*``: α c w_t / D. ``lambda_*``:
        Λ, after the clamp. ``lambda_clipped_frac``: the share of coordinates where α c w_t / D ≥ 1. ``adam_step_norm``,
        ``pullback_norm``, ``update_norm``: 2-norms of x' − x, of the pullback, and of x₊ − x before it is rounded to
        the parameter's dtype. The statistics stay on the device until this call, which waits for it. For sharded
        parameters they cover all shards: all ranks have to make the call.
        """
        if not self._step_stats:
            if not self._said and not any(group["log_stats"] for group in self.param_groups):
                self._said = True
                warnings.warn("get_step_stats() is empty: no group has log_stats=True", stacklevel=2)
            return {}
        rows = [row for stats, over in self._step_stats for row in gathered_rows(stats, over)]
        values = merge_stats(on_host(rows)).tolist()
        s = dict(zip(PACE_STATS, values, strict=True))
        count = s["count"]
        if count == 0:
            return {}
        stats = {}
        for key, name in (("raw", "raw_lambda"), ("effective", "effective_lambda"), ("lambda", "lambda")):
            stats[f"{name}_mean"] = s[f"{key}_sum"] / count
            stats[f"{name}_max"] = s[f"{key}_max"]
            stats[f"{name}_min"] = s[f"{key}_min"]
        stats["lambda_clipped_frac"] = s["clipped"] / count
        for key, name in (("adam", "adam_step"), ("pullback", "pullback"), ("update", "update")):
            stats[f"{name}_norm"] = math.sqrt(s[f"{key}_sq"])
        return stats

    def get_ema_beta_t(self) -> float | None:
        """The averaging weight w_t at the last step of the first group that keeps an average; None where none does.

        A group's t is that of its most advanced parameter, and 0 before the first step.
        """
        for group in self.param_groups:
            if self._keeps_average(group):
                steps = [float(self.state[p]["step"]) for p in group["params"] if "step" in self.state.get(p, {})]
                options = PaceOptions(**self._options(group))
                return float(average_weight(options, max(steps, default=0.0)))
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._step_stats = []
