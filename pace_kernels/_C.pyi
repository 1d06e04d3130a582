def cpu_isa() -> str:
    """The instruction set whose kernels run here; RuntimeError where PACE_CPU_ISA asks for one that is not there."""

class Plan:
    """The calls of a step that are kept for the next one; they go when this object does."""

    @property
    def handle(self) -> int: ...
