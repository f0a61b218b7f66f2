"""Updates of low rank, started from nothing."""
