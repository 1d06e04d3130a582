"""The CUDA kernels without a GPU: built by the project's own set-up, taken apart, and executed."""
