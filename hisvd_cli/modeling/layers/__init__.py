"""Low-rank and quantized layers and their integration with transformers and peft."""
