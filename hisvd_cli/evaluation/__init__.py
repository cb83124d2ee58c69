"""Measures the quality and the speed of models."""
