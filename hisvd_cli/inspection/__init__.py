"""Inspection of checkpoints, models, plans, calibrations and pickles."""
