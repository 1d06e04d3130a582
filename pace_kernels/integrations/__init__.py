"""Small pieces for trainers, one module per library. ``import pace_kernels`` imports none of them."""
