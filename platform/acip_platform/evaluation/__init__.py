"""Measurements of models as Ray tasks."""
