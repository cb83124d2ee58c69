"""Conversion of checkpoints to other formats, and model cards."""
