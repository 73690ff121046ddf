"""Weights as codes of few bits."""
