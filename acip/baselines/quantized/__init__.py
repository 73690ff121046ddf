"""Quantizers that people use today, one file each. Each returns decoded weights and the bytes that its format stores."""
