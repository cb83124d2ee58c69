"""Checkpoint folders: config, weight files and provenance record."""
