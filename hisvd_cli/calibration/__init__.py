"""Text to tokens to activation statistics, and the calibration on disk."""
