"""The calibration of a model: bases, parametrization, losses, the loop, and its memory plan."""
