def architectures() -> str:
    """What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0+PTX"."""

def driver_refusal() -> str | None:
    """Why the driver that is here can't run these kernels; None where it can, or where there is none."""
