"""Checkpoint folders: config, weight files, the record of the small files."""
