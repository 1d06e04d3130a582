"""What stands for a parameter in the optimizer inside of ``Offload``: its copy in host memory, or a second name of it.

The copy and the parameter are made equal before and after each call of that optimizer. Whichever was written since, as
the versions of tensors tell, is copied to the other; of both, the parameter, because others wrote it.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .checks import Group, check_number
from .editing import version_of
from .lanes import Lane, lane_of
from .memory import check_whole, overlapping
from .prints import Look, looks, print_of, refusal
from .sharding import PLAIN
from .states import FLOATING
from .whole import each
from .worker import Worker

_call = operator.methodcaller("__call__")
_ONE_AT_A_TIME = (
    "{} in the middle of a step or of another call: a handler of a signal interrupted it. Save between two steps"
)


class Twin:
    """A parameter (``owner``) and the tensor that is stepped in its place: ``tensor``, in host memory if ``away``."""

    def __init__(self, owner: Tensor, away: bool, lane: Lane) -> None:
        self.owner, self.away = owner, away
        plain = type(owner) in PLAIN and owner.layout is torch.strided
        tensor = lane.host(owner.detach()) if away else owner.detach() if plain else owner
        self.tensor: Tensor = tensor.requires_grad_(owner.requires_grad) if plain else tensor
        self.seen: Any = None  # what the owner was when both were equal
        self.equal = -1  # the version of the tensor then
        self.print: Tensor | None = None  # of the owner then
        self.gradient: Tensor | None = None  # host memory for it
        self.copied: Any = None  # the gradient that is there, or on its way there
        self.arrived: Any = None  # an event behind that copy
        self.place = 0  # in the order of arrivals
        self.backward, self.usual = 0, 0  # gradients since the last step, and between the two before

    def stamp(self) -> Any:
        owner = self.owner
        return version_of(owner), owner.data_ptr(), owner.device, owner.dtype, owner.shape, owner.stride()

    def is_pending(self) -> bool:
        return self.away and self.tensor._version != self.equal

    def follow_flags(self) -> None:
        if self.tensor.requires_grad is not self.owner.requires_grad:
            if self.tensor.requires_grad is False and type(self.owner) not in PLAIN:
                raise RuntimeError(
                    f"a {type(self.owner).__name__} came frozen and trains now, which Offload can't step"
                )
            self.tensor.requires_grad_(self.owner.requires_grad)


class Twins:
    """The parameters of an ``Offload``, and the copies to and fro. One object, because wrappers that pass for an
    optimizer copy its attributes."""

    def __init__(self, overlap: bool, check_writes: bool) -> None:
        self.lock = threading.RLock()  # hooks run in the threads of the devices
        self.worker = Worker()
        self.order: list[Twin] = []  # of all parameters, as in the groups
        self.overlap, self.check_writes = overlap, check_writes
        self.epoch = 0
        self._by_id: dict[int, Twin] = {}  # by owner, and by what is stepped for it
        self._lists: dict[int, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        self._lanes: dict[torch.device, Lane] = {}
        self._sent: list[tuple[Lane, Any]] = []  # events behind what was sent
        self._fresh: list[Twin] = []  # what was copied since prints were taken
        self._looks: list[Look] = []
        self._marks: list[str] = []
        self._arrivals = 0
        self.contexts_within: list[Any] = []  # of the optimizer inside, that are open

    def lane(self, device: torch.device) -> Lane:
        lane = self._lanes.get(device)
        if lane is None:
            lane = self._lanes[device] = lane_of(device)
        return lane

    def of(self, tensor: Tensor) -> Twin | None:
        return self._by_id.get(id(tensor))

    # ---- groups ----------------------------------------------------------------------------------------------------

    def made(self, named: list[tuple[str, Tensor]], fraction: float) -> list[Twin]:
        """Twins of a group's parameters, with this fraction of the elements in host memory."""
        check_number("fraction", fraction, "in [0, 1]", lambda a: 0 <= a <= 1)
        free = [not _stays(name, param) for name, param in named]
        wanted = fraction * sum(param.numel() for (_, param), can in zip(named, free, strict=True) if can)
        away, held = [False] * len(named), 0
        # Gradients come in about the reverse order of registration: the first ones have the most time to be copied.
        for i in reversed(range(len(named))):
            if free[i] and held < wanted:
                away[i], held = True, held + named[i][1].numel()
        found: dict[int, Twin] = {}
        for (_, param), gone in zip(named, away, strict=True):
            if id(param) not in found:
                found[id(param)] = self.of(param) or Twin(param, gone, self.lane(param.device))
        _check_apart([*self.order, *found.values()])
        return [found[id(param)] for _, param in named]

    def enter(self, twins: Iterable[Twin]) -> None:
        me = weakref.ref(self)
        for twin in twins:
            if id(twin.owner) in self._by_id:
                continue
            self._by_id[id(twin.owner)] = self._by_id[id(twin.tensor)] = twin
            if twin.away:
                twin.owner.register_post_accumulate_grad_hook(_hook(me, weakref.ref(twin)))

    def _placed(self, groups: list[Group]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The parameters of the groups, and what stands for them: the same lists as before, where they are unchanged,
        which plans then need not look through."""
        theirs, ours, same = [], [], len(groups) == len(self._lists)
        for group in groups:
            params = group["params"]
            kept = self._lists.get(id(group))
            if kept is None or not (
                kept[0] is params and len(params) == len(kept[1]) and all(map(operator.is_, params, kept[1]))
            ):
                same, found = False, list(map(self.of, params))
                if None in found:
                    raise RuntimeError(
                        f"param_groups has a parameter of shape {tuple(params[found.index(None)].shape)} that Offload "
                        "did not get, or that was taken out of it: use add_param_group()"
                    )
                owners = [twin.owner for twin in found if twin is not None]
                owners = params if all(map(operator.is_, owners, params)) else owners
                kept = (owners, list(owners), [twin.tensor for twin in found if twin is not None])
                self._lists[id(group)] = kept
            theirs.append(kept[0])
            ours.append(kept[2])
        if not same:
            self._lists = {id(group): self._lists[id(group)] for group in groups}
            self.order = [self._by_id[id(param)] for params in theirs for param in params]
            self._by_id = {id(t): twin for twin in self.order for t in (twin.owner, twin.tensor)}
        return theirs, ours

    @contextmanager
    def inside(self, what: str, groups: list[Group], steps: bool) -> Iterator[list[Group]]:
        """Within this context the groups have what is stepped, equal to the parameters; afterwards they are equal
        again. What is put into the list that it gives gets its parameters back too. Before it ``steps``, writes that
        torch does not count are not looked for."""
        with self.lock:
            if self._marks:
                raise RuntimeError(_ONE_AT_A_TIME.format(what))
            theirs, ours = self._placed(groups)
            for lane, event in self._sent:  # out of memory that may be written now
                lane.block(event)
            self._sent = []
            if not steps and self.check_writes:
                self._find_written()
            self.agree()
            put, at = list(groups), repeat("params")
            # Each is one call of C: Python runs handlers of signals between its own instructions.
            enter = each(dict.__setitem__, groups, at, ours)
            leave: Any = partial(deque, map(_call, [each(dict.__setitem__, put, at, theirs), self._marks.clear]), 0)
            try:
                self._marks.append(what)
                enter()
                yield put
                if len(put) > len(theirs):
                    self._extend(put, theirs)
            finally:
                leave()
                self.agree()

    def _extend(self, put: list[Group], theirs: list[list[Tensor]]) -> None:
        theirs += [[self._by_id[id(tensor)].owner for tensor in group["params"]] for group in put[len(theirs) :]]

    # ---- weights ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def agree(self) -> None:
        """Makes parameters and what is stepped for them equal."""
        changed, moved = [], False
        for twin in self.order:
            twin.follow_flags()
            if twin.tensor is twin.owner:
                continue
            here = twin.stamp()
            if here != twin.seen:
                changed.append((twin, here))
                moved |= twin.seen is None or here[1:] != twin.seen[1:]
        if moved:
            check_whole(twin.owner for twin, _ in changed)
            _check_apart(self.order)
        pending = [twin for twin in self.order if twin.is_pending() and twin.stamp() == twin.seen]
        events = []
        for twin, _ in changed:
            owner, tensor = twin.owner, twin.tensor
            if not twin.away:
                tensor.data = owner.detach()
                continue
            lane = self.lane(owner.device)
            moves = twin.seen is not None and twin.seen[2] != owner.device  # to one that may need pinned memory
            if moves or (tensor.dtype, tensor.shape, tensor.stride()) != (owner.dtype, owner.shape, owner.stride()):
                tensor.data, twin.gradient = lane.host(owner.detach()), None
            events.append((lane, lane.fetch(owner.detach(), tensor)))
        for lane, event in events:
            lane.block(event)
        for twin, here in changed:
            twin.seen, twin.equal = here, twin.tensor._version
            self._fresh.append(twin)
        after = self.events() if pending else {}
        for twin in pending:
            self.send(twin, after)
        if pending or changed:
            self.follow()

    def events(self) -> dict[torch.device, Any]:
        """Of each device an event behind what its current stream was asked."""
        return {device: self.lane(device).event() for device in {twin.owner.device for twin in self.order}}

    def send(self, twin: Twin, after: dict[torch.device, Any]) -> None:
        device = twin.owner.device
        self.lane(device).send(twin.tensor.detach(), twin.owner.detach(), after[device])
        twin.seen, twin.equal = twin.stamp(), twin.tensor._version
        self._fresh.append(twin)

    def follow(self) -> None:
        """Puts what is asked of the current streams next behind what was sent."""
        self._sent = [(lane, lane.follow()) for lane in self._lanes.values()]
        for twin in self._fresh if self.check_writes else ():
            twin.print = print_of(twin.owner) if twin.away else None
        self._fresh = []

    # ---- writes that torch does not count --------------------------------------------------------------------------

    def look(self) -> None:
        """Begins to look whether weights that are stepped, and gradients, are what was copied."""
        watched = [t for t in self.order if t.away and t.owner.grad is not None] if self.check_writes else []
        copied: list[Any] = [(kept[0], kept[-1]) for t in watched if (kept := t.copied)]
        self._looks = looks([*((t.owner, t.print) for t in watched), *copied], self.lane)

    def check_looks(self) -> None:
        """Raises RuntimeError where one was written. It waits for the device."""
        begun, self._looks = self._looks, []
        for tensor in (tensor for look in begun for tensor in look.written()):
            raise refusal(tensor, is_gradient=self.of(tensor) is None)

    def _find_written(self) -> None:
        """Weights that were written without being counted are copied anew; between steps there is time to wait."""
        kept = [t for t in self.order if t.away and t.stamp() == t.seen]  # others are copied anyway
        begun = looks([(t.owner, t.print) for t in kept], self.lane)
        for owner in (owner for look in begun for owner in look.written()):
            self._by_id[id(owner)].seen = None

    # ---- gradients -------------------------------------------------------------------------------------------------

    def came(self, twin: Twin) -> None:
        """A backward pass has left a gradient."""
        with self.lock:
            grad = twin.owner.grad
            twin.backward += 1
            self._arrivals += 1
            twin.place = self._arrivals
            # Where gradients are accumulated, the last one is copied.
            if not self.overlap or twin.backward < twin.usual or self._marks or _copies_later(twin.owner):
                return
            if grad is not None and grad.layout is torch.strided and grad.device == twin.owner.device:
                self.fetch(twin, grad, print_of(grad) if self.check_writes else None)

    def fetch(self, twin: Twin, grad: Tensor, its_print: Tensor | None = None) -> None:
        check_whole((grad,))
        lane, kept = self.lane(grad.device), twin.gradient
        if kept is None or (kept.dtype, kept.shape) != (grad.dtype, grad.shape):
            kept = twin.gradient = lane.host(grad.detach())
        twin.copied = None
        twin.arrived = lane.fetch(grad.detach(), kept)
        twin.copied = (grad, version_of(grad), grad.data_ptr(), self.epoch, its_print)

    def is_copied(self, twin: Twin, grad: Tensor, untouched: bool) -> bool:
        """Whether the gradient is what was copied: the same memory, not written since as far as torch counts that.
        GradScaler.unscale_ writes without counting, to the gradients of the groups: who has asked for these since may
        have written, unless it is known that gradients are ``untouched``."""
        if twin.copied is None:
            return False
        kept, *at, _ = twin.copied
        return kept is grad and at == [version_of(grad), grad.data_ptr(), at[2] if untouched else self.epoch]

    def put_gradients(self, bucket: list[Twin]) -> None:
        """Gives a bucket its gradients, once they are there."""
        for twin in bucket:
            if twin.away:
                self.lane(twin.owner.device).block(twin.arrived)
            grad = twin.gradient if twin.away else twin.owner.grad
            if twin.tensor is not twin.owner:
                if hasattr(twin.owner, "grad_dtype"):  # torch >= 2.10
                    twin.tensor.grad_dtype = twin.owner.grad_dtype
                twin.tensor.grad = grad

    def send_back(self, bucket: list[Twin], after: dict[torch.device, Any]) -> None:
        for twin in bucket:
            if twin.tensor is not twin.owner:
                twin.tensor.grad = None
            if twin.is_pending():
                self.send(twin, after)

    def contexts(self) -> list[Any]:
        """The current streams of this thread, for another one."""
        return [lane.within() for lane in self._lanes.values()]

    def do(self, job: Any) -> BaseException | None:
        """Has the worker do a job, and waits for it. An exception of a signal's handler that comes in between is
        returned then: nothing can be left to the worker, since the groups have what it steps."""
        try:
            self.worker.submit(job)
        except BaseException as error:
            return self.wait(error)
        return self.wait(None)

    def wait(self, interrupt: BaseException | None) -> BaseException | None:
        """Waits for the worker. Returns the first exception that came meanwhile, or ``interrupt``."""
        try:
            self.worker.join()
        except BaseException as error:
            return self.wait(interrupt or error)
        return interrupt

    def forget_gradients(self, stepped: bool) -> None:
        """What is noted of copies keeps gradients from being freed."""
        for twin in self.order:
            twin.copied = twin.arrived = None
            if twin.tensor is not twin.owner:
                twin.tensor.grad = None
            twin.usual, twin.backward = twin.backward if stepped and twin.backward else twin.usual, 0


def _hook(me: weakref.ref[Twins], its: weakref.ref[Twin]) -> Any:
    def arrived(_: Tensor) -> None:
        twins, twin = me(), its()
        if twins is not None and twin is not None:
            twins.came(twin)

    return arrived


def _copies_later(owner: Tensor) -> bool:
    """On several ranks, DistributedDataParallel averages gradients later; a captured graph runs no hooks again."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several or (owner.is_cuda and torch.cuda.is_current_stream_capturing())


def _stays(name: str, param: Tensor) -> bool:
    """Whether a parameter is not for host memory: it is frozen, empty, or no dense piece of memory. Raises ValueError
    where it can't be stepped."""
    if not param.requires_grad:
        return True
    if is_lazy(param):
        raise ValueError(f"{name} is lazy: run the model once before, so that there are weights to copy")
    if type(param) not in PLAIN:
        raise ValueError(
            f"{name} is a {type(param).__name__}: Offload is for plain tensors. Shard with "
            "fully_shard(offload_policy=CPUOffloadPolicy()), or leave it out"
        )
    if param.is_meta or param.layout is not torch.strided or param.dtype not in FLOATING:
        what = "on meta" if param.is_meta else f"{param.dtype}, {param.layout}"
        raise ValueError(f"{name} is {what}: Offload is for dense floating-point parameters with values")
    if param.is_inference():
        raise ValueError(f"{name} was made in inference mode, where torch counts no writes: make it outside")
    return param.numel() == 0 or torch.empty_like(param, device="meta").stride() != param.stride()


def _check_apart(twins: list[Twin]) -> None:
    if not any(twin.away for twin in twins):
        return
    known = {id(twin.owner): twin for twin in twins if twin.owner.requires_grad}
    for group in overlapping(twin.owner for twin in known.values()):
        if len(group) > 1 and any(known[id(owner)].away for owner in group):
            raise ValueError(
                f"two parameters of shape {tuple(group[0].shape)} and {tuple(group[1].shape)} share memory, which "
                "Offload can't copy apart: tie them as one parameter, or give their group fraction=0"
            )
