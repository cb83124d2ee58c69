"""Several presets or ratios: one checkpoint each, from one calibration."""
