"""The rules in Triton; installed as ``pace_kernels.triton_kernels``. Nothing is here yet: ``backends()`` says so."""
