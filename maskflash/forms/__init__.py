"""A mask at given lengths <-> the form in which another engine takes it: exact, both ways, or refused by name."""
