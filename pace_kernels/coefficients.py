"""MADA's learned coefficients: where they live, how they are shared, how they move, how learning stops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .backend import choose
from .checks import Group
from .compressing import Compressing
from .conversions import encoded, state_in
from .formats import formats_in, has, names_of, parts_of
from .launching import States, of_c
from .mada_options import (
    LEARNED,
    LEARNING,
    REDONE_BY,
    Prepared,
    check_learned,
    check_sharing,
    expanded,
    fixed,
    learn_options,
    state_tensors,
    step_options,
)
from .memory import check_whole
from .ops import COEFFICIENTS, DONE, HYPERGRADIENTS, NO_GRADIENT, REDO
from .sharding import all_reduce_, is_sharded, local, reduce_
from .states import Work, moved
from .torch_rules.common import by_graph, has_values
from .torch_rules.mada import MadaMoments, caught_up
from .torch_rules.mada_scalars import MadaOptions
from .whole import Call, at_once

# Of each set of coefficients that took part in a step: a group that has it, the step's scaling, rows of sums.
Sets: TypeAlias = dict[int, tuple[Group, dict[str, Tensor], list[Tensor]]]


def _in_float32(a: Tensor) -> Tensor:
    return a.float() if a.dtype == torch.bfloat16 else a


class Coefficients(Compressing):
    """An optimizer whose groups learn coefficients while they train. Not for direct use."""

    # Of a step: the group, its sums, and the work they are of.
    _sums: list[tuple[Group, Tensor, Work]]
    _hyper_process_group: Any

    def _fresh(self, group: Group) -> dict[str, Tensor | None]:
        """Coefficients at the start of learning."""
        if not group["learn"]:
            return dict.fromkeys(LEARNED)
        device = self._home(group)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        start = torch.tensor([fixed(group, name) for name in COEFFICIENTS], dtype=dtype, device=device)
        zeros = (torch.zeros_like(start), torch.zeros_like(start), start.new_zeros(()))
        return dict(zip(LEARNED, (start, *zeros), strict=True))

    def _home(self, group: Group) -> torch.device:
        return group["params"][0].device if group.get("params") else torch.device("cpu")

    def _share(self) -> None:
        """Puts the coefficients on their device; if they are global, all groups get the same tensors."""
        source = self.param_groups[0]
        for group in self.param_groups:
            source = group if group["coefficients"] == "group" else source
            home = self._home(source)
            for name in LEARNED:
                value = source.get(name)
                group[name] = value.to(home) if isinstance(value, Tensor) else None
                source[name] = group[name]

    @property
    def coefficients(self) -> dict[str, float] | list[dict[str, float]]:
        """The six coefficients, name → value, as the next step uses them; with coefficients="group" a list of dicts.

        Coefficients that are not learned are the first group's. Reading waits for the device.
        """
        return self._by_group(self._group_coefficients)

    @property
    def hypergradients(self) -> dict[str, float] | list[dict[str, float]]:
        """The hypergradients of the last step, before the clip: name → value for each learned coefficient.

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
        values = {name: fixed(group, name) for name in COEFFICIENTS}
        if group["learn"]:
            learned = dict(zip(COEFFICIENTS, group["coefficient_values"].tolist(), strict=True))
            values |= {name: learned[name] for name in group["learn"]}
        return values

    def get_step_stats(self) -> dict[str, float]:
        """The learned coefficients by name, and their hypergradients of the last step as ``hypergradient_beta1``, in
        one dict for a logger. With coefficients="group" names end in the group's number: ``beta1_0``. Empty if nothing
        is learned. Reading waits for the device."""
        stats = {}
        by_group = self.param_groups[0]["coefficients"] == "group"
        for number, group in enumerate(self.param_groups if by_group else self.param_groups[:1]):
            end = f"_{number}" if by_group else ""
            if not group["learn"]:
                continue
            pair = torch.stack([group["coefficient_values"], group["hypergradients"]]).tolist()
            for name, value, slope in zip(COEFFICIENTS, *pair, strict=True):
                if name in group["learn"]:
                    stats[f"{name}{end}"], stats[f"hypergradient_{name}{end}"] = value, slope
        return stats

    @torch.no_grad()
    def freeze(self) -> None:
        """Stops learning: the learned values become fixed options (MADA-FS), and states only for learning are dropped.

        From here on, training keeps the coefficients at their present values.
        """
        self._plans.end()
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
            group.update(fixed, frozen=frozen, **dict.fromkeys(LEARNED))
            self._record(group).prepared = self._prepare(group)
            self._drop_unused(group)
        self._default_to_frozen()

    def _default_to_frozen(self) -> None:
        """Groups that are added once the shared coefficients are frozen start with them frozen, at the same values."""
        first = self.param_groups[0]
        if first["coefficients"] == "global" and first["frozen"] is not None:
            given = zip(COEFFICIENTS, first["frozen"], strict=True)
            values = {name: fixed(self.defaults, name) if value is None else value for name, value in given}
            self.defaults.update({"betas": (values.pop("beta1"), values.pop("beta2")), **values, "learn": ()})

    def _catch_up(self, group: Group, param: Tensor) -> None:
        """Brings moments that are one step behind up to date by redoing the last step."""
        state = self.state[param]
        if "last_scalars" not in state:
            return
        # As it is where it was saved and loaded before.
        formats = self._asked_of(group, param)
        state.update(self._fitted(param, state, "last_grad", not is_sharded(param), formats))
        options = self._arguments(group).step  # those of the step to redo, whatever has been changed since
        second = "max_exp_avg_sq" if options["second_max"] else "mean_exp_avg_sq"
        names = ("exp_avg", "exp_avg_diff", "exp_avg_sq", second, "exp_avg_lion")
        check_whole(local(state[part]) for name in names for part in parts_of(name) if part in state)
        kept = MadaMoments(*(state_in(name, state, local(param)) if has(state, name) else None for name in names))
        o = MadaOptions(**options)
        if not has_values(state["last_scalars"]):
            return
        last = state["last_scalars"].tolist()
        if last[0] != REDO:
            return
        here = [local(state[name]) for name in ("last_grad", "older_grad") if name in state]
        check_whole(here)
        last_g, older = [*map(_in_float32, here), None][:2]
        assert last_g is not None
        after = caught_up(o, state["step"].item(), last, last_g, older, kept)
        lies = formats_in(state)._replace(weight=0)
        for name, value in zip(names, after, strict=True):
            if value is None or not has(state, name):
                continue
            if name in state:  # plain, or in bfloat16
                local(state[name]).copy_(value)
                continue
            for part, coded in zip(names_of(lies, [name]), encoded(name, value, local(param), lies), strict=True):
                local(state[part]).copy_(coded.view(local(state[part]).shape))
        state["last_scalars"][0] = DONE

    def _by_name(self, group: Group) -> None:
        """Brings hyper options that were replaced since the last step to the form in which they are kept."""
        kept = self._arguments(group).learning
        if any(group[name] is not kept[name] for name in LEARNING):
            if isinstance(group["learn"], str) or tuple(group["learn"]) != kept["learn"]:
                raise ValueError(f"learn may not be changed from {kept['learn']}: use freeze() to stop learning")
            group.update(expanded({name: group[name] for name in LEARNING}, kept))

    def _check_changed(self, group: Group) -> None:
        self._by_name(group)
        super()._check_changed(group)

    def _settle(self, groups: list[Group]) -> None:
        """Brings moments that are one step behind up to date if redoing the step with the new options would differ; the
        next step then learns nothing."""
        check_sharing(self.param_groups, start=False)
        for group in groups:
            check_learned(group)
        prepared = [self._prepare(group) for group in groups]
        for group, new in zip(groups, prepared, strict=True):
            old = self._arguments(group)
            same = old.states == new.states and all(old.step[name] == new.step[name] for name in REDONE_BY)
            for param in group["params"]:
                state = self.state.get(param, {})
                if same or not state:
                    continue
                self._catch_up(group, param)
                if "exp_avg_diff" in new.states and not has(state, "exp_avg_diff") and "last_scalars" in state:
                    state["last_scalars"][0] = NO_GRADIENT  # no difference of gradients at the first step with β3
        self._share()  # copies of groups may hold copies of what they share
        for group, new in zip(groups, prepared, strict=True):
            self._drop_unused(group)
            self._record(group).prepared = new

    def _prepare(self, group: Group) -> Prepared:
        learning = {name: group[name] for name in LEARNING}
        return Prepared(step_options(group), learn_options(group), state_tensors(group), learning)

    def _arguments(self, group: Group) -> Prepared:
        """What the group's options came to when they were last checked; lr aside."""
        record = self._record(group)
        if record.prepared is None:
            record.prepared = self._prepare(group)
        return record.prepared  # type: ignore[no-any-return]

    def _call(self, work: Work, states: States, sums: Tensor | None, others: dict[str, Any]) -> Call:
        """The operator's call, with options that are ``others`` than the group's."""
        raise NotImplementedError

    def _new_sums(self, work: Work) -> Tensor:
        """Where the work's hypergradients go, and the learning rate."""
        sums = torch.empty(len(HYPERGRADIENTS), dtype=work.group["coefficient_values"].dtype, device=work.device)
        self._sums.append((work.group, sums, work))
        return sums

    def _learn_first(self, prepared: list[tuple[Work, States]]) -> None:
        """The first of two passes, for hyper_order="published": by the operator itself with a learning rate of 0, which
        leaves weights and averages as they are. It brings moments up to date, so that the second pass redoes nothing,
        and sums the hypergradients, by which the coefficients move then."""
        if not prepared and self._ranks() is None:
            return
        for work, _ in prepared:
            if by_graph(work.device):
                raise RuntimeError(f'hyper_order="published" is not for parameters on {work.device}')
        at_rest = {"lr": 0.0, "lr_tensor": None, "weight_decay": 0.0, "ema_update_freq": 1 << 31}
        calls = []
        for work, states in prepared:
            copies = {name: [t.clone() for t in states[name]] for name in ("step", "last_scalars")}
            calls.append(self._call(work, states | copies, self._new_sums(work), at_rest))
        self._check_operands(prepared, calls)
        with self._under_way([t for _, states in prepared for column in states.values() for t in column]):
            for (work, states), call, (_, sums, _) in zip(prepared, calls, self._sums, strict=True):
                call()
                lr = work.group["lr"]
                sums[-1:].copy_(moved(lr, work.device) if isinstance(lr, Tensor) else torch.tensor(lr))  # as of a step
                skipped = moved(work.scaling["found_inf"], work.device) if "found_inf" in work.scaling else None
                for row in states["last_scalars"]:
                    done = row[:1].clamp(max=DONE)
                    row[:1].copy_(done if skipped is None else done.where(skipped == 0, row[:1]))
            at_once(self._learning())
        self._sums = []

    def _learning(self) -> list[Call]:
        """The calls that move the coefficients after a step, one for each set that took part in it."""
        if self._ranks() is not None or any(work.axes for *_, work in self._sums):
            return [self._learn_together]
        return self._learn(self._by_set())

    def _by_set(self) -> Sets:
        by_set: Sets = {}
        for group, sums, work in self._sums:
            by_set.setdefault(id(group["coefficient_values"]), (group, work.scaling, []))[2].append(sums)
        return by_set

    def _learn_together(self) -> None:
        """The same over several ranks, which first add up their sums."""
        reduce_((sums, work.axes) for _, sums, work in self._sums)
        by_set = self._by_set()
        at_once(self._learn(by_set if self._ranks() is None else self._over_process_group(by_set)))

    def _learn(self, by_set: Sets) -> list[Call]:
        calls: list[Call] = []
        for group, scaling, rows in by_set.values():
            device = group["coefficient_values"].device
            here = [row if row.device == device else torch.empty_like(row, device=device) for row in rows]
            calls += [partial(to.copy_, row) for to, row in zip(here, rows, strict=True) if to is not row]
            found_inf = moved(scaling["found_inf"], device) if "found_inf" in scaling else None
            learn = of_c(choose(self._backend_name, device, torch.float32).op("mada_learn_"))
            learned = (group[name] for name in LEARNED)
            calls.append(partial(learn, *learned, here, found_inf, **self._arguments(group).learn))
        return calls

    def _ranks(self) -> Any:
        return torch.distributed.group.WORLD if self._hyper_process_group == "world" else self._hyper_process_group

    def _over_process_group(self, by_set: Sets) -> Sets:
        """One row for each set of coefficients, summed over the process group. A rank whose parameters took no part
        still has to join: the others wait for it."""
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
