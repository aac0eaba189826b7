"""One script for each question; `runner` measures and prints, `report` writes the docs' tables from stored results."""
