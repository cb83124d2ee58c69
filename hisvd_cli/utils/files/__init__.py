"""Atomic files and folders, checksums, fingerprints, caches and temporary folders."""
