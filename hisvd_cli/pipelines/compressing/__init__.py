"""Compression and quantization."""
