"""Checkpoints in other forms, and their model cards."""
