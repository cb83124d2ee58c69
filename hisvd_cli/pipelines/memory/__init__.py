"""Checks whether a run fits into the memory limit."""
