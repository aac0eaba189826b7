"""The mask as an expression: traced from Python, rewritten, bounded over tiles, evaluated on elements."""
