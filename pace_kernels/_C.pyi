def cpu_isa() -> str:
    """The instruction set whose kernels run here; RuntimeError where PACE_CPU_ISA asks for one that is not there."""
