"""Measurements of models, and comparisons of methods, as Ray tasks."""
