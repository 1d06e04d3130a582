"""Small pieces for trainers, one module a library. ``import pace_kernels`` imports none of them."""
