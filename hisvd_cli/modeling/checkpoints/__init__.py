"""Checkpoint folders: config, weight files, and the record of small files."""
