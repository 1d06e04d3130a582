"""Scripts of research/, imported for a test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "research"


@contextmanager
def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with validation on two windows. Afterwards its modules are forgotten: `pace`, `lm`, `runs` are names
    that others may have."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("lm"), "VALIDATION_WINDOWS", 2)
    yield importlib.import_module(name)
    for module in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[module], "__file__", None) or "").parents:
            del sys.modules[module]
