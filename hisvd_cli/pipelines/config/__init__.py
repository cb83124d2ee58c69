"""Profiles, presets and settings."""
