"""Models as users have them: hub, folders, GGUF, quantized weights, adapters."""
