"""What a checkpoint has beside torch's states and options, so that one that fits nowhere, or lost a part of it on its
way, is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .averaging import Averaging
from .checks import Group
from .conversions import in_floats, with_hash
from .formats import CODED, HASH, OPTIONS, REMAINDER, has_average, is_beside, may_be_narrow, whole_name
from .saved import with_short_count
from .states import CODED_FORMAT, FORMAT

# Among the names of states: some parameters of the group are at rest, without an average.
AT_REST = "at_rest"


def _names_of_all(states: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names that all of these states have, in whatever formats."""
    named = [{whole_name(name) for name in state if name not in (REMAINDER, HASH)} for state in states]
    return set.intersection(*named) if named else set()


def _is_coded(state: Mapping[str, Any]) -> bool:
    """Whether a state has parts that are no floats, or is rounded to bfloat16."""
    return any(
        name in CODED or (may_be_narrow(name) and getattr(value, "dtype", None) == torch.bfloat16)
        for name, value in state.items()
    )


class Saving(Averaging):
    """An optimizer that saves its states. Not for direct use."""

    def state_dict(self) -> dict[str, Any]:
        """States and options, to save. As in ``torch.optim``, the tensors are the optimizer's own, which its next step
        changes: save them, or ``copy.deepcopy`` them, before it."""

        self._require_whole("state_dict()")
        self._check_unedited("state_dict()", [param for param, state in self.state.items() if is_beside(state)], False)

        # First of the hooks, so that those of the user see all of it.
        def complete(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
                packed.update(self._to_save(group))
            states = {key: with_short_count(state, "step") for key, state in saved["state"].items()}
            numbers = enumerate(param for group in self.param_groups for param in group["params"])
            saved["state"] = states | {k: with_hash(states[k], p) for k, p in numbers if is_beside(states.get(k, ()))}

        handle = self.register_state_dict_post_hook(complete, prepend=True)
        try:
            return super().state_dict()  # type: ignore[no-any-return]
        finally:
            handle.remove()

    def _to_save(self, group: Group) -> Group:
        """What a checkpoint has of the group beside its options."""
        states = [self.state[param] for param in group["params"] if self.state.get(param)]
        averaged = [state for state in states if has_average(state)]
        names = _names_of_all(averaged or states)
        if 0 < len(averaged) < len(states):
            # A state that came into play while a parameter was at rest, as one with betas[0] raised from 0, is not in
            # its own.
            later = names - {"ema"} - _names_of_all([state for state in states if not has_average(state)])
            names |= {AT_REST, *(f"{AT_REST} without {name}" for name in later)}
        saved: Group = {"state_names": tuple(sorted(names)) if states else None}
        if any(map(_is_coded, states)):
            saved["format_version"] = CODED_FORMAT
        if group["skipped_steps"] is None:  # distributed checkpoints load no tensor into what is None
            saved["skipped_steps"] = torch.zeros((), dtype=torch.int64)
        return saved

    def float_state_dict(self) -> dict[str, Any]:
        """``state_dict()`` with all states in float32 under the names of AdamW, and without remainders: for
        ``torch.optim``, for parameters of another dtype or layout, and for versions without codes. For bfloat16
        parameters with master weights it drops the bits beyond bfloat16: :meth:`master_state_dict` has them.

        Of ``torch.optim``, AdamW and Adam take that of PACE, of MADA and of all its presets but "lion", and go on by
        their own rule from both moments; after "amsgrad" set ``amsgrad=True`` in their groups. MADA's "lion" has no
        second moment and ScheduleFreeAdamW has no first one: no optimizer of torch takes theirs, and AdamW loads them
        and then raises ``KeyError: 'exp_avg'``. They are for optimizers of their own class.

        ``torch.optim.AdamW`` casts moments to the dtype of its parameters: give it the master weights, in float32. The
        average goes along as a state `ema` that AdamW keeps and never moves: export it before, or drop it, as here.

        >>> import torch, pace_kernels
        >>> model = torch.nn.Linear(64, 64).bfloat16()
        >>> optimizer = pace_kernels.PACE(model.parameters(), state_bits=8, master_weight_bits=32)
        >>> model(torch.ones(8, 64).bfloat16()).square().mean().backward()
        >>> optimizer.step()
        >>> averages, saved = optimizer.ema_state_dict(model), optimizer.float_state_dict()
        >>> for state in saved["state"].values():
        ...     _ = state.pop("ema")
        >>> weights = optimizer.master_state_dict(model)
        >>> model = model.float()
        >>> _ = model.load_state_dict(weights)
        >>> adamw = torch.optim.AdamW(model.parameters())
        >>> adamw.load_state_dict(saved)
        >>> adamw.state[model.weight]["exp_avg"].dtype
        torch.float32
        """
        saved = self.state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        for key, state in saved["state"].items():
            if isinstance(key, int) and _is_coded(state):
                self._check_unedited("float_state_dict()", params[key : key + 1])
                saved["state"][key] = in_floats(state, params[key])
        for group in saved["param_groups"]:
            for name in OPTIONS:
                group.pop(name, None)
            group["format_version"] = FORMAT
        return saved
