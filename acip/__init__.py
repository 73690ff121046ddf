"""acip: calibrate a language model once, have it at any size (ACIP, TMLR 2025, and our improvements on it)."""

__version__ = "0.1.0"
