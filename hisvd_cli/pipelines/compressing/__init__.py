"""Settings to checkpoints."""
