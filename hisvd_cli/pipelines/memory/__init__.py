"""Whether a run fits into the memory limit."""
