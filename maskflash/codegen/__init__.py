"""The text of kernels: an expression in Triton, templates filled in, and the modules they become."""
