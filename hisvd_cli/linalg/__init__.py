"""The mathematics of low-rank truncation, on tensors alone."""
