"""Estimates of time, memory and bytes for ``--dry-run``."""
