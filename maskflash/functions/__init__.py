"""A function's arguments and captures -> the values of its expression's slots, in each call."""
