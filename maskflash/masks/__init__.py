"""What users hold: masks from predicates and from vectors, and their combinations."""
