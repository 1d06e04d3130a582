"""The options of groups: the plain form in which they are kept, who owns them, and whether they changed."""

from __future__ import annotations

import difflib
import functools
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

from .checks import Group, plain_number
from .definitions import DEFINITIONS

# Those that are a number, a whole number, or two numbers, of whichever optimizer here: those of its operator, and those
# that the front end alone knows. lr may stay a tensor.
_DEFINED = {option.name: option for definition in DEFINITIONS.values() for option in definition.options}
_NUMBERS = (
    *(name for name, option in _DEFINED.items() if option.type in ("float", "float?") and name != "lr"),
    *("hyper_clip", "r", "weight_lr_power"),
)
_COUNTS = (
    *(name for name, option in _DEFINED.items() if option.type == "int" and option.allowed),
    *("hyper_warmup", "warmup_steps"),
)
_PAIRS = ("betas", "lion_betas")
# Those that mean the same wherever they are, in torch.optim or here.
_COMMON = {"lr", "betas", "eps", "weight_decay", "maximize", "capturable", "skip_nonfinite"}
# What groups may hold beside: torch's own, those of its schedulers, and the tags that training code sets most.
_FOREIGN = {
    *("params", "param_names", "amsgrad", "foreach", "fused", "differentiable", "decoupled_weight_decay", "momentum"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
    *("name", "group_name", "lr_scale", "lr_mult", "wd_scale", "wd_mult"),
    *("backend", "hyper_process_group"),  # of the constructor: ZeroRedundancyOptimizer puts all arguments into groups
}


def listed(value: Any) -> list[Any] | None:
    """The values of a sequence of any library; None if it is no sequence."""
    if isinstance(value, (str, bytes, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return None
    try:
        return list(value)
    except TypeError:  # a tensor or an array without a dimension
        return None


def plain_sequence(value: Any) -> Any:
    """A sequence of any library as a tuple of plain numbers; a list as a list, since its owner may edit it in place.
    Other values stay as they are."""
    held = listed(value)
    if held is None:
        return value
    items = [plain_float(item) for item in held]
    if type(value) in (list, tuple) and all(map(operator.is_, value, items)):
        return value
    return items if type(value) is list else tuple(items)


def plain_float(value: Any) -> Any:
    """A number of any library as Python's float; other values stay as they are."""
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int):
        return number
    try:
        return float(number)
    except OverflowError:
        return number  # for the checks to refuse


def make_plain(group: Group, names: Collection[str]) -> None:
    """Brings the named options of the group to their plain form: Python's numbers, and tuples or lists of them. Values
    without one stay, for the checks to refuse."""
    for options, convert in ((_NUMBERS, plain_float), (_COUNTS, plain_number), (_PAIRS, plain_sequence)):
        for name in options:
            if name in group and name in names and type(value := group[name]) is not float:
                group[name] = convert(value)


def check_given(group: Mapping[str, Any], own: Collection[str], name: str, kind: str) -> None:
    """Refuses a group that has options of ours and unknown ones: usually it comes from a wrapper that passes its own
    options along, such as SAM's rho."""
    ours = [option for option in own if option in group and option not in _COMMON]
    strangers = sorted(str(option) for option in group if option not in (*_FOREIGN, *_COMMON, *own))
    if ours and strangers and "swapped" not in group:  # that one is in the groups of an optimizer of ours
        raise ValueError(
            f"{name} has {', '.join(ours)} beside {', '.join(strangers)}, which {kind} does not know: are these the "
            f"options of a wrapper? {kind} would take {', '.join(ours)} for its own. Give it groups without them, such "
            f'as {{"params": group["params"]}}; set {", ".join(strangers)} in param_groups afterwards'
        )


def check_spelling(group: Mapping[str, Any], own: Collection[str], name: str, kind: str) -> None:
    """Refuses a group with an unknown key that resembles an option: torch.optim takes any key, and so would train
    without the intended option. Tags that resemble no option stay."""
    known = {*_FOREIGN, *_COMMON, *own}
    for key in group:
        if not isinstance(key, str) or key in known or len(key) < 4 or "swapped" in group:
            continue
        if meant := difflib.get_close_matches(key, own, n=1, cutoff=0.85):
            raise ValueError(
                f"{name} has {key!r}, which {kind} does not know: did you mean {meant[0]!r}? If it is a tag of your "
                "own, rename it, or set it in param_groups of the finished optimizer"
            )


Init = TypeVar("Init", bound=Callable[..., None])


def spelled(explanations: Mapping[str, str] | None = None) -> Callable[[Init], Init]:
    """Of a constructor: an unknown argument's error says which one was meant, or what ``explanations`` have for it."""

    def around(init: Init) -> Init:
        code = init.__code__
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            for key in given:
                if key not in names:
                    meant = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
                    why = (explanations or {}).get(key) or (f"did you mean {meant[0]!r}?" if meant else "")
                    text = f"{type(self).__name__}() got an unexpected keyword argument {key!r}"
                    raise TypeError(f"{text}: {why}" if why else text)
            init(self, *args, **given)

        return cast(Init, checked)

    return around


def beyond() -> int:
    """The ``stacklevel`` of a warning of the function that asks, so that it points at the line that called into this
    package."""
    frame, level = sys._getframe(1), 1
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(here):
        frame, level = frame.f_back, level + 1
    return level


def shown(kind: str, groups: Iterable[Group], books: Collection[str]) -> str:
    """The ``repr`` of an optimizer: only options, in the form of torch.optim."""
    lines = [f"{kind} ("]
    for number, group in enumerate(groups):
        lines.append(f"Parameter Group {number}")
        hidden = {"params", "param_names", *books}
        lines += [f"    {name}: {group[name]}" for name in sorted(set(group) - hidden)]
    return "\n".join([*lines, ")"])


class Record:
    """A group's options as they were last checked, and what its optimizer made of them.

    It holds no parameters, so that those of a removed group are freed, and identifies its group by the first parameter,
    so that a copy of the group's dict finds it. It knows that by its id: of a tensor with weak references torch can't
    swap the contents, as it does to convert a DTensor. Where an id is of a later parameter, options are compared all
    the same."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._names: list[str] = []
        self._values: list[Any] = []
        self._params_at = 0
        self._lists: dict[str, list[Any]] = {}
        self.prepared: Any = None

    def is_of(self, group: Group) -> bool:
        params = group["params"]
        return self._first == (id(params[0]) if params else None)

    def follow(self, group: Group) -> None:
        self._first = id(group["params"][0]) if group["params"] else None

    def keep(self, group: Group) -> None:
        self._names, self._values = list(group), list(group.values())
        self._params_at = self._names.index("params")
        self._values[self._params_at] = None
        self._lists = {name: list(value) for name, value in group.items() if type(value) is list and name != "params"}

    def changed(self, group: Group) -> list[str]:
        """The names of options that were replaced or edited in place since ``keep``. This takes 1 µs if there are
        none."""
        values = list(group.values())
        if len(values) == len(self._values):
            values[self._params_at] = None
            if all(map(operator.is_, values, self._values)) and not self._lists:
                return []
        kept = dict(zip(self._names, self._values, strict=True))
        here = [name for name in group if name != "params"]
        edited = {name for name, before in self._lists.items() if name in group and group[name] != before}
        replaced = [name for name in here if name not in kept or group[name] is not kept[name] or name in edited]
        return replaced + [name for name in self._names if name not in group]
