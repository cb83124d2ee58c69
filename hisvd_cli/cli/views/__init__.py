"""Renders results in a terminal."""
