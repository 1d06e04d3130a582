"""What a Pullback works on: parameters of a group that are pulled together, and what it keeps besides their states."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .checks import Group, plain_number
from .formats import HASH, asked, names_of, parts_of
from .planning import Plans
from .second_moments import SecondMoment
from .sharding import Axes
from .states import PLAIN, Formats
from .torch_rules.pullback import PullbackOptions

# The names of the pullback's options, by which a group of the base may set its own.
OPTIONS = (
    *("lambda_pullback", "gain", "second_moment", "clamp_pullback", "beta_ema", "use_ema_eval", "ema_kappa", "ema_rho"),
    *("ema_gamma", "ema_update_freq", "log_stats", "pullback_from", "ema_bits"),
)
# How averages lie is the constructor's: a checkpoint does not say it.
SAVED_OPTIONS = tuple(name for name in OPTIONS if name != "ema_bits")
# Ours among the base's states of a parameter: the average, the steps that it took, and, while swapped, the live
# weights. A parameter at rest has steps and no average.
AVERAGE, STEP, LIVE, AT_REST = "ema", "pullback_step", "live", "at_rest"
OURS = (*parts_of(AVERAGE), HASH, STEP, LIVE, AT_REST)
# The keys of a base's group that say whether its averages are swapped in, and in which format they are: 0 before the
# first. Under these names all kinds of checkpoints carry them.
SWAPPED, FORMAT_VERSION = "pullback_swapped", "pullback_format_version"
_SHARED = frozenset(f.name for f in fields(PullbackOptions)) & frozenset(OPTIONS)
_version = operator.attrgetter("_version")


@dataclass
class Own:
    """The pullback's options of a group, checked, and what follows from them."""

    values: Group
    pulls: bool
    keeps: bool
    by_moment: bool
    operator: Group
    formats: Formats

    @classmethod
    def of(cls, values: Group) -> Own:
        pulls = bool((values["lambda_pullback"] if values["gain"] is None else values["gain"]) != 0.0)
        shared = {name: plain_number(values[name]) for name in _SHARED}
        keeps = pulls or values["use_ema_eval"]
        formats = asked({"ema_bits": values["ema_bits"]})
        return cls(values, pulls, keeps, pulls and values["gain"] is None, shared, formats)


@dataclass
class Row:
    """The statistics of one call, and which of them are meaningful."""

    stats: Tensor
    axes: Axes
    moment: bool
    before: bool


@dataclass
class Pull:
    """The parameters of one group that one operator call pulls: on one device, in one dtype, with the same sharding."""

    group: Group
    own: Own
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    axes: Axes
    moment: SecondMoment | None
    places: list[int] = field(default_factory=list)  # in the group
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)  # of DTensors the local parts
    emas: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    seconds: list[Any] = field(default_factory=list)  # as they were before the base's step; None: not there yet
    befores: list[Tensor] = field(default_factory=list)
    # The base's steps before the first of the average, and the round: parameters over one memory take turns.
    offsets: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)  # the averages that are not in the state yet
    hidden: list[Tensor] = field(default_factory=list)  # whose states hold nothing of the base
    on_device: bool = False
    found_inf: Tensor | None = None
    formats: Formats = PLAIN  # of the averages
    scales: list[Tensor] = field(default_factory=list)  # what lies beside averages in codes
    alone: bool = False  # wrappers of other tensors: no operator takes them in a list
    sharded: bool = False  # DTensors
    askew: bool = False  # some lie at addresses that are no multiple of their element size
    planned: bool = False  # by a LastPull, which has checked it

    @property
    def names(self) -> tuple[str, ...]:
        """Under which an average is there: of `emas`, and of `scales`."""
        return names_of(self.formats, (AVERAGE,))

    def columns(self) -> tuple[list[Tensor], ...]:
        return (self.emas, self.scales)[: len(self.names)]

    @property
    def measures_before(self) -> bool:
        """Whether the distance to the average is measured before the base's step."""
        return self.own.pulls and bool(self.own.values["pullback_from"] == "weights")

    @property
    def reads_before(self) -> bool:
        """Whether the weights of before the base's step are needed: also where averages lie beside them."""
        return self.measures_before or self.formats.on_grid

    def parts(self) -> Iterator[Pull]:
        """As a rule itself; offsets and rounds get calls of their own."""
        keys = list(zip(self.rounds, self.offsets, strict=True))
        if len(set(keys)) <= 1 and keys[0][1] >= 0:
            yield self
            return
        if min(self.offsets) < 0:  # then the count matters too, see _call
            keys = [(*key, count_of(step)) for key, step in zip(keys, self.steps, strict=True)]  # type: ignore[misc]
        columns = ("places", "owners", "params", "emas", "scales", "steps", "seconds", "befores", "offsets", "rounds")
        for key in sorted(set(keys)):
            chosen = [i for i, its in enumerate(keys) if its == key]
            part = replace(self)
            for column in columns:
                if values := getattr(self, column):
                    setattr(part, column, [values[i] for i in chosen])
            yield part


