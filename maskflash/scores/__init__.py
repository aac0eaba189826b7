"""How strongly a query attends to a key: score functions, their classes, what of them is a mask, and dropout."""
