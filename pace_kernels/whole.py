"""Steps that are whole or not at all, whatever Python runs between two of its instructions: a signal handler, a tracer.

Python runs handlers between its own instructions alone. What one call of C does is therefore seen before it or after
it, and a step of native operators is one such call (:func:`at_once`). A step that cannot be one says so while it lasts.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType

from torch import Tensor

# What is to be done, without arguments: functools.partial of a function of C, where it is to be done at once.
Call = Callable[[], object]
_call = operator.methodcaller("__call__")


def at_once(calls: Iterable[Call]) -> None:
    """Makes the calls in one call of C. An exception ends them where it is raised."""
    deque(map(_call, calls), maxlen=0)


def each(function: Callable[..., object], *columns: Iterable[object]) -> Call:
    """The call of ``function`` for each row of the columns, in one call of C if it is one."""
    return partial(deque, map(function, *columns), 0)


class UnderWay:
    """A context in which ``marks`` has an entry. It goes at the end, or where an exception comes before any of
    ``written`` was written, as the versions of these tensors tell; otherwise it stays."""

    def __init__(self, marks: list[str], written: Iterable[Tensor] | None) -> None:
        self._unfinished = marks
        self._written = None if written is None else list(written)

    def _versions(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self._written or ()]

    def __enter__(self) -> None:
        self._before = self._versions()
        self._unfinished.append("step")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        untouched = self._written is not None and self._before == self._versions()
        self._before, self._written = [], None
        if kind is None or untouched:
            self._unfinished.clear()


class Whole:
    """An optimizer that says when its weights and states are of different steps. Not for direct use.

    A step that Python code takes, as the one of a wrapper's base, is marked so::

        with self._under_way(written):  # the tensors that it may write
            base.step()

    Without ``written`` any exception leaves the step half done. So it has to be where writes do not count in the
    versions of these tensors: through ``param.data``, as optimizers outside of ``torch.optim`` do it, or by addresses.
    Whatever reads weights and states together begins with ``self._require_whole("state_dict()")``, which raises
    RuntimeError meanwhile, and after a step that an exception ended half done until ``self._unfinished.clear()``, as
    load_state_dict() does in the end. A class makes ``_unfinished`` in ``__init__`` and, where it is missing, in
    ``__setstate__``: wrappers that pass for an optimizer copy its ``__dict__``, and share the list.
    """

    _unfinished: list[str]

    def _under_way(self, written: Iterable[Tensor] | None = None) -> UnderWay:
        return UnderWay(self._unfinished, written)

    def _require_whole(self, what: str) -> None:
        if self._unfinished:
            raise RuntimeError(
                f"{what} in the middle of a step: a step is running, or an exception stopped one half done. "
                "After an exception, load the last checkpoint of model and optimizer, with load_state_dict()"
            )

    def _at_once(self, first: list[Call], then: list[Call]) -> None:
        """Makes the calls in one call of C. Each of ``first`` does all of its work or raises.

        A mark stands meanwhile: under a dispatch mode even functions of C run Python. Where the very first call raises
        nothing was written, and the mark goes; where a later one does, it stays.
        """
        if len(first) == 1 and not then:
            first[0]()
            return
        marks = self._unfinished
        mark = partial(marks.append, "step")
        calls: list[Call] = [mark]
        for call in first:
            calls += [call, mark]
        try:
            at_once([*calls, *then, marks.clear])
        except BaseException:
            if len(marks) == 1:
                marks.clear()
            raise
