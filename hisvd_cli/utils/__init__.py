"""Shared utilities: errors, progress, files, devices, distributed runs."""
