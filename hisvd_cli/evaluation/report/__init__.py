"""A run's results as one HTML page that needs nothing beside it: no network, no other file."""
