"""Updates between factors of the weight's own decomposition."""
