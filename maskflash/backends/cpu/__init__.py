"""Attention on the CPU: a block map, q, k and v -> out, lse and gradients, by torch's own dense kernel (`run.py`)."""
