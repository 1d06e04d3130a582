"""Steps are whole or not taken at all, whatever Python runs between two instructions: a signal handler, a tracer.

Python runs handlers only between its own instructions. They see one call of C as either not begun or done, and a step
of native operators is one such call (:func:`at_once`). Any other step marks itself as under way while it runs.
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
    """Makes the calls in one call of C. An exception in one skips the rest."""
    deque(map(_call, calls), maxlen=0)


def each(function: Callable[..., object], *columns: Iterable[object]) -> Call:
    """A call of ``function`` for each row of the columns; one call of C if ``function`` is C."""
    return partial(deque, map(function, *columns), 0)


class UnderWay:
    """A context in which ``marks`` has an entry. The entry is removed at the end, or at an exception before any of
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
    """An optimizer that knows when its weights and states are from different steps. Not for direct use.

    A step that Python code takes, such as that of a wrapper's base, is marked like this::

        with self._under_way(written):  # the tensors that it may write
            base.step()

    Without ``written`` any exception leaves the step half done. This is needed if writes do not change the versions of
    these tensors: through ``param.data``, as in optimizers outside of ``torch.optim``, or by addresses. A method that
    reads weights and states together begins with ``self._require_whole("state_dict()")``. That raises RuntimeError
    during a step, and after a step that an exception stopped half done until ``self._unfinished.clear()``, which
    load_state_dict() calls at its end. A class makes ``_unfinished`` in ``__init__`` and, if missing, in
    ``__setstate__``: wrappers that pose as an optimizer copy its ``__dict__`` and share the list.
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

        A mark is set meanwhile: under a dispatch mode even functions of C run Python. If the very first call raises,
        nothing was written, and the mark is removed; if a later one does, it stays.
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
