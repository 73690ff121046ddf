"""Linear layers in every form that a calibration and a compressed model need."""
