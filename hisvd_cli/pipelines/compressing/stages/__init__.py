"""Rounds of truncation and correction."""
