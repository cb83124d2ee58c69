"""Model sources: Hub, folders, GGUF files, quantized weights and adapters."""
