"""Tensors and a mask -> the registered differentiable op, its analysis found or made, and what was decided."""
