"""What users hold: masks from predicates, presets, and their combinations."""
