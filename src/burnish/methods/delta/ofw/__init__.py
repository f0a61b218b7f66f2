"""Functions of W."""
