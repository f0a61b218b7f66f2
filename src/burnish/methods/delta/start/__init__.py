"""Updates of low rank that start from the weight or from data."""
