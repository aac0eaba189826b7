"""A block map, q, k and v -> out, lse and gradients: by a folder for each backend, which never import one another."""
