"""The ways to see what rows see, cheapest first; each serves a family of masks."""
