"""A page a letter: the methods of one kind beside each other on real data (see README.md)."""
