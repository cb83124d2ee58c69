"""Settings to measurements and reports."""
