"""A plan carried out: factors, updates, stages, quantization."""
