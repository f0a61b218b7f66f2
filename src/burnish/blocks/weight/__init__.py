"""What stands for a weight matrix, and what is added to it."""
