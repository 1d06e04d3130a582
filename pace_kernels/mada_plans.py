"""The plans of MADA's steps: what is learned after each, and gradients that change places."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .mada_checkpoints import MadaCheckpoints
from .mada_options import LEARNED, learns_first
from .plan import Plan
from .planning import NO_ROLES
from .states import Work


class MadaPlans(MadaCheckpoints):
    """MADA, whose next step may take up what the last one was made of. Not for direct use."""

    def _can_plan(self, works: list[Work]) -> bool:
        learns = any(work.group["learn"] for work in works)
        if any(learns_first(work.group) for work in works):
            return False  # two passes
        if learns and (self._ranks() is not None or any(work.axes for work in works)):
            return False  # ranks add up what they learn from
        if any(w.group["learn"] and w.group["coefficient_values"].device != w.device for w in works):
            return False  # each step makes a copy
        return super()._can_plan(works)

    def _planned(self, works: list[Work], mask: tuple[bool, ...], roles: Mapping[str, str] = NO_ROLES) -> Plan:
        """Where gradients change places, two plans, each of them followed by the other."""
        plan = self._learning_plan(works, mask, roles)
        turned = [] if works[0].on_device else [r for part in plan.parts for r in part.dicts if "older_grad" in r]
        if turned:
            other = self._learning_plan(works, mask, {"last_grad": "older_grad", "older_grad": "last_grad"})
            names = ["last_grad", "older_grad"]
            there, back = ([record[name] for record in turned for name in order] for order in (names[::-1], names))
            plan.then = partial(plan.held.put, turned, names, there)
            other.then = partial(plan.held.put, turned, names, back)
            plan.after = other
        return plan

    def _learning_plan(self, works: list[Work], mask: tuple[bool, ...], roles: Mapping[str, str]) -> Plan:
        self._sums = []
        try:
            plan = super()._planned(works, mask, roles)
        finally:
            self._sums = []
        sets: dict[int, list[int]] = {}
        for k, work in enumerate(works):
            if work.group["learn"]:
                sets.setdefault(id(work.group["coefficient_values"]), []).append(k)
        for parts in sets.values():
            group = works[parts[0]].group
            plan.learn([group[name] for name in LEARNED], parts, self._arguments(group).learn)
        return plan
