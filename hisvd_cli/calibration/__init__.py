"""Calibration: text, tokens, activation statistics and gradients, and their files."""