class Scratch:
    """What a Pullback keeps besides the base's state: nothing that a checkpoint needs. It is one object, because
    wrappers that pose as an optimizer copy its attributes."""

    def __init__(self) -> None:
        # Memory for copies of weights, on the CPU, where new memory costs page faults; by id of the parameter, without
        # a weak reference, with which torch can't convert a DTensor. Where an id is of a later one, it serves that.
        self.befores: dict[int, Tensor] = {}
        self.plans: dict[int, Any] = {}  # of class LastPull, by id of the group
        self.step_plans = Plans()
        self.rows: list[Row] = []
        self.own: dict[int, tuple[list[Any], Own]] = {}  # by id of the group
        self.unsure = False  # averages may have taken no step: after a dry run, or one that a gradient scaler skipped
        self.loading = False  # our load_state_dict calls the base's
        self.unwritten: list[tuple[Tensor, Tensor]] = []  # while a checkpoint is loaded, see Averaging._unwritten
        self.said: set[str] = set()

    def before(self, param: Tensor, like: Tensor) -> Tensor:
        """Memory for a copy of ``like``, the local part of the parameter."""
        kept = self.befores.get(id(param))
        if kept is None or kept.dtype is not like.dtype or kept.shape != like.shape or kept.device != like.device:
            kept = self.befores[id(param)] = torch.empty_like(like, requires_grad=False)
        return kept

    def forget(self, params: Iterable[Tensor]) -> None:
        """Frees what was kept for others than these parameters."""
        if stale := self.befores.keys() - set(map(id, params)):
            self.befores = {key: kept for key, kept in self.befores.items() if key not in stale}


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has no values: on meta, or under FakeTensorMode."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (module is not None and isinstance(tensor, module.FakeTensor))


def count_of(step: Any) -> int:
    """A step count as a number; 0 for a fake one."""
    if isinstance(step, Tensor):
        return 0 if is_fake(step) else int(step.item())
    return int(step)


def ahead(ours: Iterable[Tensor], theirs: Iterable[Any]) -> list[int]:
    """How many steps a base has taken more than the average."""
    return [count_of(their) - count_of(our) for our, their in zip(ours, theirs, strict=True)]


class Moves:
    """The versions of step counts, which tell whether a base counts in each step as in the one before. In the first
    step they tell nothing, so ``offsets_stay`` is asked."""

    def __init__(self, seen: list[int]) -> None:
        self.seen: list[int] | None = seen
        self._by: int | None = None

    def note(self, now: list[int], offsets_stay: Callable[[], bool]) -> None:
        """Forgets them if the base counted in another way: offsets have to be checked again."""
        by = sum(now) - sum(self.seen or ())
        if self._by is None and offsets_stay():
            self._by = by
        self.seen = now if by == self._by else None


def versions(tensors: Iterable[Any]) -> list[int]:
    """The versions of tensors, which tell whether any was written."""
    tensors = list(tensors)
    try:
        return list(map(_version, tensors))
    except (AttributeError, RuntimeError):  # no tensor, or one of inference mode
        return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
