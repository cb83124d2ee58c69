"""From settings to results, with one module per step; lower layers take plain arguments."""
