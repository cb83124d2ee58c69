"""What a model is: its structure, its blocks, and the checkpoints that hold it."""
