"""The calibration: bases, parametrization, losses, the loop, and its memory plan."""
