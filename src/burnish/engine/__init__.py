"""Joins a recipe to a model: class swap, slots, and the tuned model."""
