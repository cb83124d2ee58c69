"""Which rank every sublayer gets: budgets, spectra and plans."""
