"""Recovering accuracy: distillation, LoRA and what they train with."""
