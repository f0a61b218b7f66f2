"""Scores, budgets and thresholds: what decides which entries, ranks or layers."""
