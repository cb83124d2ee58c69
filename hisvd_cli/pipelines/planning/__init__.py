"""Settings to plans."""
