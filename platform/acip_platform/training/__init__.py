"""Calibrations, fine-tunings and sweeps on Ray."""
