"""Updates as products of small tensors."""
