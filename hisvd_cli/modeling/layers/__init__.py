"""Low-rank and quantized layers, and how transformers loads them; these travel with checkpoints."""
