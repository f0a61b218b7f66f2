"""Sparse updates, chosen or generated."""
