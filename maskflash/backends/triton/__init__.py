"""Attention on a GPU: an expression and templates -> kernels; a block map, q, k and v -> results (`run.py`)."""
