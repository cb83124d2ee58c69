"""Linear algebra of low-rank truncation."""
