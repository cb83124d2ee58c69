"""Fine-tuning of checkpoints."""
