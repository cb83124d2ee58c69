"""Settings to checkpoints whose low-rank factors are fine-tuned."""
