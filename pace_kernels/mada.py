"""MADA: a parameterized optimizer that learns which optimizer to be, in one pass over memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backend import BackendName
from .checks import Group, check_torchs_options, require
from .conversions import state_in
from .fitting import NO_STATE
from .formats import OPTIONS, beside, every_name, parts_of, taken
from .launching import Prepared, of_c
from .mada_options import (
    LEARNED,
    LEARNING,
    MADA_ONLY,
    PRESETS,
    Coefficient,
    Preset,
    check_mada_options,
    check_sharing,
    check_start,
    expanded,
    fixed,
    learns_first,
    state_tensors,
)
from .mada_plans import MadaPlans
from .memory import check_whole
from .ops import COEFFICIENTS, LAST_SCALARS, NO_GRADIENT
from .options import make_plain, spelled
from .sharding import local
from .states import Work, as_state, empty_state, moved
from .torch_rules.common import by_graph
from .whole import Call, each


class MADA(MadaPlans):
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
    (csrc/rules/mada.h has the six of them). They are exact and cost one saved tensor, or two if β3 is in play. If h is
    not finite, as after a non-finite gradient, ``hypergradients`` shows it and q stays unchanged. Options may change
    during training, but ``learn`` only by :meth:`freeze`; if the states in play change, the next step learns nothing.

    Arguments:
        params: parameters, named parameters, or groups of them: dense, of dtype float32, bfloat16, float16 or float64.
            States are float32 (float64 for float64 parameters), but for ``state_bits`` and ``ema_bits``.
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
        learn: the coefficients to learn, of beta1, beta2, beta3, rho, c, gamma; they start at the options above. The
            others stay at theirs. Empty: a plain optimizer, which keeps no gradient for learning.
        hyper_lr: ≥ 0, for all learned coefficients or by name. Default 5e-4 for beta1 and beta2, 0.1 for the others.
        hyper_momentum: μ in [0, 1), for all or by name.
        hyper_clip: each hypergradient is clipped to ± this, > 0; may be infinite.
        hyper_warmup: number of first steps in which no coefficient moves.
        hyper_order: "algorithm": weights move first, by the coefficients before; as in the paper's Algorithm 1, in one
            pass. "published": coefficients move first, as in the authors' code, and the weights by the new ones. The
            whole sum over this step's gradient comes first then, so that a step takes two passes, and no plan. It
            needs ``state_bits=32`` and ``capturable=False``, and the same value in all groups.
        bounds: by name, (low, high). Default beta1 (0.01, 0.99), beta2 (0.501, 0.999), beta3 (0, 0.99), others (0, 1).
        coefficients: "global", one set of learned coefficients for all parameters, or "group", one for each group.
        lambda_pullback: c ≥ 0 of :class:`PACE`: pulls toward an average of the weights, by the D = sqrt(V) + ε of MADA.
            The gain is a constant for the hypergradients.
        clamp_pullback, beta_ema, ema_kappa, ema_rho, ema_gamma, ema_update_freq, pullback_from: as in :class:`PACE`.
        state_bits: as in :class:`PACE`, of all moments. Below 32, ṽ lies in bfloat16, and so do the gradients that are
            kept of bfloat16 parameters.
            A NaN in a gradient makes the weight NaN, but in lion, whose sign of it is 0: with 32 and 16 bits that
            weight then moves by decay alone; with 8 its moment takes the largest code of its block, by which it
            moves on.
        ema_bits, master_weight_bits, stochastic_rounding: as in :class:`PACE`.
        use_ema_eval: whether ``eval()`` and ``averaged()`` swap this group's average in; keeps an average.
        maximize: whether to maximize the objective.
        capturable: whether the step counts live on the parameters' device, for CUDA graphs. What changes between
            replays must be a tensor there too: lr, and the clip_coef of ``step()``.
        skip_nonfinite: whether a NaN or an infinity in a gradient leaves the whole step undone, of all groups, and on
            all ranks that a DTensor is sharded over; ``skipped_steps`` counts them. That reads the gradients once more.
            By default non-finite values spread to the weights and states of their coordinates, as in
            ``torch.optim.AdamW``, except that squares are capped at float32's largest number: an infinite gradient
            makes its weight ±Inf, not NaN, and a gradient of 1e30 moves it far, whereas AdamW's weight stays. With
            ``hyper_process_group`` all its ranks skip the step.
        hyper_process_group: "world" or a ``torch.distributed.ProcessGroup``, whose ranks hold different parameters as
            plain tensors: hypergradients are summed over it, so that all ranks learn the same coefficients.
            ``ZeroRedundancyOptimizer`` needs "world": its checkpoints carry all arguments, and no file holds a group.
            DTensors need none: their hypergradients are summed over the mesh axes over which they are sharded, in one
                all-reduce of a few numbers per step, or one per such axis.
        foreach, differentiable, fused: as in :class:`PACE`: the first two change nothing; ``fused`` says whether the
            step unscales gradients instead of the gradient scaler.
        backend: "cpu", "torch" or another name of ``backends()``, which works or raises; None takes the environment
            variable PACE_BACKEND, or else the fastest backend that is there.

    Raises:
        ValueError, TypeError: an argument is out of its range, hyper options come with nothing to learn, or a parameter
            is sparse, complex, an integer, overlaps itself or a part of another, or is in two groups.
        RuntimeError: the backend asked for is not there; a gradient does not fit its parameter; ``step()`` while the
            average is swapped in. Nothing has changed then.

    Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through Hyper-Gradient Descent", ICML 2024 (PMLR 235).

    >>> import torch
    >>> from pace_kernels import MADA
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = MADA(model.parameters(), lr=3e-3, learn=("beta1", "rho"))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 4)).square().mean().backward()
    ...     optimizer.step()
    >>> sorted(optimizer.hypergradients)
    ['beta1', 'rho']
    """

    _OPERATOR = "mada_step_"
    _STATE_TENSORS = every_name(
        *("exp_avg", "exp_avg_sq", "exp_avg_diff", "mean_exp_avg_sq", "max_exp_avg_sq", "exp_avg_lion"),
        *("last_grad", "older_grad", "ema"),
    )
    _STATE_ROWS = {"last_scalars": len(LAST_SCALARS)}  # noqa: RUF012
    _OWN_OPTION = "learn"
    _ONLY_OPTIONS = MADA_ONLY
    _UNSAID = {**OPTIONS, "hyper_order": "algorithm"}  # noqa: RUF012
    _BOOKS = frozenset({*LEARNED, "last_options", "frozen"})

    _built = True  # whether all groups of the constructor are there

    @spelled()
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
        second_moment: Literal["mean", "max"] = "mean",
        learn: Sequence[Coefficient] | AbstractSet[Coefficient] = COEFFICIENTS,  # type: ignore[assignment]
        hyper_lr: float | Mapping[Coefficient, float] | None = None,
        hyper_momentum: float | Mapping[Coefficient, float] = 0.0,
        hyper_clip: float = 10.0,
        hyper_warmup: int = 50,
        hyper_order: Literal["algorithm", "published"] = "algorithm",
        bounds: Mapping[Coefficient, tuple[float, float]] | None = None,
        coefficients: Literal["global", "group"] = "global",
        lambda_pullback: float = 0.0,
        clamp_pullback: bool = True,
        beta_ema: float = 0.01,
        use_ema_eval: bool = False,
        ema_kappa: float | None = 0.2,
        ema_rho: float = 0.0,
        ema_gamma: float = 1.0,
        ema_update_freq: int = 1,
        pullback_from: Literal["weights", "step"] = "weights",
        state_bits: Literal[32, 16, 8] = 32,
        ema_bits: Literal[32, 24, 16, 8] | None = None,
        master_weight_bits: Literal[24, 32] | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        hyper_process_group: Any = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        backend: BackendName | None = None,
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
            "hyper_order": hyper_order,
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
            "state_bits": state_bits,
            "ema_bits": ema_bits,
            "master_weight_bits": master_weight_bits,
            "stochastic_rounding": stochastic_rounding,
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
        defaults = expanded(defaults, {})
        make_plain(defaults, defaults)
        self._check_options(defaults)
        check_torchs_options({"foreach": foreach, "fused": fused, "differentiable": differentiable})
        self._step_supports_amp_scaling = bool(fused)
        check_start(defaults)
        self._built = False
        super().__init__(params, defaults, backend)
        self._built = True

    @classmethod
    def preset(cls, name: Preset, params: ParamsT, **options: Any) -> MADA:
        """MADA as one of the optimizers that it contains, with no more memory than that one.

        ``options`` override those of the preset: the rule's published coefficients, with AdamW's decoupled weight
        decay, ``x (1 − α λ_wd)``, and values of lr and weight_decay that may differ from the public code (there Lion
        and Adan have no weight decay by default, and Yogi has lr 1e-2). The presets, and how the published optimizers
        differ:

        - "adamw": ``torch.optim.AdamW``. No difference.
        - "amsgrad": ``torch.optim.AdamW(amsgrad=True)``. No difference from it; the paper's corrects no bias and has no
          weight decay.
        - "avgrad": MADA's section 4.1, with weight decay.
        - "adan": β1, β3, β2 here are the decays β1, β2, β3 of its public code. That code also corrects the bias of n,
          and divides by ``1 + α λ_wd`` instead.
        - "yogi": the paper's starts v̄ at the squared gradient of a first batch and corrects no bias; this starts at 0,
          as Adam does.
        - "lion": no difference. It has no second moment, so AdamW can't go on from its :meth:`float_state_dict`.
        - "hyperadam": AdamW that learns beta1 and beta2. The published one differentiates by an autograd graph, which
          gives the same numbers, and starts from other hyper learning rates.

        >>> import torch
        >>> from pace_kernels import MADA
        >>> optimizer = MADA.preset("lion", [torch.nn.Parameter(torch.ones(3))], weight_decay=0.1)
        """
        require(name in PRESETS, "name", f"one of {', '.join(PRESETS)}", name)
        plain: dict[str, Any] = {"beta3": 0.0, "rho": 1.0, "c": 1.0, "gamma": 1.0, "learn": ()}
        return cls(params, **(plain | PRESETS[name] | options))

    # ---- options and groups ----------------------------------------------------------------------------------------

    def _check_options(self, group: Group) -> None:
        check_mada_options(group)
        self._check_formats(group)

    def _completed(self, param_group: Group) -> Group:
        first = self.param_groups[0] if self.param_groups else self.defaults
        base = dict(self.defaults)
        for group in self.param_groups:
            self._by_name(group)
        if self._built and first["coefficients"] == param_group.get("coefficients", "global") == "global":
            base |= {name: first[name] for name in LEARNING}
            base["betas"] = tuple(
                fixed(first if name in first["learn"] else self.defaults, name) for name in ("beta1", "beta2")
            )
            base |= {name: first[name] for name in COEFFICIENTS[2:] if name in first["learn"]}
        return {**base, **expanded(param_group, base)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, with options of its own; also in the middle of training. See ``torch.optim.Optimizer``.

        With coefficients="global" it shares what the other groups learn, and how; it may not ask for something else.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_start(group)
            check_sharing(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        group.update(self._fresh(group), last_options=None, frozen=None)
        self._share()
        self._record(group).prepared = self._prepare(group)

    # ---- state -----------------------------------------------------------------------------------------------------

    def _state_tensors(self, group: Group) -> tuple[str, ...]:
        return state_tensors(group)

    def _initial(self, name: str, param: Tensor, group: Group, state: Mapping[str, Tensor] = NO_STATE) -> Tensor:
        if name == "last_scalars":
            dtype = torch.float32 if param.device.type == "mps" else torch.float64
            row = torch.zeros(len(LAST_SCALARS), dtype=dtype, device=param.device)
            row[0] = NO_GRADIENT
            return row
        if name in ("mean_exp_avg_sq", "max_exp_avg_sq"):
            # v̄ itself, which is 0 but in a checkpoint of Adam: as if it had been that all along.
            parts = [state[part] for part in parts_of("exp_avg_sq") if part in state]
            check_whole(map(local, parts))
            if "exp_avg_sq" in state:
                return as_state(param, state["exp_avg_sq"])
            new = empty_state(param)
            local(new).copy_(state_in("exp_avg_sq", state, param))
            return new
        return super()._initial(name, param, group, state)

    # ---- the step --------------------------------------------------------------------------------------------------

    def _launch_all(self, prepared: Prepared) -> None:
        self._sums = []
        try:
            if any(map(learns_first, self.param_groups)):
                self._learn_first([(work, states) for work, states in prepared if work.group["learn"]])
            super()._launch_all(prepared)
        finally:
            self._sums = []

    def _option_numbers(self, group: Group) -> Group:
        return self._arguments(group).step

    def _scheduled(self, group: Group, names: Sequence[str]) -> dict[str, float] | None:
        return super()._scheduled(group, names) if set(names).isdisjoint(LEARNED) else None

    def _launch(self, work: Work, states: dict[str, list[Tensor]]) -> Call:
        learns_now = work.group["learn"] and not learns_first(work.group)
        return self._call(work, states, self._new_sums(work) if learns_now else None, {})

    def _call(self, work: Work, states: dict[str, list[Tensor]], sums: Tensor | None, others: dict[str, Any]) -> Call:
        group = work.group
        options = {**self._arguments(group).step, "capturable": work.on_device, **work.lr(), **work.scaling, **others}
        return partial(
            of_c(work.backend.op(self._OPERATOR)),
            work.params,
            work.grads,
            *(taken(states, name) for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff")),
            taken(states, "mean_exp_avg_sq", "max_exp_avg_sq"),
            *(taken(states, name) for name in ("exp_avg_lion", "last_grad", "older_grad", "last_scalars", "ema")),
            states["step"],
            moved(group["coefficient_values"], work.device) if group["learn"] else None,
            sums,
            **beside(states),
            **options,
        )

    def _afterwards(self, prepared: Prepared) -> list[Call]:
        turned: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for work, states in prepared:
            if not states.get("older_grad") or work.on_device or by_graph(work.device) or work.left_undone():
                continue
            for i, record in enumerate(work.records):
                now = {**record, **work.changes[i]} if i in work.changes else record
                turned.append((record, {"last_grad": now["older_grad"], "older_grad": now["last_grad"]}))
        changed = [each(dict.update, *zip(*turned, strict=True))] if turned else []
        return changed if any(map(learns_first, self.param_groups)) else [*changed, *self._learning()]
