"""Nothing -> scripts to copy: each runs as `python -m maskflash.examples.NAME`, and docs/training.md explains them."""
