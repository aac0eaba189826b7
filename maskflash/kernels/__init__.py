"""Run one attention over a block map; the backends never import one another."""
