"""One definition per optimizer, as data: what every backend has to know (kit.py says what that is)."""

from .kit import Definition
from .mada import MADA
from .pace import PACE
from .pullback import PULLBACK
from .schedule_free import SCHEDULE_FREE

__all__ = ["DEFINITIONS", "MADA", "PACE", "PULLBACK", "SCHEDULE_FREE", "Definition"]

DEFINITIONS: dict[str, Definition] = {definition.op: definition for definition in (PACE, MADA, PULLBACK, SCHEDULE_FREE)}
