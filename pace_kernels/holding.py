"""What of an ``Offload`` is the optimizer's that it holds: its groups, states, checkpoints and averages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import derived
from .averaging import Averaging, Exporting, check_trains
from .checks import Group
from .optimizer import KernelOptimizer
from .pullback import Pullback
from .twins import Twins


class Holding(Exporting, torch.optim.Optimizer):
    """An optimizer around another one, which steps what stands for the parameters. Not for direct use."""

    _inner: KernelOptimizer | Pullback
    _twins: Twins

    def _set_up(self) -> None:
        """What torch.optim.Optimizer makes in __init__, but for groups and state, which are the inner one's."""
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                self.__dict__.setdefault(f"_optimizer_{kind}_{when}_hooks", OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    def _inside(self, what: str) -> Any:
        return self._twins.inside(what, self._inner.param_groups, steps=what == "step()")

    # ---- what is the inner optimizer's -------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        self._twins.epoch += 1
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:
        self._inner.param_groups = value

    @property
    def defaults(self) -> Group:  # type: ignore[override]
        return self._inner.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The states by parameter; those of parameters in host memory are there, and are put there."""
        return _States(self)

    @state.setter
    def state(self, value: Any) -> None:
        given, states = dict(value), _States(self)
        self._inner.state.clear()
        for param, state in given.items():
            states[param] = state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler asks; see ``fused`` of :class:`PACE`."""
        return self._inner._step_supports_amp_scaling

    @property
    def clip_coef(self) -> Any:
        """As of the optimizer inside: the ``clip_coef`` of every following ``step()`` that gets none."""
        return self._inner.clip_coef

    @clip_coef.setter
    def clip_coef(self, value: Tensor | float | None) -> None:
        self._inner.clip_coef = value  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        """Statistics and what else the optimizer inside has."""
        inner = self.__dict__.get("_inner")
        if inner is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(inner, name)
        if not callable(value):
            return value

        @wraps(value)
        def inside(*args: Any, **given: Any) -> Any:
            with self._inside(f"{name}()"):
                return value(*args, **given)

        return inside

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._twins.forget_gradients(stepped=False)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer inside."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._inside("state_dict()"):
            saved = self._inner.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any], **options: Any) -> None:
        """Loads a checkpoint as the optimizer inside does; ``capturable`` becomes False."""
        if isinstance(state_dict, dict):
            state_dict = dict(state_dict)
            groups = state_dict.get("param_groups")
            if isinstance(groups, (list, tuple)):
                state_dict["param_groups"] = [
                    {**group, "capturable": False} if isinstance(group, dict) and group.get("capturable") else group
                    for group in groups
                ]
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        with self._inside("load_state_dict()") as put:
            try:
                self._inner.load_state_dict(state_dict, **options)
            finally:
                put[:] = self._inner.param_groups
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # ---- the average -------------------------------------------------------------------------------------------------

    def _check_model(self, model: torch.nn.Module | None, what: str) -> None:
        if model is None:
            return
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
        check_trains(model, self._params(), what)

    def eval(self, model: torch.nn.Module | None = None) -> None:
        """Puts the average in place of the weights; see :meth:`PACE.eval`. The live ones are kept in host memory."""
        self._check_model(model, "eval()")
        with self._inside("eval()"):
            self._inner.eval()
        derived.forget(model, ())

    def train(self, model: torch.nn.Module | None = None, *, keep: Literal["loaded", "live"] | None = None) -> None:
        """Puts the weights back that ``eval()`` took out; see :meth:`PACE.train`."""
        self._check_model(model, "train()")
        with self._inside("train()"):
            self._inner.train(keep=keep)
        derived.forget(model, ())

    @contextmanager
    def _around(self, what: str, context: Any) -> Iterator[None]:
        """Within this context, and within one of the optimizer inside. Where an interrupt or an error keeps that from
        its end, it is kept: freed, it would end with the groups as they are, find no states in them and unmark them."""
        with self._inside(what):
            self._twins.contexts_within.append(context)
            context.__enter__()
        try:
            yield
        finally:
            with self._inside(what):
                context.__exit__(None, None, None)
            self._twins.contexts_within.remove(context)

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within this context the parameters hold their averages; see :meth:`PACE.averaged`."""
        self._check_model(model, "averaged()")
        try:
            with self._around("averaged()", self._inner.averaged()):
                derived.forget(model, ())
                yield
        finally:
            derived.forget(model, ())

    @contextmanager
    def editing_weights(self, *, reset_average: bool = False) -> Iterator[None]:
        """See :meth:`PACE.editing_weights`."""
        with self._around("editing_weights()", self._inner.editing_weights(reset_average=reset_average)):
            yield

    @contextmanager
    def _opened(self, what: str) -> Iterator[Averaging]:
        with self._inside(what):
            yield self._inner

    def _option(self, group: Group, name: str) -> Any:
        return self._inner._option(group, name)

    def _entries(self, groups: list[Group]) -> list[Any]:
        with self._inside("this"):
            return self._inner._entries(groups)

    @property
    def _swapped(self) -> bool:
        return self._inner._swapped

    def _keeps_average(self, group: Group) -> bool:
        return self._inner._keeps_average(group)

    def _owner(self, tensor: Tensor) -> Tensor:
        twin = self._twins.of(tensor)
        assert twin is not None
        return twin.owner

    def _params(self) -> list[Tensor]:
        return [twin.owner for twin in self._twins.order]


class _States(MutableMapping[Tensor, Any]):
    def __init__(self, optimizer: Holding) -> None:
        self._states: Any = optimizer._inner.state
        self._twins = optimizer._twins

    def _key(self, param: Any) -> Any:
        twin = self._twins.of(param) if isinstance(param, Tensor) else None
        return param if twin is None else twin.tensor

    def __getitem__(self, param: Any) -> Any:
        return self._states[self._key(param)]

    # Not by __getitem__, which makes an empty state where there is none, as in torch.optim.
    def get(self, param: Any, default: Any = None) -> Any:
        return self._states.get(self._key(param), default)

    def pop(self, param: Any, *default: Any) -> Any:
        return self._states.pop(self._key(param), *default)

    def setdefault(self, param: Any, default: Any = None) -> Any:
        if param not in self:
            self[param] = default
        return self[param]

    def __contains__(self, param: object) -> bool:
        return self._key(param) in self._states

    def __setitem__(self, param: Any, value: Any) -> None:
        twin = self._twins.of(param) if isinstance(param, Tensor) else None
        if twin is not None and twin.away and isinstance(value, dict):
            value = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in value.items()}
        self._states[self._key(param)] = value

    def __delitem__(self, param: Any) -> None:
        del self._states[self._key(param)]

    def __iter__(self) -> Iterator[Any]:
        for key in self._states:
            twin = self._twins.of(key) if isinstance(key, Tensor) else None
            yield key if twin is None else twin.owner

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return repr(dict(self))
