"""Models: sources, weights, structure, block walk, layers and checkpoints."""
