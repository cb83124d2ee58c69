"""Recovers accuracy after compression by distillation or LoRA."""
