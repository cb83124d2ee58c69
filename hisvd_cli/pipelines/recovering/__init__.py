"""Settings to fine-tuned checkpoints."""
