"""A Python predicate -> the expression it computes."""
